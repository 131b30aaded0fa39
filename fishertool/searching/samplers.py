"""What is tried next: each way to choose, as a sampler of Optuna's.

A sampler here has no memory of its own. What it proposes for a trial follows from the trial's index,
the trials that came before, and the seed: a search that was killed goes on as if it had not been.
"""

from collections.abc import Callable, Sequence
from typing import Any

import optuna
import torch
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from fishertool.recipe.space import Variable
from fishertool.searching.mmmo_sampler import MmmoSampler, Predict
from fishertool.searching.sampling import Sampling, grid
from fishertool.searching.study import index_of
from fishertool.searching.whole_points import WholePoints, mixed


def make_sampler(
    sampling: Sampling, variables: Sequence[Variable], signs: Sequence[int], predict: Predict
) -> BaseSampler:
    """The sampler of that name; `signs` make larger values of the objectives better.

    `predict` gives the models' predicted losses at a point: mmmo-weights screens by them.
    """
    name = sampling.sampler
    if name.startswith("mmmo"):
        weights = predict if name == "mmmo-weights" else None
        return MmmoSampler(sampling, variables, signs, weights)
    if name == "grid":
        return GridSampler(variables, sampling.evaluations, sampling.seed)
    make = {
        "gp": lambda seed: optuna.samplers.GPSampler(seed=seed, n_startup_trials=sampling.startup),
        "tpe": lambda seed: optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=sampling.startup
        ),
        "nsga2": lambda seed: optuna.samplers.NSGAIISampler(
            seed=seed, population_size=max(2, sampling.startup)
        ),
        "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    }[name]
    return SeededSampler(make, sampling.seed)


class SeededSampler(BaseSampler):
    """A sampler of Optuna's, made anew for every trial with a seed of the trial's index."""

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self._make, self._seed = make, seed
        self._made: tuple[int, BaseSampler] | None = None

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._of(study, trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._of(study, trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        sampler = self._of(study, trial)
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._of(study, trial).before_trial(study, trial)

    def after_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        self._of(study, trial).after_trial(study, trial, state, values)

    def _of(self, study: Study, trial: FrozenTrial) -> BaseSampler:
        if self._made is None or self._made[0] != trial.number:
            index = index_of(trial.number, study.get_trials(deepcopy=False))
            self._made = trial.number, self._make(mixed(self._seed, index))
        return self._made[1]


class GridSampler(WholePoints):
    """The points of a grid, in a mixed order."""

    def __init__(self, variables: Sequence[Variable], evaluations: int, seed: int) -> None:
        super().__init__(variables)
        self._points = grid(variables, evaluations)
        order = torch.randperm(len(self._points), generator=torch.Generator().manual_seed(seed))
        self._order: list[int] = order.tolist()

    def point(self, index: int, before: Sequence[FrozenTrial]) -> dict[str, Any]:
        return self._points[self._order[index % len(self._order)]]
