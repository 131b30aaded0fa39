"""MM-MO: multi-objective Bayesian search with recombination and screening.

Zhang et al. 2024, "It's Morphing Time: Unleashing the Potential of Multiple LLMs via
Multi-objective Optimization" (arXiv 2407.00487).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from fishertool.errors import UsageError
from fishertool.searching.acquisition import expected_gain, maximum
from fishertool.searching.recombination import recombine as offspring_of
from fishertool.searching.recombination import strongest
from fishertool.searching.screening import fisher_information
from fishertool.searching.surrogate import fit, standardized

POOL = 10
DRAWS = 512

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
    """The next `count` points to evaluate: [count, dimension], in the unit cube, all new."""
    if count < 1 or (screen is not None and pool < count):
        raise UsageError(f"a pool of {pool} candidates for {count} points; it holds at least those")
    points, values, pending = points.double(), standardized(values.double()), pending.double()
    generator = torch.Generator().manual_seed(seed)
    varying = (values != 0).any(0)
    seen = values[:, varying] if bool(varying.any()) else values
    model = fit(points, seen)
    strong = points[strongest(values)]
    found = pending
    for _ in range(count if screen is None else pool):
        seeds = torch.randint(2**31, (2,), generator=generator).tolist()
        drawn = SobolEngine(points.shape[1], scramble=True, seed=seeds[0]).draw(
            DRAWS, dtype=torch.float64
        )
        if recombine:
            drawn = torch.cat([drawn, offspring_of(drawn, strong, generator)])
        gain = expected_gain(model, points, seen, found, seeds[1])
        found = torch.cat([found, maximum(gain, drawn, torch.cat([points, found]))])
    candidates = found[len(pending) :]
    if screen is None:
        return candidates
    scores = -fisher_information(model, candidates) if screen == "surrogate" else screen(candidates)
    return candidates[scores.argsort(descending=True, stable=True)[:count].sort().values]
