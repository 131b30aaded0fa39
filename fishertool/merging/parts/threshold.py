"""Values by rank, of a tensor that is never sorted nor held whole."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fishertool.merging.method import Passes

DIGIT_BITS = 16
BINS = 1 << DIGIT_BITS
WHOLE_NUMBERS = {torch.float32: torch.int32, torch.float64: torch.int64}

Scores = Callable[..., Iterable[Sequence[Tensor]]]
"""From what a pass takes of a piece: the n scores, in as many blocks as their author likes."""


def kth_largest(scores: Scores, ranks: Sequence[Sequence[int]]) -> Passes[list[list[float]]]:
    """For each of n scores its k-th largest sizes, exactly, by counting digits of 16 bits.

    scores  of a piece; ranked without regard to sign
    ranks   for each score the k that are asked for, from 1 to the number of elements

    Floating-point numbers without sign are ordered as their bits are: the first pass counts the
    upper digit, each further one the next digit of those that agree with the value found so far.
    Two passes for float32, four for float64; none where no k is asked for.
    """
    if not any(ranks):
        return [[] for _ in ranks]
    found = [[0] * len(asked) for asked in ranks]
    left = [list(asked) for asked in ranks]
    digits, digit = 1, 0
    while digit < digits:
        prefixes = [sorted(set(prefix)) for prefix in found]

        def count(
            *piece: Any, digit: int = digit, prefixes: Sequence[Sequence[int]] = prefixes
        ) -> Tensor:
            parts: list[list[list[Tensor]]] = [[[] for _ in wanted] for wanted in prefixes]
            for block in scores(*piece):
                for score, wanted, kept in zip(block, prefixes, parts, strict=True):
                    bits = score.abs().flatten().view(WHOLE_NUMBERS[score.dtype])
                    for prefix, part in zip(wanted, kept, strict=True):
                        part.append(_digits(bits, digit, prefix))
            counts = torch.stack(
                [torch.bincount(torch.cat(one), minlength=BINS) for kept in parts for one in kept]
            )
            return counts.to(torch.float64) if bits.dtype == torch.int64 else counts

        total = yield count
        # Scores are not seen here; the dtype of their counts says how many digits they have.
        digits, dtype = (4, torch.float64) if total.is_floating_point() else (2, torch.float32)
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


def _digits(bits: Tensor, digit: int, prefix: int) -> Tensor:
    """This digit of every number whose digits before it are `prefix`."""
    digits = 8 * bits.itemsize // DIGIT_BITS
    if digit == 0:
        return bits.view(torch.int16)[digits - 1 :: digits].contiguous()  # without sign: never < 0
    shift = DIGIT_BITS * (digits - 1 - digit)
    numbers = bits.numpy()  # it selects few of many several times as fast as torch
    agreeing = numbers[numbers >> shift + DIGIT_BITS == prefix]
    return torch.from_numpy(agreeing >> shift & BINS - 1)
