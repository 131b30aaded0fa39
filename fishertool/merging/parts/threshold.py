"""Values by rank, of a tensor that is never sorted nor held whole."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fishertool.merging.method import Passes

DIGIT_BITS = 16
BINS = 1 << DIGIT_BITS
BLOCK = 1 << 17
WHOLE_NUMBERS = {torch.float32: torch.int32, torch.float64: torch.int64}

Scores = Callable[..., Iterable[Tensor]]


def kth_largest(scores: Scores, ranks: Sequence[Sequence[int]]) -> Passes[list[list[float]]]:
    """For each of n scores its k-th largest sizes, exactly, by counting digits of 16 bits.

    scores  takes what a pass takes of a piece -> n tensors, ranked without regard to sign
    ranks   for each score the k that are asked for, from 1 to the number of elements

    Floating-point numbers without sign are ordered as their bits are: the first pass counts the
    upper digit, each further one the next digit of those that agree with the value found so far.
    Two passes for float32, four for float64; none where no k is asked for.
    """
    if not any(ranks):
        return [[] for _ in ranks]
    found = [[0] * len(asked) for asked in ranks]
    left = [list(asked) for asked in ranks]
    digits, digit, dtype = 1, 0, torch.float32
    while digit < digits:
        prefixes = [sorted(set(prefix)) for prefix in found]

        def count(
            *piece: Any, digit: int = digit, prefixes: Sequence[Sequence[int]] = prefixes
        ) -> Tensor:
            counts = [
                _count(score, digit, prefix)
                for score, wanted in zip(scores(*piece), prefixes, strict=True)
                for prefix in wanted
            ]
            return torch.stack(counts)

        total = yield count
        if total.is_floating_point():
            digits, dtype = 4, torch.float64
        else:
            digits = 2
        counted = iter(total.long())
        for one, asked, wanted in zip(found, left, prefixes, strict=True):
            above = {prefix: next(counted).flip(0).cumsum(0) for prefix in wanted}
            for number, (prefix, rank) in enumerate(zip(one, asked, strict=True)):
                place = int(torch.searchsorted(above[prefix], rank))
                asked[number] = rank - (int(above[prefix][place - 1]) if place else 0)
                one[number] = (prefix << DIGIT_BITS) | (BINS - 1 - place)
        digit += 1
    return [
        torch.tensor(one, dtype=WHOLE_NUMBERS[dtype]).view(dtype).tolist() if one else []
        for one in found
    ]


def _count(score: Tensor, digit: int, prefix: int) -> Tensor:
    """How often each value of a digit follows the digits of `prefix`; as float64 for a float64."""
    raw = score.abs().flatten().view(WHOLE_NUMBERS[score.dtype])
    shift = 8 * raw.itemsize - DIGIT_BITS * (digit + 1)
    if digit:
        # Few agree; numpy selects few several times as fast as torch, and in blocks that a
        # core's cache holds.
        above = shift + DIGIT_BITS
        blocks = (block.numpy() for block in torch.split(raw, BLOCK))
        raw = torch.from_numpy(
            np.concatenate([block[block >> above == prefix] for block in blocks])
            & (BINS - 1 << shift)
        )
    counts = torch.bincount(raw >> shift, minlength=BINS)
    return counts.to(torch.float64) if score.dtype == torch.float64 else counts
