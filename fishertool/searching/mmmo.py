"""MM-MO: multi-objective Bayesian search with recombination and screening.

Li et al. 2024, "It's Morphing Time: Unleashing the Potential of Multiple LLMs via
Multi-objective Optimization" (arXiv 2407.00487).
"""

from collections.abc import Callable
from threading import Lock
from typing import Literal

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from fishertool.errors import UsageError
from fishertool.searching.acquisition import expected_gain, maximum, worth
from fishertool.searching.pareto import reference_of, strongest
from fishertool.searching.recombination import recombine as offspring_of
from fishertool.searching.screening import fisher_information
from fishertool.searching.surrogate import fit, standardized

POOL = 10
STRONG = 5
OFFSPRING = 32
DRAWS = 256

_ONE_AT_A_TIME = Lock()  # BoTorch's settings and Python's warning filters are the process's

Screen = Literal["surrogate"] | Callable[[Tensor], Tensor] | None


def propose(
    points: Tensor,
    values: Tensor,
    pending: Tensor,
    count: int,
    seed: int,
    *,
    pool: int = POOL,
    recombine: bool = True,
    screen: Screen = "surrogate",
) -> Tensor:
    """The next `count` points to evaluate, [count, dimension] in the unit cube, all new.

    points   those evaluated, [n, dimension]; values [n, objective], maximised, n at least 2
    pending  those under evaluation, [p, dimension], p may be 0: they are counted on

    Candidates are found one after another, each where a Gaussian process an objective expects
    most more hypervolume given those before it (qLogNEHVI). Then, as in the paper:

    recombine  a candidate is crossed with the five strongest evaluated points by differential
               evolution. It has 32 offspring, and the one expected to gain most takes its place;
               the paper's has one, whatever that is worth.
    screen     `pool` candidates are found in place of `count`, and those with the least Fisher
               information of the surrogate's are kept, the least known; or, by a function
               [pool, dimension] -> [pool], those that it scores highest. None: all are kept.

    With both off this is plain Bayesian search. The values are standardized before anything else
    and the hypervolume's reference point is `reference_of` them; the paper's code has a fixed one
    in the values' own units.

    The same arguments give the same points, in any thread. Raises UsageError if the pool is
    smaller than `count`, or `count` than 1.
    """
    if count < 1 or (screen is not None and pool < count):
        raise UsageError(f"a pool of {pool} candidates for {count} points; it holds at least those")
    with _ONE_AT_A_TIME:
        return _propose(
            points.double(),
            standardized(values.double()),
            pending.double(),
            count,
            torch.Generator().manual_seed(seed),
            pool=count if screen is None else pool,
            recombine=recombine,
            screen=screen,
        )


def _propose(
    points: Tensor,
    values: Tensor,
    pending: Tensor,
    count: int,
    generator: torch.Generator,
    *,
    pool: int,
    recombine: bool,
    screen: Screen,
) -> Tensor:
    varying = (values != 0).any(0)
    seen = values[:, varying] if bool(varying.any()) else values
    model = fit(points, seen)
    strong = points[strongest(seen, STRONG)]
    reference = reference_of(seen)
    found = pending
    for _ in range(pool):
        seeds = torch.randint(2**31, (2,), generator=generator).tolist()
        sobol = SobolEngine(points.shape[1], scramble=True, seed=seeds[0])  # type: ignore[no-untyped-call]
        drawn = sobol.draw(DRAWS, dtype=torch.float64)
        gain = expected_gain(model, points, seen, found, reference, seeds[1])
        taken = torch.cat([points, found])
        best = maximum(gain, drawn, taken)
        if recombine:
            offspring = offspring_of(best.expand(OFFSPRING, -1), strong, generator)
            gains = worth(gain, offspring, taken)
            if float(gains.max()) > -torch.inf:  # else every one is taken
                best = offspring[gains.argmax()][None]
        found = torch.cat([found, best])
    candidates = found[len(pending) :]
    if screen is None:
        return candidates
    scores = -fisher_information(model, candidates) if screen == "surrogate" else screen(candidates)
    return candidates[scores.argsort(descending=True, stable=True)[:count].sort().values]
