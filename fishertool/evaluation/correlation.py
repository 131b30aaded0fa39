"""Whether two lists of numbers put the same things first."""

from collections.abc import Sequence
from math import nan

import torch
from torch import Tensor


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The correlation of ranks, from -1 to 1; equal numbers share the mean of their ranks.

    None where one of the lists has no two different numbers, NaN where one has a NaN.
    Source: Spearman 1904.

    >>> spearman([1, 2, 3], [10, 20, 15])
    0.5
    """
    ranks = torch.stack([_ranks(first), _ranks(second)])
    centred = ranks - ranks.mean(1, keepdim=True)
    spread = float(centred[0].square().sum() * centred[1].square().sum())
    return float(centred[0] @ centred[1]) / spread**0.5 if spread else None


def _ranks(numbers: Sequence[float]) -> Tensor:
    values = torch.tensor(numbers, dtype=torch.float64)
    _, which, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ranks: Tensor = counts.cumsum(0) - (counts - 1).double() / 2
    return ranks[which].masked_fill(values.isnan(), nan)
