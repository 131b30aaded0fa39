"""Pareto fronts: what is on them, how much they dominate, and the choice of one point.

Shapes: values [point, objective], every objective maximised, finite. A point dominates another
that it equals or exceeds in every objective and exceeds in one.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from fishertool.errors import UsageError

MARGIN = 0.1
"""How far beyond the nadir the reference point lies, in ranges of the front (Ishibuchi, Akedo and
Nojima 2011)."""
TIE = 1e-3
"""Share of the sum in an augmented Chebyshev distance; tells weakly dominated points apart."""


def non_dominated(values: Tensor) -> Tensor:
    """Which points no other point dominates: a mask [point]. Equal points are all on the front.

    >>> non_dominated(torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0]])).tolist()
    [True, True, False]
    """
    one, other = values[:, None], values[None]
    dominated = (other >= one).all(-1) & (other > one).any(-1)
    return ~dominated.any(1)


def fronts(values: Tensor) -> Tensor:
    """Each point's rank [point]: 0 on the front, 1 on the front of the rest, and so on.

    Deb, Pratap, Agarwal and Meyarivan 2002 (NSGA-II), non-dominated sorting.
    """
    ranks = torch.full((len(values),), -1)
    rank = 0
    while len(left := (ranks < 0).nonzero().flatten()):
        ranks[left[non_dominated(values[left])]] = rank
        rank += 1
    return ranks


def hypervolume(values: Tensor, reference: Tensor) -> float:
    """The volume that is dominated by some point and dominates the reference point [objective].

    Exact for any number of objectives: from the highest in the last one down, each point adds its
    height times what it dominates in the objectives left and no higher one does (While, Bradstreet
    and Barone 2012, WFG). It is meant for fronts of tens of points.
    """
    above = values.double() - reference.double()
    return _dominated_volume(above[(above > 0).all(-1)])


def hypervolumes(values: Tensor, reference: Tensor) -> list[float]:
    """After each point."""
    above = (values.double() - reference.double()).clamp(min=0)
    return list(accumulate(_exclusive_volume(one, above[:i]) for i, one in enumerate(above)))


def _dominated_volume(values: Tensor) -> float:
    """The hypervolume of values that are at least 0, with the origin as reference."""
    if not len(values):
        return 0.0
    if values.shape[1] == 1:
        return float(values.max())
    front = values[non_dominated(values)]
    front = front[front[:, -1].argsort(descending=True, stable=True)]
    heights = front[:, -1]
    if values.shape[1] == 2:
        slabs = heights - torch.cat([heights[1:], heights.new_zeros(1)])
        return float(front[:, 0].cummax(0).values @ slabs)
    base = front[:, :-1]
    return sum(
        float(height) * _exclusive_volume(base[i], base[:i]) for i, height in enumerate(heights)
    )


def _exclusive_volume(point: Tensor, others: Tensor) -> float:
    """What the point dominates and none of the others does. Cut to what the point dominates, most of
    the others are dominated by one another: that makes this cheap."""
    return max(0.0, float(point.prod()) - _dominated_volume(torch.minimum(point, others)))


def contributions(values: Tensor, reference: Tensor) -> Tensor:
    """What the hypervolume would lose without each point: [point], 0 for dominated points."""
    above = (values.double() - reference.double()).clamp(min=0)
    lost = torch.zeros(len(values), dtype=torch.float64)
    for i in non_dominated(values).nonzero().flatten().tolist():
        lost[i] = _exclusive_volume(above[i], torch.cat([above[:i], above[i + 1 :]]))
    return lost


def reference_of(values: Tensor) -> Tensor:
    """A reference point for the hypervolume of points whose front is not known: [objective].

    The nadir of the front (the worst value on it of each objective) less 0.1 of the front's range.
    Where the front is one value, the range of all points stands in, or 1 where that is nothing.
    """
    front = values[non_dominated(values)]
    spread = _range(front)
    spread = torch.where(spread > 0, spread, _range(values))
    return front.amin(0) - MARGIN * torch.where(spread > 0, spread, torch.ones_like(spread))


def strongest(values: Tensor, count: int) -> Tensor:
    """Indices of the best points: by front, and within one by hypervolume contribution.

    values [point, objective], maximised -> [min(count, point)], best first; of equal ones the
    earlier first.
    """
    ranks = fronts(values)
    order: list[int] = []
    for rank in range(int(ranks.max()) + 1):
        front = (ranks == rank).nonzero().flatten()
        shares = contributions(values[front], reference_of(values[front]))
        order += front[shares.argsort(descending=True, stable=True)].tolist()
    return torch.tensor(order[:count])


def knee(values: Tensor) -> int:
    """The index of the point where giving up a little of one objective costs most of another.

    With objectives scaled to 0 at the front's nadir and 1 at its best value, it is the point of
    the front that lies farthest above the plane sum z = 1 through the best points of the single
    objectives; that is the one of greatest sum z (Das 1999, Structural Optimization 18). Of
    equal ones the first.
    """
    return _best(values, _scaled(values).sum(-1))


def chosen(values: Tensor, weights: Sequence[float]) -> int:
    """The index of the point nearest to the ideal where objectives matter by `weights`.

    With z as in `knee`, the point of the front with the least augmented Chebyshev distance
    max_k w_k (1 - z_k) + 0.001 sum_k w_k (1 - z_k) (Steuer and Choo 1983): unlike a weighted sum
    it reaches every point of a front, in its hollows too. Of equal ones the first.

    Raises UsageError unless there is one weight an objective, none negative and one positive.
    """
    w = torch.tensor(list(weights), dtype=torch.float64)
    if len(w) != values.shape[1]:
        raise UsageError(f"{len(w)} weights for {values.shape[1]} objectives; give one for each")
    if not bool((w >= 0).all()) or not 0 < float(w.sum()) < torch.inf:
        raise UsageError(f"weights of objectives are at least 0 and not all 0, not {list(weights)}")
    short = w * (1 - _scaled(values))
    return _best(values, -(short.amax(-1) + TIE * short.sum(-1)))


def _scaled(values: Tensor) -> Tensor:
    """Each objective from 0, the front's nadir, to 1, its best; 1 throughout where it is one value."""
    front = values[non_dominated(values)].double()
    spread = _range(front)
    z = (values.double() - front.amin(0)) / torch.where(spread > 0, spread, 1.0)
    return torch.where(spread > 0, z, 1.0)


def _best(values: Tensor, scores: Tensor) -> int:
    return int(torch.where(non_dominated(values), scores, -torch.inf).argmax())


def _range(values: Tensor) -> Tensor:
    return values.amax(0) - values.amin(0)
