"""Samplers of Optuna's that give a value to all variables at once."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from fishertool.recipe.space import Variable
from fishertool.searching.study import counts, distributions


def mixed(seed: int, index: int) -> int:
    """A seed for each index, of 31 bits."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0]) >> 1


class WholePoints(BaseSampler):
    """A sampler that gives a value to all variables at once, by `point`."""

    def __init__(self, variables: Sequence[Variable]) -> None:
        self.variables = tuple(variables)

    @abstractmethod
    def point(self, index: int, before: Sequence[FrozenTrial]) -> dict[str, Any]:
        """The point of the trial of this index; `before`: the search's trials of lower index."""

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return distributions(self.variables)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        trials = study.get_trials(deepcopy=False)
        if "fixed_params" in trial.system_attrs:
            return {}
        before = [one for one in trials if one.number < trial.number and counts(one)]
        return self.point(len(before), before)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        raise RuntimeError(f"{param_name} was not sampled with the others")
