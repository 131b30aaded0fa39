"""Time of the rank-one Fisher's inverse against the recursion over members, in one run.

    python scripts/bench/rank_one.py [--cases whole,blocks] [--repeats 3] [--threads N]

ours       fishertool.fisher.rank_one.RankOneFisher, of a float32 bank in memory; in blocks the
           inverse diagonal and the solve factor anew, and both times count
recursion  M-FAC (Frantar et al. 2021, arXiv 2107.03356), static and matrix-free, as its public
           code goes about it: one member after another, all weights of a batch of blocks at once
           (as thin batched products, which this CPU does not like), in place. Its batches are of
           the size of our pieces, so that they too stay in cache; larger ones were no faster

Both in float32 and float64, taking turns; a ratio is of neighbours in time, and above one where
ours is faster. `to_float32_recursion` holds our float64 against what the public code runs in.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fishertool.fisher.columns import PIECE_ELEMENTS, HeldGradients
from fishertool.fisher.rank_one import RankOneFisher
from fishertool.memory import keep_freed_memory

CASES: dict[str, list[tuple[int, int, int | None]]] = {
    "whole": [(500_000, 64, None), (100_000, 512, None)],
    "blocks": [(1_000_000, 64, 50), (1_000_000, 64, 128), (200_000, 256, 128), (10_000, 1024, 50)],
}
"""weights, members, block"""
DAMPING = 0.01
"""Of a mean diagonal of one."""
Steps = dict[str, float]


def ours(gradients: Tensor, block: int | None, x: Tensor, dtype: torch.dtype) -> Steps:
    fisher = RankOneFisher(HeldGradients({"weight": gradients}), DAMPING, block, dtype=dtype)
    times = [time.perf_counter()]
    if block is None:
        fisher._whole.factor  # noqa: B018 - found on first use
    times.append(time.perf_counter())
    fisher.inverse_diagonal()
    times.append(time.perf_counter())
    fisher.solve(x)
    return steps([*times, time.perf_counter()], block)


def recursion(gradients: Tensor, block: int | None, x: Tensor, dtype: torch.dtype) -> Steps:
    members, weights = gradients.shape
    side = block or weights
    per_batch = max(1, PIECE_ELEMENTS // (members * side)) * side
    batches = [
        part.to(dtype).reshape(members, -1, side).transpose(0, 1).contiguous()
        for part in torch.split(gradients, per_batch, dim=1)
    ]  # not timed: the public code works in the bank's own memory
    vectors = [part.to(dtype).reshape(-1, side) for part in torch.split(x, per_batch)]
    times = [time.perf_counter()]
    denominators = [build(batch) for batch in batches]
    times.append(time.perf_counter())
    for batch, denominator in zip(batches, denominators, strict=True):
        inverse_diagonal(batch, denominator)
    times.append(time.perf_counter())
    for batch, denominator, vector in zip(batches, denominators, vectors, strict=True):
        solve(batch, denominator, vector)
    return steps([*times, time.perf_counter()], block)


def steps(times: list[float], block: int | None) -> Steps:
    start, built, read, solved = times
    build = {"build": built - start} if block is None else {}
    return {**build, "with_inverse_diagonal": read - start, "with_solve_too": solved - start}


def build(batch: Tensor) -> Tensor:
    """v_k = F_k-1^-1 g_k in the place of g_k [block, member, weight]; m + g_k^T v_k."""
    blocks, members, _ = batch.shape
    denominators = batch.new_zeros(blocks, members)
    for k in range(members):
        gradient = batch[:, k].clone()
        batch[:, k] = solve(batch[:, :k], denominators[:, :k], gradient)
        denominators[:, k] = members + torch.linalg.vecdot(gradient, batch[:, k])
    return denominators


def solve(batch: Tensor, denominators: Tensor, x: Tensor) -> Tensor:
    """F^-1 x = x / damping - sum over k of v_k (v_k^T x) / denominator_k, [block, weight]."""
    coefficients = (batch @ x.unsqueeze(2)).squeeze(2) / denominators
    return (x / DAMPING).sub_((coefficients.unsqueeze(1) @ batch).squeeze(1))


def inverse_diagonal(batch: Tensor, denominators: Tensor) -> Tensor:
    result = torch.full_like(batch[:, 0], 1 / DAMPING)
    for k in range(batch.shape[1]):
        result -= batch[:, k] ** 2 / denominators[:, k : k + 1]
    return result


def measure(weights: int, members: int, block: int | None, repeats: int) -> dict[str, Any]:
    weights -= weights % (block or 1)  # the recursion has no shorter last block
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(members, weights, generator=generator)
    x = torch.randn(weights, generator=generator)
    contenders: dict[str, Callable[[torch.dtype], Steps]] = {
        "ours": lambda dtype: ours(gradients, block, x, dtype),
        "recursion": lambda dtype: recursion(gradients, block, x, dtype),
    }
    seconds: dict[str, list[Steps]] = {}
    for _ in range(repeats):
        for dtype in (torch.float32, torch.float64):
            for name, run in contenders.items():
                key = f"{name}_{str(dtype).removeprefix('torch.')}"
                seconds.setdefault(key, []).append(run(dtype))

    def ratios(mine: str, theirs: str) -> Steps:
        pairs = list(zip(seconds[mine], seconds[theirs], strict=True))
        return {
            step: round(statistics.median(b[step] / a[step] for a, b in pairs), 2)
            for step in pairs[0][0]
        }

    return {
        "weights": weights,
        "members": members,
        "block": block,
        "seconds": {key: medians(runs) for key, runs in seconds.items()},
        "recursion_to_ours": {
            "float32": ratios("ours_float32", "recursion_float32"),
            "float64": ratios("ours_float64", "recursion_float64"),
            "to_float32_recursion": ratios("ours_float64", "recursion_float32"),
        },
    }


def medians(runs: list[Steps]) -> Steps:
    return {step: round(statistics.median(run[step] for run in runs), 3) for step in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cases", default="whole,blocks")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as the command line does, here for both alike

    def results() -> Iterator[dict[str, Any]]:
        for kind in options.cases.split(","):
            for weights, members, block in CASES[kind]:
                yield measure(weights, members, block, options.repeats)

    print(json.dumps({"threads": options.threads, "cases": list(results())}, indent=2))


if __name__ == "__main__":
    main()
