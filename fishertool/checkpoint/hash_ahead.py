"""SHA-256 of whole files by processes of their own, begun before anything heavy is imported.

A thread would have to wait for the interpreter, which an import seldom lets go of.
"""

import atexit
import hashlib
import os
import signal
import threading
from collections.abc import Iterable
from contextlib import suppress
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import NoReturn

from fishertool.checkpoint.known_digests import Identity, identity, recall

BITE_BYTES = 64 << 20
"""What of a file is in the memory of one process."""
STOPS = (signal.SIGINT, signal.SIGTERM)

_processes: dict[Identity, "_Process"] = {}


def hash_ahead(paths: Iterable[Path], processes: int) -> None:
    """Begin to hash these files, in their order, in so many processes; not those known already.

    To be called while the process has one thread only, of which a fork is safe. Does nothing
    where a process cannot fork. The processes end with their last file, or with this one.
    """
    if not hasattr(os, "fork") or threading.active_count() > 1:
        return
    files: dict[Identity, Path] = {}
    for path in paths:
        with suppress(OSError):
            files[identity(path.stat())] = path
    new = [(file, path) for file, path in files.items() if recall(file) is None]
    for share in (dict(new[first::processes]) for first in range(min(processes, len(new)))):
        with suppress(OSError):  # too many processes
            process = _Process(share)
            _processes.update(dict.fromkeys(share, process))
            atexit.register(process.stop)


def hashed_ahead(file: Identity) -> "_Process | None":
    """Who hashes this file, if one does; its bytes need not be shown to another."""
    return _processes.get(file)


class _Process:
    def __init__(self, files: dict[Identity, Path]):
        self.files = files
        self._told: dict[Identity, str] = {}
        reading, writing = os.pipe()
        parent = os.getpid()
        # A signal would else find this process's handlers in the new one.
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        try:
            self._number = os.fork()
            if self._number == 0:
                _run(files, writing, parent, masked)
        except OSError:
            os.close(reading)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)
            os.close(writing)
        self._lines = os.fdopen(reading)

    def sha256(self, file: Identity) -> str | None:
        """Waits for it; None if the process could not read the file, or is no more."""
        for hashed, line in zip(list(self.files)[len(self._told) :], self._lines, strict=False):
            self._told[hashed] = line.strip()
            if hashed == file:
                break
        return self._told.get(file) or None

    def stop(self) -> None:
        with suppress(ProcessLookupError, ChildProcessError):
            if os.waitpid(self._number, os.WNOHANG)[0] == 0:
                os.kill(self._number, signal.SIGKILL)
                os.waitpid(self._number, 0)


def _run(files: dict[Identity, Path], writing: int, parent: int, mask: Iterable[int]) -> NoReturn:
    try:
        for number in STOPS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for expected, path in files.items():
            found = ""
            with suppress(OSError), path.open("rb", buffering=0) as file:
                if identity(os.fstat(file.fileno())) == expected:
                    found = _hash(file.fileno(), expected.size, parent)
            os.write(writing, f"{found}\n".encode())
    finally:
        os._exit(0)


def _hash(descriptor: int, size: int, parent: int) -> str:
    total = hashlib.sha256()
    for start in range(0, size, BITE_BYTES):
        if os.getppid() != parent:
            os._exit(0)
        bite = min(BITE_BYTES, size - start)
        with mmap(descriptor, bite, access=ACCESS_READ, offset=start) as mapped:
            total.update(mapped)
    return total.hexdigest()
