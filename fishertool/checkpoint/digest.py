"""SHA-256 of files while their bytes pass by."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

BUFFER_BYTES = 4 << 20
PENDING_BYTES = 64 << 20
HEAD_START_BYTES = 32 << 20
"""Between two bites the thread asks for the interpreter, which an import seldom lets go of."""

_begun: dict[tuple[int, ...], tuple[Any, int]] = {}
"""Files of a head start: the hash so far, and of how many bytes it is."""


@dataclass(frozen=True)
class FileDigest:
    file: str
    bytes: int
    sha256: str


class RunningDigest:
    """The SHA-256 of a file whose bytes are read or written in pieces, mostly in file order.

    A piece that comes early waits (at most `PENDING_BYTES` of them do); what never came in turn
    is read from the file in `finish`. So any order gives the right digest, and file order gives
    it without reading anything twice. Thread-safe.
    """

    def __init__(self, path: Path):
        self.path = path
        self._hash, self._position = _begun.pop(_identity(path), (hashlib.sha256(), 0))
        self._pending: dict[int, bytes] = {}
        self._pending_bytes = 0
        self._lock = Lock()

    def feed(self, offset: int, data: memoryview) -> None:
        """Take the bytes at `offset`; afterwards the caller may change them."""
        with self._lock:
            if offset > self._position and self._pending_bytes + len(data) <= PENDING_BYTES:
                if offset not in self._pending:
                    self._pending[offset] = bytes(data)
                    self._pending_bytes += len(data)
                return
            known = self._position - offset
            if not 0 <= known < len(data):
                return
            self._update(data[known:])
            while self._position in self._pending:
                waited = self._pending.pop(self._position)
                self._pending_bytes -= len(waited)
                self._update(waited)

    def finish(self) -> FileDigest:
        with self._lock, self.path.open("rb") as file:
            self._pending.clear()
            file.seek(self._position)
            while data := file.read(BUFFER_BYTES):
                self._update(data)
        return FileDigest(self.path.name, self._position, self._hash.hexdigest())

    def _update(self, data: memoryview | bytes) -> None:
        self._hash.update(data)
        self._position += len(data)


@contextmanager
def head_start(folders: Iterable[Path]) -> Iterator[None]:
    """Hash the shards of these checkpoints in the background until the block is left.

    For the seconds that importing torch takes, in which the other cores have nothing to do. A
    RunningDigest made afterwards goes on where this came to. What cannot be read is left for the
    reader to tell.
    """
    shards = [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]
    leave = Event()

    def run() -> None:
        buffer = memoryview(bytearray(HEAD_START_BYTES))
        for path in shards:
            if leave.is_set() or not path.is_file():  # a pipe would wait for ever
                continue
            total, size = hashlib.sha256(), 0
            with suppress(OSError), path.open("rb", buffering=0) as file:
                identity = _identity(path)
                while not leave.is_set() and (count := file.readinto(buffer)):
                    total.update(buffer[:count])
                    size += count
                _begun[identity] = total, size

    thread = Thread(target=run, name="head-start", daemon=True)
    thread.start()
    try:
        yield
    finally:
        leave.set()
        thread.join()


def _identity(path: Path) -> tuple[int, ...]:
    """Of a file's content, as far as its inode tells."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def digest(path: Path) -> FileDigest:
    """The SHA-256 of a whole file."""
    return RunningDigest(path).finish()
