"""Values by rank, of a tensor that is never sorted nor held whole."""

from collections.abc import Callable, Iterable, Sequence
from math import sqrt
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fishertool.merging.method import Passes

SAMPLE = 1 << 17
"""About how many sizes of a tensor tell where to look."""
DEVIATIONS = 4.0
"""How far from there its standard error makes us look."""

Scores = Callable[..., Iterable[Sequence[Tensor]]]
"""From what a pass takes of a piece: the n scores, in as many blocks as their author likes."""
Bits: TypeAlias = npt.NDArray[np.signedinteger[Any]]
"""Sizes as whole numbers: floating-point numbers without sign are ordered as their bits are."""


class Near(NamedTuple):
    """What a piece has in a range of sizes."""

    above: int
    """How many are larger."""
    sizes: Bits
    counts: Bits


def kth_largest(
    scores: Scores, ranks: Sequence[Sequence[int]], elements: int
) -> Passes[list[list[float]]]:
    """For each of n scores its k-th largest sizes, exactly.

    scores    of a piece; ranked without regard to sign
    ranks     for each score the k that are asked for, from 1 to `elements`
    elements  of each score, over all pieces

    The first pass takes a sample, from which the k-th size is known within about one per cent of
    the ranks; the second counts what is larger and gathers what is in that range. Where the k-th
    is not among it, two more look with another sample in a wider range. One pass for a tensor
    that is no larger than a sample, none where no k is asked for.
    """
    asked = list(dict.fromkeys((i, rank) for i, wanted in enumerate(ranks) for rank in wanted))
    found: dict[tuple[int, int], float] = {}
    stride, deviations = elements // SAMPLE | 1, DEVIATIONS
    while len(found) < len(asked):
        parts = yield lambda *piece, stride=stride: [_sample(scores(*piece), stride)]
        samples = [np.sort(np.concatenate(part)) for part in zip(*parts, strict=True)]
        if stride == 1:
            return [
                [_size(sample[-k]) for k in wanted]
                for sample, wanted in zip(samples, ranks, strict=True)
            ]
        left = [one for one in asked if one not in found]
        ranges = [(i, *_range(samples[i], k / elements, deviations)) for i, k in left]
        parts = yield lambda *piece, ranges=ranges: [_near(scores(*piece), ranges)]
        for one, near in zip(left, zip(*parts, strict=True), strict=True):
            size = _ranked(near, one[1])
            if size is not None:
                found[one] = size
        stride, deviations = stride + 2, 2 * deviations
    return [[found[i, rank] for rank in wanted] for i, wanted in enumerate(ranks)]


def _sample(blocks: Iterable[Sequence[Tensor]], stride: int) -> list[Bits]:
    """Every so many-th size of each score."""
    taken = [[_bits(score.flatten()[::stride]) for score in block] for block in blocks]
    return [np.concatenate(parts) for parts in zip(*taken, strict=True)]


def _range(sample: Bits, share: float, deviations: float) -> tuple[int, int]:
    """The sizes, least and most, between which the one lies that `share` of all are as large as.

    sample  sorted
    """
    size = len(sample)
    error = deviations * sqrt(size * share * (1 - share)) + 1
    least, most = int(size * (1 - share) - error), int(size * (1 - share) + error) + 1
    return (
        int(sample[least]) if least >= 0 else 0,
        int(sample[most]) if most < size else int(np.iinfo(sample.dtype).max),
    )


def _near(blocks: Iterable[Sequence[Tensor]], ranges: Sequence[tuple[int, int, int]]) -> list[Near]:
    """For each range (score, least, most) what is in it."""
    above = [0] * len(ranges)
    inside: list[list[Bits]] = [[] for _ in ranges]
    for block in blocks:
        bits = [_bits(score) for score in block]
        for number, (i, least, most) in enumerate(ranges):
            above[number] += int(np.count_nonzero(bits[i] > most))
            inside[number].append(bits[i][(bits[i] >= least) & (bits[i] <= most)])
    unique = [np.unique(np.concatenate(parts), return_counts=True) for parts in inside]
    return [Near(count, *one) for count, one in zip(above, unique, strict=True)]


def _ranked(pieces: Sequence[Near], rank: int) -> float | None:
    """The size of this rank, where it is in the pieces' range."""
    sizes = np.concatenate([piece.sizes for piece in pieces])
    order = np.argsort(sizes)[::-1]
    counts = np.concatenate([piece.counts for piece in pieces])[order]
    ends = sum(piece.above for piece in pieces) + counts.cumsum()
    place = int(np.searchsorted(ends, rank))
    if place == len(ends) or rank <= ends[0] - counts[0]:
        return None
    return _size(sizes[order[place]])


def _bits(score: Tensor) -> Bits:
    sizes: npt.NDArray[Any] = score.abs().flatten().numpy()
    return sizes.view(np.int32 if sizes.dtype == np.float32 else np.int64)


def _size(bits: np.signedinteger[Any]) -> float:
    return float(bits.view(np.float32 if bits.dtype == np.int32 else np.float64))
