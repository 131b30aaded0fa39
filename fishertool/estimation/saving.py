"""A worker's sums on disk now and then, so that a killed run goes on where it last saved."""

from collections.abc import Sequence
from pathlib import Path

from fishertool.checkpoint.staging import resumable
from fishertool.errors import InputError, OutputExistsError
from fishertool.estimation.bank import Bank, members_of
from fishertool.estimation.partial import difference, open_partial, write_partial
from fishertool.estimation.work import Unit
from fishertool.estimation.worker import Worker
from fishertool.fisher.sums import flattened

SAVED = "worker-*.safetensors"


class Saver:
    """Saves a worker every so many examples, and finds what was saved."""

    def __init__(self, folder: Path, worker: Worker, every: int | None, bank: Bank | None):
        self._folder = folder
        self._worker = worker
        self._every = every
        self._bank = bank
        self._stem = f"worker-{worker.number}"
        self._at = 0

    def resume(self, units: Sequence[Unit]) -> None:
        """Take up what an earlier run saved of these units, if anything.

        Raises InputError if that run was another: other data, options or model.
        """
        if not (self._folder / f"{self._stem}.safetensors").exists():
            return
        tensors, saved = open_partial(self._folder, self._stem)
        with tensors:
            if (what := difference(saved.job, self._worker.job)) is not None:
                raise InputError(
                    f"{self._folder}: was begun with another {what}; give the options it was "
                    "begun with, or start again with --overwrite"
                )
            self._worker.take(saved.progress, tensors)
        self._worker.units = saved.progress.units
        self._at = self._worker.done.examples
        if self._bank is not None:
            done = units[: saved.progress.units]
            self._bank.count_written(members_of(done, self._worker.job.header.group))

    def after_unit(self) -> None:
        self._worker.units += 1
        examples = self._worker.done.examples
        if self._every is None or examples - self._at < self._every:
            return
        self._at = examples
        if self._bank is not None:
            self._bank.sync()  # a member that is said to be there must be
        new = f"{self._stem}.new"
        write_partial(self._folder, self._worker.partial(), flattened(self._worker.groups), new)
        path = self._folder / f"{new}.safetensors"
        path.replace(self._folder / f"{self._stem}.safetensors")

    def discard(self) -> None:
        """The output is whole; what was saved on the way is not part of it."""
        for path in self._folder.glob(SAVED):
            path.unlink()


def check_nothing_saved(out: Path, resume: bool, overwrite: bool) -> None:
    """Refuse to begin anew where an interrupted run could be resumed, unless told to."""
    folder = resumable(out)
    if _saved(folder) and not resume and not overwrite:
        raise OutputExistsError(
            f"{folder}: an interrupted run is there; --resume goes on with it, "
            "--overwrite starts again"
        )


def tidy(folder: Path, resume: bool) -> None:
    """Remove what a killed run left half-written; to `resume`, what it saved and the members of its
    bank stay."""
    kept = set(_saved(folder)) if resume else set()
    if kept:
        kept |= set(folder.glob("rank-one*.safetensors"))
    for path in folder.iterdir():
        if path not in kept:
            path.unlink()


def _saved(folder: Path) -> list[Path]:
    """Whole ones: a file that was being written when its process died has another name."""
    return [path for path in folder.glob(SAVED) if not path.stem.endswith(".new")]
