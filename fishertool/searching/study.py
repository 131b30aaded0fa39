"""A search as an Optuna study: who evaluates what, on a storage that several workers share.

A trial is evaluated by one worker, which says now and then that it lives. A trial whose worker is
gone is failed as *lost*, and its point is put in the queue again. What is not lost is a trial of
the search, numbered by `index_of`: were there no kill, the numbers would be the same.
"""

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from fishertool.errors import OutputExistsError, UsageError
from fishertool.recipe.space import Variable
from fishertool.searching.objectives import Objective
from fishertool.searching.storage import quiet, remove_replaced_study

BEATS_EVERY, LOST_AFTER = 15.0, 120.0
"""Seconds between signs of life of a worker, and without one until its trial is lost."""
LOST, SURPLUS = "lost", "surplus"
"""Why a trial that failed is none of the search: its worker is gone; the search was complete."""
OWNER, SEEN, WHY, RETRIES = "owner", "seen", "error", "retries"
FINGERPRINT = "fishertool"


class Search:
    """One study, and what a worker may do with it."""

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        variables: Sequence[Variable],
        objectives: Sequence[Objective],
        fingerprint: str,
        *,
        join: bool = False,
        resume: bool = False,
    ) -> None:
        """Open the study of that name: made, or with `join` and `resume` the one that is there.

        Raises UsageError where it is another search's, as its fingerprint tells, and where `join`
        finds none; OutputExistsError where one is there that was not asked for.
        """
        others = optuna.get_all_study_names(storage)
        known = name in others
        if resume and others and not known:
            raise UsageError(
                f"--resume: the search {name!r} is not on this storage; others are, as "
                f"{', '.join(others[:3])}: name it by --study"
            )
        if join and not known:
            raise UsageError(
                f"--worker: there is no search {name!r} yet; start it without --worker"
            )
        if known and not (join or resume):
            raise OutputExistsError(
                f"the search {name!r} is there already; --resume goes on with it, --worker takes part "
                "in it, --overwrite begins anew"
            )
        self.study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=[one.direction for one in objectives],
            load_if_exists=True,
        )
        self._storage = storage
        self._id = storage.get_study_id_from_name(name)
        self._space = distributions(variables)
        if not known:
            self.study.set_user_attr(FINGERPRINT, fingerprint)
            with quiet():
                self.study.set_metric_names([one.name for one in objectives])
        elif self.study.user_attrs.get(FINGERPRINT) != fingerprint:
            raise UsageError(
                f"the search {name!r} on this storage is another one: recipe, objectives, sampler, "
                "seed, or what models, sidecars or data hold, differ; choose another --out or --study"
            )

    @property
    def trials(self) -> list[FrozenTrial]:
        """All there are, lost ones too, by number."""
        return self.study.get_trials(deepcopy=False)

    def remove_replaced(self) -> None:
        """Remove the study that had this one's name before."""
        remove_replaced_study(self._storage, self.study.study_name)

    @property
    def busy(self) -> int:
        """How many trials are being evaluated, or wait to be."""
        return sum(not trial.state.is_finished() for trial in self.trials)

    @property
    def begun(self) -> bool:
        """Whether it has a result, or another process that works for it."""
        me = _process(os.getpid())
        try:
            return any(
                trial.state == TrialState.COMPLETE or trial.user_attrs.get(OWNER, me) != me
                for trial in self.trials
            )
        except (OSError, optuna.exceptions.OptunaError):  # a signal broke into the storage's work
            return True

    def take(self, evaluations: int) -> Trial | None:
        """The next of so many trials, for this process to evaluate; None if none is left to take.

        While others are `busy` one of theirs may still be lost and become free.
        """
        for trial in self.trials:
            if trial.state == TrialState.RUNNING and _is_lost(trial):
                self._free(trial)
        waits = any(trial.state == TrialState.WAITING for trial in self.trials)
        if not waits and sum(map(counts, self.trials)) >= evaluations:
            return None
        taken = self.study.ask()
        taken.set_user_attr(OWNER, _process(os.getpid()))
        taken.set_user_attr(SEEN, time.time())  # a storage's own times may be of another zone
        with signs_of_life(taken), quiet():  # to choose a point may take minutes
            for name, distribution in self._space.items():
                _suggest(taken, name, distribution)
        if index_of(taken.number, self.trials) >= evaluations:
            self._end(taken.number, SURPLUS)  # two workers asked for the last one
            return None
        return taken

    def finish(self, trial: Trial, values: Sequence[float], **found: Any) -> None:
        """Record the values of all objectives, and what else was found.

        Nothing, where this process was silent for so long that its trial was given to another.
        """
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            for name, value in found.items():
                trial.set_user_attr(name, value)
            self.study.tell(trial, list(values), skip_if_finished=True)

    def fail(self, trial: Trial, why: str) -> None:
        """Record that the evaluation failed."""
        self._end(trial.number, why)

    def release(self, trial: Trial) -> None:
        """Put the point of a trial that this process will not finish into the queue again.

        Where that fails, as where a signal broke into the storage's work, others will see that
        this process is gone.
        """
        with suppress(OSError, optuna.exceptions.OptunaError):
            self._free(self.trials[trial.number])

    def _free(self, trial: FrozenTrial) -> None:
        point = point_of(trial)
        # Without a whole one its worker had only begun to ask.
        if self._end(trial.number, LOST) and point.keys() == self._space.keys():
            self.study.enqueue_trial(point, user_attrs={RETRIES: trial.number})

    def _end(self, number: int, why: str) -> bool:
        """Fail a trial; False if another process was first, or it has ended after all."""
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._id, number)
        try:
            self._storage.set_trial_user_attr(trial_id, WHY, why)
            self.study.tell(number, state=TrialState.FAIL)
        except (ValueError, optuna.exceptions.OptunaError):
            return False
        return True


def distributions(variables: Sequence[Variable]) -> dict[str, BaseDistribution]:
    """What each variable may be, in Optuna's words."""
    return {variable.name: _distribution(variable) for variable in variables}


def index_of(number: int, trials: Sequence[FrozenTrial]) -> int:
    """How many trials of the search there are before the one of this number."""
    return sum(trial.number < number and counts(trial) for trial in trials)


def counts(trial: FrozenTrial) -> bool:
    """Whether it is a trial of the search, and not one that was lost or is surplus."""
    return trial.state != TrialState.FAIL or trial.user_attrs.get(WHY) not in (LOST, SURPLUS)


def point_of(trial: FrozenTrial) -> dict[str, Any]:
    """The values of the variables, also of a trial that waits for its worker."""
    return dict(trial.params or trial.system_attrs.get("fixed_params", {}))


@contextmanager
def signs_of_life(trial: Trial) -> Iterator[None]:
    """Say every BEATS_EVERY seconds that this process works on the trial."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEATS_EVERY):
            with suppress(optuna.exceptions.OptunaError, OSError):
                trial.set_user_attr(SEEN, time.time())

    thread = threading.Thread(target=beat, name="signs of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _is_lost(trial: FrozenTrial) -> bool:
    owner = trial.user_attrs.get(OWNER)
    if owner is not None and owner["host"] == _host():
        return bool(owner != _process(owner["pid"]))
    seen = trial.user_attrs.get(SEEN)
    if seen is None and trial.datetime_start is not None:
        seen = trial.datetime_start.timestamp()
    return bool(seen is not None and time.time() - seen > LOST_AFTER)


def _process(pid: int) -> dict[str, Any] | None:
    """A process of this machine, told from a later one of the same number by when it began."""
    begun = None
    try:
        with suppress(PermissionError):  # somebody else's, and alive
            os.kill(pid, 0)
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        if fields[0] == "Z":
            return None
        begun = int(fields[19])
    except ProcessLookupError:
        return None
    except (OSError, IndexError):  # there is no /proc
        pass
    return {"host": _host(), "pid": pid, "begun": begun}


def _host() -> list[str]:
    """The machine, and where a container counts processes by itself, that count."""
    try:
        return [socket.gethostname(), str(Path("/proc/self/ns/pid").readlink())]
    except OSError:
        return [socket.gethostname()]


def _distribution(variable: Variable) -> BaseDistribution:
    if variable.choices:
        return CategoricalDistribution(variable.choices)
    low, high, step = variable.low, variable.high, variable.step
    if step is not None:  # Optuna warns of a range that the step does not divide
        high = variable.after(variable.steps)
    if variable.whole:
        return IntDistribution(int(low), int(high), step=int(step or 1))
    return FloatDistribution(low, high, log=variable.log, step=step)


def _suggest(trial: Trial, name: str, distribution: BaseDistribution) -> None:
    """Give a variable of the trial its value."""
    if isinstance(distribution, CategoricalDistribution):
        trial.suggest_categorical(name, distribution.choices)
    elif isinstance(distribution, IntDistribution):
        trial.suggest_int(name, distribution.low, distribution.high, step=distribution.step)
    elif isinstance(distribution, FloatDistribution):
        low, high = distribution.low, distribution.high
        trial.suggest_float(name, low, high, step=distribution.step, log=distribution.log)
