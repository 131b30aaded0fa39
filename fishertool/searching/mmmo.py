"""MM-MO: multi-objective Bayesian search with recombination and screening.

Li et al. 2024, "It's Morphing Time: Unleashing the Potential of Multiple LLMs via
Multi-objective Optimization" (arXiv 2407.00487).
"""

from collections.abc import Callable
from math import log
from threading import Lock
from typing import Literal

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from fishertool.searching.acquisition import are_new, expected_gain, maximum, worth
from fishertool.searching.pareto import reference_of, strongest
from fishertool.searching.recombination import neighbours
from fishertool.searching.recombination import recombine as offspring_of
from fishertool.searching.screening import fisher_information
from fishertool.searching.surrogate import fit, standardized

POOL = 2
"""Candidates for each that is kept; the paper's are 10 for 5."""
STRONG = 5
OFFSPRING = 32
DRAWS = 256
NEIGHBOURS = 16
"""Starts of the climb beside each strong point. From points drawn anywhere it ends in corners."""
COMPARABLE = 0.5
"""Share of the expected gain of the best `count` that a candidate needs to be screened by how
little is known of it."""
SPOILT = 0.05
"""Share of the evaluations that may be so bad that they do not count."""

_ONE_AT_A_TIME = Lock()  # BoTorch's settings and Python's warning filters are the process's

Screen = Literal["surrogate"] | Callable[[Tensor], Tensor] | None


def propose(
    points: Tensor,
    values: Tensor,
    pending: Tensor,
    count: int,
    seed: int,
    *,
    distances: Tensor | None = None,
    snap: Callable[[Tensor], Tensor] | None = None,
    recombine: bool = True,
    screen: Screen = "surrogate",
) -> Tensor:
    """The next `count` points to evaluate, [count, dimension] in the unit cube, all new.

    points     those evaluated, [n, dimension]; values [n, objective], maximised, n at least 2
    pending    those under evaluation, [p, dimension], p may be 0: they are counted on
    distances  of those evaluated from the base, [n]: one more objective, minimised
    snap       [n, dimension] -> the nearest points that there are, where not all of the cube's are

    Candidates are found one after another, each where a Gaussian process an objective expects
    most more hypervolume given those before it (qLogNEHVI). Then, as in the paper:

    recombine  a candidate is crossed with the five strongest evaluated points by differential
               evolution. It has 32 offspring, and the one expected to gain most takes its place;
               the paper's has one, whatever that is worth.
    screen     twice `count` candidates are found, and of those expected to gain half as much as
               the `count` best, or more, the ones with the least Fisher information of the
               surrogate's are kept, the least known; or, by a function [candidate, dimension] ->
               [candidate], of all those that it scores highest. None: `count` are found and kept.

    With both off and no distances this is plain Bayesian search. The values are standardized
    before anything else, and the hypervolume is counted from `search_reference` of them; the
    paper's code counts it from a fixed point in the values' own units. Distances have no part in
    that, nor in who is strong: the base is nearest to itself, and no merge to look for.

    The same arguments give the same points, in any thread.
    """
    with _ONE_AT_A_TIME:
        return _propose(
            points.double(),
            standardized(values.double()),
            None if distances is None else standardized(-distances.double()[:, None]),
            pending.double(),
            count,
            torch.Generator().manual_seed(seed),
            snap=snap or (lambda points: points),
            recombine=recombine,
            screen=screen,
        )


def search_reference(values: Tensor) -> Tensor:
    """What a search counts the hypervolume of more points from: [objective].

    In each objective the worse of `reference_of` the values and their lower twentieth. A point that
    dominates nearly all others makes the front a corner; counted from the front's nadir, nothing
    away from it would gain.
    """
    return torch.minimum(reference_of(values), values.quantile(SPOILT, 0, interpolation="higher"))


def _propose(
    points: Tensor,
    values: Tensor,
    nearness: Tensor | None,
    pending: Tensor,
    count: int,
    generator: torch.Generator,
    *,
    snap: Callable[[Tensor], Tensor],
    recombine: bool,
    screen: Screen,
) -> Tensor:
    strong = points[strongest(values, STRONG)]
    reference = search_reference(values)
    if nearness is not None:
        values = torch.cat([values, nearness], 1)
        reference = torch.cat([reference, nearness.amin(0)])
    varying = (values != 0).any(0)
    if bool(varying.any()):
        values, reference = values[:, varying], reference[varying]
    model = fit(points, values)
    found = pending
    for _ in range(count if screen is None else POOL * count):
        seeds = torch.randint(2**31, (2,), generator=generator).tolist()
        sobol = SobolEngine(points.shape[1], scramble=True, seed=seeds[0])  # type: ignore[no-untyped-call]
        anywhere = sobol.draw(DRAWS, dtype=torch.float64)
        drawn = snap(torch.cat([anywhere, neighbours(strong, NEIGHBOURS, generator)]))
        gain = expected_gain(model, points, values, found, reference, seeds[1])
        taken = torch.cat([points, found])
        best = maximum(gain, drawn, taken, snap)
        if len(found) >= len(pending) + count and not bool(are_new(best, taken)):
            break  # there are no more
        if recombine:
            offspring = snap(offspring_of(best.expand(OFFSPRING, -1), strong, generator))
            gains = worth(gain, offspring, taken)
            if float(gains.max()) > -torch.inf:  # else every one is taken
                best = offspring[gains.argmax()][None]
        found = torch.cat([found, best])
    candidates = found[len(pending) :]
    if screen is None:
        return candidates
    if screen == "surrogate":
        gain = expected_gain(model, points, values, pending, reference, seeds[1])
        gains = worth(gain, candidates, points)
        least = gains.topk(min(count, len(gains))).values[-1] + log(COMPARABLE)
        scores = torch.where(gains >= least, -fisher_information(model, candidates), -torch.inf)
    else:
        scores = screen(candidates)
    return candidates[scores.argsort(descending=True, stable=True)[:count].sort().values]
