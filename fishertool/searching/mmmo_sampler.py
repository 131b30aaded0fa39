"""MM-MO as a sampler of Optuna's: batches, the auxiliary objective, and screening."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor
from torch.quasirandom import SobolEngine

from fishertool.errors import FishertoolError
from fishertool.recipe.settings import Scalar
from fishertool.recipe.space import Variable
from fishertool.searching.encoding import decode, encode, snapped, width
from fishertool.searching.prediction import gauged, most_gained, predicted_gains
from fishertool.searching.sampling import Sampling
from fishertool.searching.study import point_of
from fishertool.searching.whole_points import WholePoints, mixed

DISTANCE, PREDICTED = "distance", "predicted_loss"
DRAWN_FOR_ONE = 4
"""Candidates for each point of the start, if losses are predicted."""

Predict = Callable[[Mapping[str, Scalar]], Sequence[float]]


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
            start = self._start()  # of few points, where there are no more
            return decode(self.variables, start[index % len(start)])
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
                drawn = _distinct(snapped(self.variables, self._drawn(DRAWN_FOR_ONE * count)))
                able, values = self._gauged(drawn)
                best = [able[i] for i in most_gained(values, count)]
                rest = [i for i in range(len(drawn)) if i not in best]
                self._first = drawn[[*best, *rest][:count]]
        return self._first

    def _batch(
        self, index: int, known: Sequence[FrozenTrial], done: Sequence[FrozenTrial]
    ) -> Tensor:
        """[batch, width]."""
        sampling = self._sampling
        if len(done) < 2:
            return self._drawn(index + sampling.batch)[index:]
        values = torch.tensor([trial.values for trial in done], dtype=torch.float64) * self._signs
        distances = None if "sparsity" in sampling.without else _distances(done)
        if distances is not None and bool((values == -distances[:, None]).all(0).any()):
            distances = None  # an objective already
        screen: Any = None if "screening" in sampling.without else "surrogate"
        if screen and self._predict is not None:
            told = [trial.user_attrs.get(PREDICTED) for trial in done]
            before = gauged(torch.tensor([one for one in told if one], dtype=torch.float64))

            def screen(candidates: Tensor) -> Tensor:
                able, after = self._gauged(candidates)
                gains = torch.full((len(candidates),), -torch.inf, dtype=torch.float64)
                if able:
                    gains[able] = predicted_gains(before, after)
                return gains

        from fishertool.searching.mmmo import propose  # loads BoTorch, which takes seconds

        others = [trial for trial in known if trial.state != TrialState.COMPLETE]
        return propose(
            self._encoded(done),
            values,
            self._encoded(others),
            sampling.batch,
            mixed(sampling.seed, index),
            distances=distances,
            snap=self._snap if any(one.choices or one.step for one in self.variables) else None,
            recombine="recombination" not in sampling.without,
            screen=screen,
        )

    def _drawn(self, count: int) -> Tensor:
        seed = mixed(self._sampling.seed, 0)
        sobol: Any = SobolEngine
        drawn: Tensor = sobol(width(self.variables), True, seed).draw(count, dtype=torch.float64)
        return drawn

    def _encoded(self, trials: Sequence[FrozenTrial]) -> Tensor:
        """Without those whose points are being chosen."""
        whole = [point for point in map(point_of, trials) if len(point) == len(self.variables)]
        rows = [encode(self.variables, point) for point in whole]
        return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), width(self.variables))

    def _snap(self, rows: Tensor) -> Tensor:
        return snapped(self.variables, rows)

    def _gauged(self, rows: Tensor) -> tuple[list[int], Tensor]:
        """Which of the points can be merged, and those [point, model] as values."""
        assert self._predict is not None
        able, predicted = [], []
        for number, row in enumerate(rows):
            with suppress(FishertoolError):
                predicted.append(self._predict(decode(self.variables, row)))
                able.append(number)
        if not able:
            return [], torch.empty(0, 1, dtype=torch.float64)
        return able, gauged(torch.tensor(predicted, dtype=torch.float64))


def _distinct(rows: Tensor) -> Tensor:
    """Without those that were there before."""
    found = list(dict.fromkeys(map(tuple, rows.tolist())))
    return torch.tensor(found, dtype=torch.float64)


def _distances(done: Sequence[FrozenTrial]) -> Tensor | None:
    """[trial]; None where the merges have no base."""
    found = [trial.user_attrs.get(DISTANCE) for trial in done]
    return None if None in found else torch.tensor(found, dtype=torch.float64)
