"""The largest of many numbers, exactly so many of them, without sorting or holding them all."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

DIGIT_BITS = 16
BINS = 1 << DIGIT_BITS
LOWEST = -(1 << 31)

Parts = Callable[[], Iterable[Tensor]]
"""The numbers in parts, float32; the same ones every time it is called."""


def largest(parts: Parts, count: int) -> Iterator[Tensor]:
    """For each part a mask, True at the `count` largest numbers of all parts together.

    Among equal numbers, those that come first. Two passes count the digits, of 16 bits, of numbers
    brought into the order of integers; a third one makes the masks.
    """
    key, ties = _kth(parts, count) if count else (1 << 31, 0)
    for part in parts():
        keys = _keys(part)
        mask = keys > key
        if ties:
            equal = (keys == key).flatten()
            ranks = equal.cumsum(0)
            mask |= (equal & (ranks <= ties)).reshape(mask.shape)
            ties -= min(ties, int(ranks[-1]) if len(ranks) else 0)
        yield mask


def largest_of_each_row(values: Tensor, count: int | Tensor) -> Tensor:
    """A mask of the `count` largest along the last dimension; among equal ones, the first.

    Shapes: values [..., column], count [..., 1] where it is not the same for every row.
    """
    order = values.argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(values.shape[-1], device=values.device) < count
    mask = torch.zeros_like(values, dtype=torch.bool)
    return mask.scatter_(-1, order, first.expand_as(order))


def _kth(parts: Parts, rank: int) -> tuple[int, int]:
    """The key of the number with this rank, and how many of those equal to it are of the largest."""
    high = torch.zeros(BINS, dtype=torch.long)
    for part in parts():
        high += torch.bincount((_keys(part) - LOWEST).flatten() >> DIGIT_BITS, minlength=BINS)
    first, rank = _locate(high, rank)
    low = torch.zeros(BINS, dtype=torch.long)
    for part in parts():
        keys = (_keys(part) - LOWEST).flatten()
        keys = keys[(keys >> DIGIT_BITS) == first]
        low += torch.bincount(keys & (BINS - 1), minlength=BINS)
    second, rank = _locate(low, rank)
    return ((first << DIGIT_BITS) | second) + LOWEST, rank


def _locate(counts: Tensor, rank: int) -> tuple[int, int]:
    """The digit of the number with this rank, and its rank among those of the same digit."""
    above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, rank))
    return BINS - 1 - place, rank - (int(above[place - 1]) if place else 0)


def _keys(values: Tensor) -> Tensor:
    """int64 in the order of the numbers; a zero has one key, whatever its sign."""
    bits = (values.to(torch.float32) + 0.0).contiguous().view(torch.int32)
    # Of negative numbers the bits grow with the distance from zero.
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
