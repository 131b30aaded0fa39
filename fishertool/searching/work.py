"""What a worker does: take a trial, merge, measure, tell; until none is left."""

import time
from collections.abc import Callable

from optuna.trial import Trial, TrialState

from fishertool.errors import InputError, UsageError
from fishertool.progress import Advance
from fishertool.searching.evaluator import Evaluation, Evaluator
from fishertool.searching.study import Search, counts, signs_of_life

POLL = 0.5
"""Seconds between looks at what other workers do."""
KEPT = ("distance", "predicted_loss", "seconds")
"""What is told of a trial beside its values."""


def work(
    search: Search,
    evaluator: Evaluator,
    evaluations: int,
    advance: Advance,
    *,
    wait: bool,
    hopeless_after: int,
) -> None:
    """Evaluate trials until so many are taken; with `wait`, until those of other workers end too.

    A merge that fails is recorded and the search goes on. Raises InputError where so many trials
    were made and none succeeded.
    """
    seen = 0
    while True:
        ended = sum(counts(trial) and trial.state.is_finished() for trial in search.trials)
        advance(ended - seen)
        seen = ended
        _check_hope(search, min(hopeless_after, evaluations))
        trial = search.take(evaluations)
        if trial is not None:
            _evaluate(search, trial, evaluator.evaluate)
        elif wait and search.busy:
            time.sleep(POLL)
        else:
            return


def _evaluate(search: Search, trial: Trial, evaluate: Callable[..., Evaluation]) -> None:
    same = next(
        (
            other
            for other in search.trials
            if other.state == TrialState.COMPLETE and other.params == trial.params
        ),
        None,
    )
    if same is not None:  # the same merge would be made again
        search.finish(trial, same.values, **{k: same.user_attrs.get(k) for k in KEPT})
        return
    begun = time.monotonic()
    try:
        with signs_of_life(trial):
            found = evaluate(trial.params)
    except (InputError, UsageError) as error:
        search.fail(trial, str(error))
    except BaseException:  # Ctrl-C, a full disk: nothing is wrong with the point
        search.release(trial)
        raise
    else:
        search.finish(
            trial,
            found.values,
            distance=found.distance,
            predicted_loss=found.predicted_loss,
            seconds=round(time.monotonic() - begun, 3),
        )


def _check_hope(search: Search, trials: int) -> None:
    failed = [trial for trial in search.trials if counts(trial) and trial.state == TrialState.FAIL]
    if len(failed) < trials or any(one.state == TrialState.COMPLETE for one in search.trials):
        return
    raise InputError(
        f"none of {len(failed)} merges could be measured; the first: "
        f"{failed[0].user_attrs.get('error')}"
    )
