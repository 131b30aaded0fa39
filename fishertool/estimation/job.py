"""What an estimate does with a loaded model and its settings: the work, the job, one worker's pass."""

from collections.abc import Callable, Sequence
from typing import cast

from fishertool.estimation.partial import Job
from fishertool.estimation.settings import Settings
from fishertool.estimation.subject import LoadedSubject
from fishertool.estimation.work import Unit, Work, divide
from fishertool.estimation.worker import Worker
from fishertool.fisher.estimate import Estimator, Pass, estimate
from fishertool.progress import Advance


def divided(loaded: LoadedSubject, settings: Settings) -> Work:
    """In random order where the run may stop before it has seen everything."""
    examples = loaded.texts.examples
    return divide(
        [example.size for example in examples],
        [len(example.texts) for example in examples],
        size=settings.examples_a_batch,
        group=settings.group,
        shuffle_by=None if settings.until_relative_error is None else loaded.subject.data.seed,
    )


def job_of(loaded: LoadedSubject, settings: Settings, work: Work, workers: int = 1) -> Job:
    about = {"labels": loaded.labels, "seed": loaded.subject.data.seed}
    return Job(
        header=loaded.header(settings),
        kinds=settings.kinds,
        shapes={name: list(value.shape) for name, value in loaded.parameters.items()},
        wanted=loaded.subject.wanted,
        bank_dtype=settings.bank_dtype,
        workers=workers,
        units=len(work.units),
        batches_sha256=work.sha256(),
        calibration=loaded.texts.describe() | about,
        labelled=loaded.texts.labelled,
    )


def run(
    loaded: LoadedSubject,
    settings: Settings,
    worker: Worker,
    units: Sequence[Unit],
    advance: Advance,
    *,
    shards: int = 1,
    after: Callable[[Pass], bool] = lambda done: False,
) -> None:
    """Do these units of the worker's share."""
    estimate(
        loaded.module,
        loaded.parameters,
        loaded.batch,
        units,
        worker.gathering.statistics,
        probe=loaded.probe,
        longer=loaded.longer,
        inputs=worker.gathering.inputs,
        labels=loaded.labels,
        draws=settings.draws,
        seed=loaded.subject.data.seed,
        estimator=cast(Estimator, settings.estimator),
        shards=shards,
        skip_nonfinite=settings.skip_nonfinite,
        done=worker.done,
        after=after,
        advance=advance,
    )
