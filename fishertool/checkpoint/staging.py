"""An output folder that is, at every instant, absent, the old one whole, or the new one whole."""

import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fishertool.checkpoint.layout import show_size
from fishertool.errors import OutputExistsError, StorageError, UsageError

REPORT_FILE = "fishertool_report.json"
AT_FDCWD, RENAME_EXCHANGE = -100, 2


def check_output(out: Path, inputs: list[Path], overwrite: bool, needed_bytes: int) -> None:
    """Refuse, before any work, an output that exists, overlaps an input, or would not fit."""
    place = out.resolve()
    try:
        str(place).encode()
    except UnicodeEncodeError:
        raise UsageError(f"--out {str(place)!r}: is not UTF-8, as names of files must be") from None
    check_apart(out, inputs)
    if out.is_symlink() or (place.exists() and not place.is_dir()):
        raise OutputExistsError(f"{out}: exists and is not a folder; choose another name")
    if place.is_dir() and any(place.iterdir()):
        if not overwrite:
            raise OutputExistsError(f"{out}: exists; --overwrite replaces it")
        if not (place / REPORT_FILE).is_file():
            raise OutputExistsError(
                f"{out}: has no {REPORT_FILE}, so it was not written here and is not replaced; "
                "remove it yourself or choose another folder"
            )
    check_writable(f"--out {out}", place.parent)
    check_free(out, needed_bytes)


def check_writable(where: str, folder: Path) -> None:
    """Refuse a folder that could not be made, or written in."""
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise StorageError(f"{where}: {folder} is not a folder")
    if not os.access(folder, os.W_OK):
        raise StorageError(f"{where}: no permission to write in {folder}")


def check_free(out: Path, needed_bytes: int) -> None:
    """Refuse an output that would not fit on its disk."""
    if (free := free_bytes(out)) < needed_bytes:
        raise StorageError(
            f"--out {out}: needs {show_size(needed_bytes)}, {show_size(free)} are free; "
            "free some space or choose another disk"
        )


def check_apart(out: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that holds an input, a file or a folder, or lies in one."""
    place = out.resolve()
    for path in (one.resolve() for one in inputs):
        if place == path or place.is_relative_to(path) or path.is_relative_to(place):
            raise UsageError(f"--out {out}: overlaps the input {path}; choose another folder")


def free_bytes(out: Path) -> int:
    """Free bytes on the disk an output would lie on."""
    parent = out.resolve().parent
    while not parent.exists():
        parent = parent.parent
    return shutil.disk_usage(parent).free


def resumable(out: Path) -> Path:
    """Where a run that can be resumed works, until its output takes the place of `out`."""
    out = out.resolve()
    return out.parent / f".{out.name}.resumable"


@contextmanager
def staged(out: Path, overwrite: bool = True, keep: str | None = None) -> Iterator[Path]:
    """A folder beside `out` to write into; it takes the place of `out` when the block ends well.

    Without `overwrite`, an `out` that came to be in the meantime stays: OutputExistsError.
    Everything in it is fsynced first. If the block raises (Ctrl-C and SIGTERM do), it is removed.
    What a killed run left is removed by the next run for the same output. Folders get the mode
    the umask asks for.

    With `keep`, a pattern, the folder is `resumable(out)`, as it was left; it stays, if it has a
    file of that pattern, when the block raises.
    """
    out = out.resolve()
    _check_replaceable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if keep is None:
        prefix = f".{out.name}.staged-"
        _sweep(out.parent, prefix)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
    else:
        folder = resumable(out)
        folder.mkdir(exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # the folder is the other's, and stays
            raise OutputExistsError(f"{folder}: another run works there; wait for it") from None
        try:
            folder.chmod(0o777 & ~_umask())
            yield folder
            for path in folder.rglob("*"):
                _fsync(path)
            _fsync(folder)
            if not overwrite and out.exists() and any(out.iterdir()):
                raise OutputExistsError(f"{out}: appeared during the run; choose another name")
            _take_place(folder, out)
            _fsync(out.parent)
        except BaseException:
            if keep is None or not any(folder.glob(keep)):
                shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(lock)
    shutil.rmtree(folder, ignore_errors=True)


def _check_replaceable(out: Path) -> None:
    """Refuse what a rename cannot replace, or would from under whoever is in it."""
    if out.is_mount() or Path.cwd().is_relative_to(out):
        what = "is a mount point" if out.is_mount() else "is the current folder, or holds it"
        raise UsageError(f"--out {out}: {what}; choose another folder, such as one in it")


def _take_place(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`; an old `out` ends up under the staged name, to be removed."""
    if not out.exists() or not any(out.iterdir()):
        folder.rename(out)
        return
    if _exchange(folder, out):
        return
    # Without an atomic exchange the old one is still whole at every instant, under a second name
    # that no later run sweeps away.
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
    out.rename(aside)
    try:
        folder.rename(out)
    except BaseException:
        aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names atomically (Linux); False where the system or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    if renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def _sweep(parent: Path, prefix: str) -> None:
    """Remove staged folders whose owner is gone: a live owner holds a lock on its folder."""
    for left in [path for path in parent.iterdir() if path.name.startswith(prefix)]:
        with suppress(OSError):
            lock = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(lock)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
