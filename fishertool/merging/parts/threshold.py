"""Values by rank, of a tensor that is never sorted nor held whole."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fishertool.merging.method import Passes

DIGIT_BITS = 16
BINS = 1 << DIGIT_BITS

Scores = Callable[..., Sequence[Tensor]]


def kth_largest(
    scores: Scores, ranks: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32
) -> Passes[list[list[float]]]:
    """For each of n scores its k-th largest values, exactly, by counting digits of 16 bits.

    scores  takes what a pass takes of a piece -> n tensors of numbers of at least 0
    ranks   for each score the k that are asked for, from 1 to the number of elements

    Non-negative floating-point numbers are ordered as their bits are: the first pass counts the
    upper digit, each further one the next digit of those that agree with the value found so far.
    Two passes for float32, four for float64. Scores are compared in `dtype`.
    """
    bits = torch.finfo(dtype).bits
    whole_number = {32: torch.int32, 64: torch.int64}[bits]
    found = [[0] * len(asked) for asked in ranks]
    left = [list(asked) for asked in ranks]
    for shift in range(bits - DIGIT_BITS, -1, -DIGIT_BITS):
        prefixes = [sorted(set(prefix)) for prefix in found]

        def count(
            *piece: Any, shift: int = shift, prefixes: Sequence[Sequence[int]] = prefixes
        ) -> Tensor:
            counts = []
            for score, wanted in zip(scores(*piece), prefixes, strict=True):
                # abs() of a signed zero is a zero whose bits are all zero.
                raw = score.to(dtype).abs().contiguous().view(whole_number).flatten()
                for prefix in wanted:
                    digits = raw >> shift
                    if shift + DIGIT_BITS < bits:
                        digits = digits[(digits >> DIGIT_BITS) == prefix]
                    counts.append(torch.bincount(digits & (BINS - 1), minlength=BINS))
            return torch.stack(counts)

        counted = iter((yield count))
        for one, asked, wanted in zip(found, left, prefixes, strict=True):
            above = {prefix: next(counted).flip(0).cumsum(0) for prefix in wanted}
            for number, (prefix, rank) in enumerate(zip(one, asked, strict=True)):
                place = int(torch.searchsorted(above[prefix], rank))
                asked[number] = rank - (int(above[prefix][place - 1]) if place else 0)
                one[number] = (prefix << DIGIT_BITS) | (BINS - 1 - place)
    return [
        torch.tensor(one, dtype=whole_number).view(dtype).tolist() if one else [] for one in found
    ]
