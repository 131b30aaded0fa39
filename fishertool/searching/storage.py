"""Where the trials of searches are: a journal beside the results, or a database that others use too."""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from fishertool.errors import FishertoolError, InputError, StorageError
from fishertool.searching.results import JOURNAL

REPLACED = " (replaced)"
"""Follows the name of a study that another one has now."""


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """A journal file in the folder, or the database of a URL. Raises StorageError if it cannot be,
    and InputError for a journal with a line that is none."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    where = "--storage" if url is not None else str(folder / JOURNAL)
    try:
        with quiet():
            return _journal(folder / JOURNAL) if url is None else optuna.storages.get_storage(url)
    except (OSError, FishertoolError):
        raise
    except Exception as error:  # whatever the database's driver raises
        reason = " ".join(str(error).split())[:200]
        raise StorageError(f"{where}: cannot be opened: {reason}") from error


def _journal(path: Path) -> BaseStorage:
    """The journal there, which is made. A last line that a full disk or a loss of power has left
    without its end is cut away: with what is written after it, it would be no line of a journal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and not _whole(path.read_bytes()):
        lock = JournalFileSymlinkLock(str(path))
        lock.acquire()  # a worker that writes the line has it
        try:
            with path.open("rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
        finally:
            lock.release()
    if path.is_file():
        _check_lines(path)
    return JournalStorage(JournalFileBackend(str(path)))


def _check_lines(path: Path) -> None:
    """Optuna lets a last line that is no JSON pass, and fails when it has written more after it."""
    *lines, _ = path.read_bytes().split(b"\n")  # a worker may be writing the rest
    for number, line in enumerate(lines, 1):
        try:
            whole = isinstance(json.loads(line), dict)
        except ValueError:
            whole = False
        if not whole:
            raise InputError(
                f"{path}: line {number}: is no line of a journal; remove it and what comes after it, "
                "or begin anew with --overwrite"
            )


def _whole(journal: bytes) -> bool:
    return not journal or journal.endswith(b"\n")


def _rename(storage: BaseStorage, name: str, other: str) -> None:
    """Give a study, if it is there, another name, by which there is then no other one."""
    if name in optuna.get_all_study_names(storage):
        _remove(storage, other)
        optuna.copy_study(
            from_study_name=name, from_storage=storage, to_storage=storage, to_study_name=other
        )
        _remove(storage, name)


def remove_replaced_study(storage: BaseStorage, name: str) -> None:
    """Remove the study that had this name before, if there is one."""
    _remove(storage, name + REPLACED)


def _remove(storage: BaseStorage, name: str) -> None:
    if name in optuna.get_all_study_names(storage):
        optuna.delete_study(study_name=name, storage=storage)


@contextmanager
def old_study_kept(storage: BaseStorage, name: str, begun: Callable[[], bool]) -> Iterator[None]:
    """Let the study of that name have another one, until `remove_replaced_study`. Where the block
    raises and the new search has not `begun`, it gets its name back."""
    _rename(storage, name, name + REPLACED)
    try:
        yield
    except BaseException:
        if not begun():
            _rename(storage, name + REPLACED, name)
        raise


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's words on features that are experimental, which mean nothing to a user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
