"""Time of the OBS saliency against the recursion of M-FAC, and time and memory of a whole pruning.

    python scripts/bench/prune_speed.py [--model MODEL --fisher SIDECAR] [--repeats 3] [--threads N]

whole   all weights in one Fisher; at least 5 times as fast as the recursion
blocks  500 blocks of 128 weights and 256 gradients; at least 1.5 times as fast
prune   fishertool prune --method obs of a real model, by a sidecar with a bank of its gradients; the
        peak counts the interpreter and torch

The recursion is that of scripts/bench/rank_one.py, which says how it is timed; ours is in float64,
the recursion in float32, as the public code runs it, and in float64.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rank_one import measure

from fishertool.memory import keep_freed_memory

CASES: dict[str, list[tuple[int, int, int | None]]] = {
    "whole": [(500_000, 64, None), (100_000, 512, None)],
    "blocks": [(64_000, 256, 128)],
}
"""weights, gradients, block"""
TARGETS = {"whole": 5.0, "blocks": 1.5}
STEP = "with_inverse_diagonal"


def saliency(kind: str, case: tuple[int, int, int | None], repeats: int) -> dict[str, Any]:
    found = measure(*case, repeats)
    ratios = found["recursion_to_ours"]
    return {
        "kind": kind,
        "weights": case[0],
        "gradients": case[1],
        "block": case[2],
        "seconds": {name: steps[STEP] for name, steps in found["seconds"].items()},
        "times_as_fast": {name: steps[STEP] for name, steps in ratios.items()},
        "target": TARGETS[kind],
    }


def pruning(model: Path, fisher: Path, threads: int) -> dict[str, Any]:
    """In a process of its own, whose peak is this command's alone."""
    with tempfile.TemporaryDirectory(dir=model.parent) as scratch:
        flags = ["--method", "obs", "--sparsity", "0.7", "--fisher", str(fisher), "--json", "-q"]
        command = [sys.executable, "-m", "fishertool", "prune", str(model), *flags]
        out = ["--out", str(Path(scratch) / "out"), "--threads", str(threads)]
        done = subprocess.run([*command, *out], check=True, capture_output=True, text=True)
    report = json.loads(done.stdout)
    return {
        "kind": "prune",
        "weights": report["summary"]["weights_pruned"],
        "seconds": {phase["name"]: phase["seconds"] for phase in report["phases"]},
        "peak_bytes": max(phase["peak_rss_bytes"] for phase in report["phases"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--fisher", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as the command line does, here for both alike
    for kind, cases in CASES.items():
        for case in cases:
            print(json.dumps(saliency(kind, case, options.repeats)), flush=True)
    if options.model is not None and options.fisher is not None:
        print(json.dumps(pruning(options.model, options.fisher, options.threads)), flush=True)


if __name__ == "__main__":
    main()
