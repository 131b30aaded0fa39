"""Which examples of a pool to take: at random, or one near each centre of k-means."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fishertool.calibration.data import DataOptions
from fishertool.errors import UsageError

WAYS = ("random", "kmeans")
ITERATIONS = 20
ROWS = 4096
"""Vectors whose distances to all centres are in memory at a time."""


@dataclass(frozen=True)
class Clusters:
    centres: Tensor
    """[cluster, feature], float64."""
    members: Tensor
    """[vector]: which cluster each is in; none is empty."""
    distances: Tensor
    """[vector]: squared, to its own centre, float64."""
    iterations: int

    @property
    def inertia(self) -> float:
        return float(self.distances.sum())

    def nearest(self) -> list[int]:
        """Of each cluster the vector nearest to its centre, in the order of the vectors."""
        chosen: dict[int, int] = {}
        for vector in self.distances.argsort(stable=True).tolist():
            chosen.setdefault(int(self.members[vector]), vector)
        return sorted(chosen.values())


def check_choice(options: DataOptions) -> None:
    """Raises UsageError for an unknown way to select, and for what it needs."""
    if options.select is None:
        if options.select_from is not None:
            raise UsageError("--select-from is the pool of --select; give --select kmeans")
        return
    if options.select not in WAYS:
        raise UsageError(f"--select {options.select!r}: is one of {', '.join(WAYS)}")
    if options.num_examples is None:
        raise UsageError(f"--select {options.select}: give --num-examples, how many to take")
    if options.select_from is not None and options.select_from < options.num_examples:
        raise UsageError(
            f"--select-from {options.select_from}: is a pool to take --num-examples "
            f"{options.num_examples} from; make it larger"
        )


def at_random(pool: int, count: int, generator: torch.Generator) -> list[int]:
    """`count` of the numbers below `pool`, in order."""
    return sorted(torch.randperm(pool, generator=generator)[:count].tolist())


def kmeans(
    vectors: Tensor, count: int, generator: torch.Generator, iterations: int = ITERATIONS
) -> Clusters:
    """`count` clusters of vectors [vector, feature], by squared distance; Lloyd from k-means++.

    Stops when no vector changes its cluster. A cluster that loses its last vector takes the one
    that is farthest from its centre elsewhere. Sources: Lloyd 1982; Arthur and Vassilvitskii 2007.
    """
    if not 0 < count <= len(vectors):
        raise ValueError(f"{count} clusters of {len(vectors)} vectors")
    centres = _spread(vectors, count, generator)
    members, distances = _assigned(vectors, centres)
    for done in range(iterations):
        centres = _means(vectors, members, count)
        before = members
        members, distances = _assigned(vectors, centres)
        if torch.equal(members, before):
            return Clusters(centres, members, distances, done + 1)
    return Clusters(centres, members, distances, iterations)


def _spread(vectors: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++: each centre is a vector drawn by its squared distance to those before it."""
    weights = torch.ones(len(vectors), dtype=torch.float64)
    chosen: list[int] = []
    for _ in range(count):
        if not weights.any():  # all others are copies of those chosen
            weights = torch.ones_like(weights)
            weights[chosen] = 0
        cumulative = weights.cumsum(0)
        point = torch.rand(1, dtype=torch.float64, generator=generator) * cumulative[-1]
        place = int(torch.searchsorted(cumulative, point, right=True))
        chosen.append(min(place, int(weights.nonzero()[-1])))
        nearest = _distances(vectors, vectors[chosen[-1:]].double()).squeeze(1)
        weights = nearest if len(chosen) == 1 else torch.minimum(weights, nearest)
        weights[chosen[-1]] = 0
    return vectors[chosen].double()


def _distances(vectors: Tensor, centres: Tensor) -> Tensor:
    """Squared, [vector, cluster], float64."""
    rows = vectors.double()
    squares = rows.square().sum(1, keepdim=True) + centres.square().sum(1)
    return (squares - 2 * rows @ centres.T).clamp_(min=0)


def _assigned(vectors: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of each vector, and its squared distance; no centre is left without."""
    found = [_distances(rows, centres).min(1) for rows in torch.split(vectors, ROWS)]
    members = torch.cat([one.indices for one in found])
    distances = torch.cat([one.values for one in found])
    sizes = members.bincount(minlength=len(centres))
    farthest = iter(distances.argsort(descending=True, stable=True).tolist())
    for cluster in (sizes == 0).nonzero().flatten().tolist():
        vector = next(one for one in farthest if sizes[members[one]] > 1)
        sizes[members[vector]] -= 1
        members[vector], sizes[cluster] = cluster, 1
        distances[vector] = (vectors[vector].double() - centres[cluster]).square().sum()
    return members, distances


def _means(vectors: Tensor, members: Tensor, count: int) -> Tensor:
    sums = torch.zeros(count, vectors.shape[1], dtype=torch.float64)
    for rows, clusters in zip(torch.split(vectors, ROWS), torch.split(members, ROWS), strict=True):
        sums.index_add_(0, clusters, rows.double())
    return sums / members.bincount(minlength=count).unsqueeze(1)
