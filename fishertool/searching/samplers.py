"""What is tried next: each way to choose, as a sampler of Optuna's.

A sampler here has no memory of its own. What it proposes for a trial follows from the trial's index,
the trials that came before, and the seed: a search that was killed goes on as if it had not been.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import torch
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor
from torch.quasirandom import SobolEngine

from fishertool.errors import UsageError
from fishertool.recipe.settings import Scalar
from fishertool.recipe.space import Variable
from fishertool.registry import suggest
from fishertool.searching.encoding import decode, encode, snapped, width
from fishertool.searching.prediction import gauged, most_gained, predicted_gains
from fishertool.searching.study import counts, distributions, index_of, point_of

SAMPLERS = ("mmmo", "mmmo-weights", "gp", "tpe", "nsga2", "random", "grid")
PARTS = ("recombination", "screening", "sparsity")
STARTUP, BATCH = 10, 5
DISTANCE, PREDICTED = "distance", "predicted_loss"
DRAWN_FOR_ONE = 4
"""Points whose loss is predicted, for each one that is evaluated at first."""

Predict = Callable[[Mapping[str, Scalar]], Sequence[float]]


@dataclass(frozen=True)
class Sampling:
    """How points are chosen."""

    sampler: str
    seed: int
    evaluations: int
    startup: int = STARTUP
    """Trials before a model of the objectives is made."""
    batch: int = BATCH
    """Trials that are chosen together, mmmo."""
    without: tuple[str, ...] = ()
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


def reachable(sampling: Sampling, variables: Sequence[Variable]) -> int:
    """How many evaluations there will be: a grid may have fewer points than were asked for."""
    if sampling.sampler != "grid":
        return sampling.evaluations
    return min(sampling.evaluations, len(grid(variables, sampling.evaluations)))


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
            self._made = trial.number, self._make(_mixed(self._seed, index))
        return self._made[1]


class WholePoints(BaseSampler):
    """A sampler that gives a value to all variables at once, by `point`."""

    def __init__(self, variables: Sequence[Variable]) -> None:
        self.variables = tuple(variables)

    def point(self, index: int, before: Sequence[FrozenTrial]) -> dict[str, Any]:
        """The point of the trial of this index; `before`: the search's trials of lower index."""
        raise NotImplementedError

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


class GridSampler(WholePoints):
    """As many evenly spaced values of every variable as the evaluations allow, in a mixed order."""

    def __init__(self, variables: Sequence[Variable], evaluations: int, seed: int) -> None:
        super().__init__(variables)
        self._points = grid(variables, evaluations)
        order = torch.randperm(len(self._points), generator=torch.Generator().manual_seed(seed))
        self._order: list[int] = order.tolist()

    def point(self, index: int, before: Sequence[FrozenTrial]) -> dict[str, Any]:
        return self._points[self._order[index % len(self._order)]]


def grid(variables: Sequence[Variable], evaluations: int) -> list[dict[str, Scalar]]:
    """All combinations of evenly spaced values: of so many that `evaluations` suffice, but of two."""
    numbers = [variable for variable in variables if not variable.choices]
    fewest = [variable.steps + 1 if variable.step else evaluations for variable in numbers]

    def combinations(values: int) -> list[dict[str, Scalar]]:
        columns: list[list[Scalar]] = []
        for variable in variables:
            if variable.choices:
                columns.append(list(variable.choices))
            else:
                places = torch.linspace(0, 1, values, dtype=torch.float64)
                found = [decode([variable], place[None])[variable.name] for place in places]
                columns.append(list(dict.fromkeys(found)))
        names = [variable.name for variable in variables]
        return [dict(zip(names, row, strict=True)) for row in itertools.product(*columns)]

    values = 2
    while values < max(fewest, default=2) and len(combinations(values + 1)) <= evaluations:
        values += 1
    return combinations(values)


class MmmoSampler(WholePoints):
    """`mmmo.propose`, in batches, after a start spread over the space.

    With `predict` the start, and of every batch's candidates those that are evaluated, are those
    that gain most in the models' predicted losses: screening by the Fisher of the weights in the
    place of the surrogate's.
    """

    def __init__(
        self,
        sampling: Sampling,
        variables: Sequence[Variable],
        signs: Sequence[int],
        predict: Predict | None,
    ) -> None:
        super().__init__(variables)
        self._sampling, self._predict = sampling, predict
        self._signs = torch.tensor(signs, dtype=torch.float64)
        self._first: Tensor | None = None
        self._latest: tuple[object, Tensor] = None, torch.empty(0)

    def point(self, index: int, before: Sequence[FrozenTrial]) -> dict[str, Any]:
        sampling = self._sampling
        if index < sampling.startup:
            return decode(self.variables, self._start()[index])
        place = (index - sampling.startup) % sampling.batch
        known = before[: index - place]
        done = [trial for trial in known if trial.state == TrialState.COMPLETE]
        key = index - place, [trial.number for trial in done]
        if self._latest[0] != key:
            self._latest = key, self._batch(index - place, known, done)
        return decode(self.variables, self._latest[1][place])

    def _start(self) -> Tensor:
        """[startup, width]."""
        if self._first is None:
            count = self._sampling.startup
            if self._predict is None:
                self._first = self._drawn(count)
            else:
                drawn = snapped(self.variables, self._drawn(DRAWN_FOR_ONE * count))
                self._first = drawn[most_gained(self._gauged(drawn), count)]
        return self._first

    def _batch(
        self, index: int, known: Sequence[FrozenTrial], done: Sequence[FrozenTrial]
    ) -> Tensor:
        """[batch, width]."""
        sampling = self._sampling
        if len(done) < 2:
            return self._drawn(sampling.startup + sampling.evaluations)[-sampling.batch :]
        values = torch.tensor([trial.values for trial in done], dtype=torch.float64) * self._signs
        distances = [trial.user_attrs.get(DISTANCE) for trial in done]
        if "sparsity" not in sampling.without and None not in distances:
            further = -torch.tensor(distances, dtype=torch.float64)
            values = torch.cat([values, further[:, None]], 1)
        screen: Any = None if "screening" in sampling.without else "surrogate"
        if screen and self._predict is not None:
            before = self._predictions(done)

            def screen(candidates: Tensor) -> Tensor:
                return predicted_gains(before, self._gauged(snapped(self.variables, candidates)))

        from fishertool.searching.mmmo import propose  # loads BoTorch, which takes seconds

        others = [trial for trial in known if trial.state != TrialState.COMPLETE]
        return propose(
            self._encoded(done),
            values,
            self._encoded(others),
            sampling.batch,
            _mixed(sampling.seed, index),
            recombine="recombination" not in sampling.without,
            screen=screen,
        )

    def _drawn(self, count: int) -> Tensor:
        seed = _mixed(self._sampling.seed, 0)
        sobol: Any = SobolEngine
        drawn: Tensor = sobol(width(self.variables), True, seed).draw(count, dtype=torch.float64)
        return drawn

    def _encoded(self, trials: Sequence[FrozenTrial]) -> Tensor:
        rows = [encode(self.variables, point_of(trial)) for trial in trials if point_of(trial)]
        return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), width(self.variables))

    def _gauged(self, rows: Tensor) -> Tensor:
        assert self._predict is not None
        predicted = [self._predict(decode(self.variables, row)) for row in rows]
        return gauged(torch.tensor(predicted, dtype=torch.float64))

    def _predictions(self, trials: Sequence[FrozenTrial]) -> Tensor:
        known = [trial.user_attrs[PREDICTED] for trial in trials]
        return gauged(torch.tensor(known, dtype=torch.float64))


def _mixed(seed: int, index: int) -> int:
    """A seed for each index, of 31 bits."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0]) >> 1
