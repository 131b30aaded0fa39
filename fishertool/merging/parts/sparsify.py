"""What a task vector keeps: by the size of its entries, or by chance."""

from collections.abc import Iterator, Sequence
from math import inf
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn.functional import hardshrink

from fishertool.merging.method import Passes
from fishertool.merging.parts.blocks import blocks
from fishertool.merging.parts.threshold import kth_largest


class Range(NamedTuple):
    """Which entries of one model's task vector are kept: least <= |tau| <= most."""

    least: float = 0.0
    most: float = inf
    scale: float = 1.0
    """What the kept ones are multiplied by."""


NOTHING = Range(least=inf)


def find_ranges(
    counts: Sequence[tuple[int, int] | None], elements: int, rescale: bool
) -> Passes[list[Range]]:
    """For each model the range of sizes that `count` entries have below its `top` largest ones.

    counts   (top, count) for each model; None keeps everything
    rescale  scale the kept entries to the L1 norm of all

    Entries as large as one at the end of the range are kept too. No passes where nothing is to be
    found; those of `kth_largest`, and one more to rescale.
    """
    asked = {
        i: [top + 1, top + count] if top else [count]
        for i, (top, count) in enumerate(one or (0, 0) for one in counts)
        if count
    }

    def vectors(models: Sequence[Tensor], base: Tensor) -> Iterator[list[Tensor]]:
        for *parts, origin in blocks(*(models[i] for i in asked), base):
            yield [part - origin for part in parts]

    found = yield from kth_largest(vectors, list(asked.values()), elements)
    ranges = [Range() if one is None else NOTHING for one in counts]
    for i, values in zip(asked, found, strict=True):
        ranges[i] = Range(values[-1], values[0] if len(values) > 1 else inf)
    if not rescale or not asked:
        return ranges

    def norms(models: Sequence[Tensor], base: Tensor) -> Tensor:
        sums = torch.zeros(len(asked), 2, dtype=torch.float64)
        for *parts, origin in blocks(*(models[i] for i in asked), base):
            for row, i, part in zip(sums, asked, parts, strict=True):
                vector = part - origin
                row[0] += vector.abs().sum(dtype=torch.float64)
                row[1] += keep_range(vector, ranges[i]).abs_().sum(dtype=torch.float64)
        return sums

    for i, (whole, kept) in zip(asked, (yield norms).tolist(), strict=True):
        ranges[i] = ranges[i]._replace(scale=whole / kept if kept else 1.0)
    return ranges


def keep_range(vector: Tensor, kept: Range) -> Tensor:
    """The vector with zeros for what is not in the range; may write to the vector."""
    if kept.least > 0:
        # hardshrink keeps what is larger than its argument: here, than the next smaller number.
        number = np.float64 if vector.dtype == torch.float64 else np.float32
        vector = hardshrink(vector, float(np.nextafter(number(kept.least), number(0))))
    if kept.most < inf:
        vector.sub_(hardshrink(vector, kept.most))
    return vector if kept.scale == 1 else vector.mul_(kept.scale)


def drop_at_random(vector: Tensor, density: float, generator: Generator, rescale: bool) -> Tensor:
    """Keep every entry with probability `density`, and divide it by that if `rescale`; in place."""
    if density == 1:
        return vector
    if density == 0:
        return vector.zero_()
    kept = torch.empty_like(vector).uniform_(generator=generator).lt_(density)
    return vector.mul_(kept.mul_(1 / density) if rescale else kept)


def drop_by_rank(
    vector: Tensor, density: float, epsilon: float, generator: Generator, rescale: bool
) -> Tensor:
    """Keep the j-th smallest of a row's n entries with probability p_j; in place.

        p_j = density + epsilon (2 (j - 1) / (n - 1) - 1),    density where n = 1

    and divide it by p_j if `rescale`. Ranks are of |vector| in float32, ties by place. The draws
    are made for ranks, not for places. Raises ValueError unless 0 < p_j < 1.
    """
    if density == 1:
        return vector
    if density == 0:
        return vector.zero_()
    if density - epsilon <= 0 or density + epsilon >= 1:
        raise ValueError(f"density {density} +- epsilon {epsilon} is not between 0 and 1")
    rows = vector.view(-1, vector.shape[-1])
    width = rows.shape[1]
    place = torch.linspace(-1, 1, width, dtype=vector.dtype) if width > 1 else torch.zeros(1)
    probability = place.mul_(epsilon).add_(density).to(vector.dtype)
    kept = torch.empty_like(rows).uniform_(generator=generator).lt_(probability)
    if rescale:
        kept.div_(probability)
    # Size and place in one whole number: numpy sorts those several times faster than torch sorts
    # floating-point numbers, and no two are equal.
    keys = rows.abs().float().view(torch.int32).to(torch.int64)
    keys.bitwise_left_shift_(32).bitwise_or_(torch.arange(width))
    keys.numpy().sort(axis=1)
    factor = torch.empty_like(rows).scatter_(1, keys.bitwise_and_((1 << 32) - 1), kept)
    rows.mul_(factor)
    return vector
