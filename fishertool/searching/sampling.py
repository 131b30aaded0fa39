"""How the points of a search are chosen, as the command line says it."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fishertool.errors import UsageError
from fishertool.recipe.settings import Scalar
from fishertool.recipe.space import Variable
from fishertool.registry import suggest
from fishertool.searching.encoding import decode

SAMPLERS = ("mmmo", "mmmo-weights", "gp", "tpe", "nsga2", "random", "grid")
PARTS = ("recombination", "screening", "sparsity")
STARTUP, BATCH = 10, 1


@dataclass(frozen=True)
class Sampling:
    """How points are chosen."""

    sampler: str
    seed: int
    evaluations: int
    startup: int
    """Trials before a model of the objectives is made."""
    batch: int
    """Trials that are chosen together, mmmo."""
    without: tuple[str, ...]
    """Parts of mmmo that are left out."""

    @property
    def identity(self) -> list[Any]:
        """What makes another search of it; a search may go on for more evaluations."""
        of_grid = self.evaluations if self.sampler == "grid" else None
        return [self.sampler, self.seed, self.startup, self.batch, sorted(self.without), of_grid]


def check_sampling(
    sampler: str, seed: int, evaluations: int, startup: int, batch: int, without: Sequence[str]
) -> Sampling:
    """Raises UsageError for a sampler that there is not, and for what it has no use for."""
    if sampler not in SAMPLERS:
        raise UsageError(f"--sampler {suggest(sampler, SAMPLERS)}")
    for part in without:
        if part not in PARTS:
            raise UsageError(f"--without {suggest(part, PARTS)}")
    is_mmmo = sampler.startswith("mmmo")
    if without and not is_mmmo:
        raise UsageError(f"--without leaves out parts of mmmo; {sampler} has none")
    if batch != BATCH and not is_mmmo:
        raise UsageError(f"--batch is for mmmo, which chooses several at once, not for {sampler}")
    if startup != STARTUP and sampler in ("random", "grid"):
        raise UsageError(f"--startup is for samplers that learn from it, not for {sampler}")
    return Sampling(sampler, seed, evaluations, startup, batch, tuple(without))


def grid(variables: Sequence[Variable], evaluations: int) -> list[dict[str, Scalar]]:
    """All combinations of evenly spaced values, of as many each as `evaluations` suffice for.

    Raises UsageError where they do not suffice for two of each.
    """

    def count(values: int) -> int:
        return math.prod(len(_values(variable, values)) for variable in variables)

    if (fewest := count(2)) > evaluations:
        raise UsageError(
            f"--sampler grid: two values of each of {len(variables)} variables are {fewest:,} merges; "
            f"--evaluations allows {evaluations}"
        )
    values = 2
    while count(values) < count(values + 1) <= evaluations:
        values += 1
    names = [variable.name for variable in variables]
    columns = [_values(variable, values) for variable in variables]
    return [dict(zip(names, row, strict=True)) for row in itertools.product(*columns)]


def _values(variable: Variable, count: int) -> list[Scalar]:
    """Evenly spaced from low to high; all choices."""
    if variable.choices:
        return list(variable.choices)
    places = torch.linspace(0, 1, count, dtype=torch.float64)
    found = [decode([variable], place[None])[variable.name] for place in places]
    return list(dict.fromkeys(found))
