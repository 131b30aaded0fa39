"""SHA-256 of files while their bytes pass by."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from fishertool.checkpoint.hash_ahead import hashed_ahead
from fishertool.checkpoint.known_digests import identity, recall, remember
from fishertool.errors import InputError

BUFFER_BYTES = 4 << 20
PENDING_BYTES = 64 << 20


@dataclass(frozen=True)
class FileDigest:
    file: str
    bytes: int
    sha256: str


class RunningDigest:
    """The SHA-256 of a file whose bytes are read or written in pieces, mostly in file order.

    A piece that comes early waits (at most `PENDING_BYTES` of them do); what never came in turn
    is read from the file in `finish`. So any order gives the right digest, and file order gives
    it without reading anything twice. Thread-safe. A file that is known from an earlier run, or
    that another process hashes, is not hashed here.
    """

    def __init__(self, path: Path, descriptor: int | None = None, anew: bool = False):
        """`descriptor` is what the file is read from; without one it is written. `anew` takes
        nobody's word for what its bytes are, and remembers nothing."""
        self.path, self._anew = path, anew
        self._file = None if descriptor is None else identity(os.fstat(descriptor))
        self._known = None if anew else self._file and recall(self._file)
        self._elsewhere = None if anew else self._file and hashed_ahead(self._file)
        self._hash, self._position = hashlib.sha256(), 0
        self._pending: dict[int, bytes] = {}
        self._pending_bytes = 0
        self._lock = Lock()

    def feed(self, offset: int, data: memoryview) -> None:
        """Take the bytes at `offset`; afterwards the caller may change them."""
        if self._known or self._elsewhere:
            return
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
        """Raises InputError if the file is no longer the one that was read."""
        file, stat = self._file, self.path.stat()
        if file is not None and identity(stat).content != file.content:
            raise InputError(f"{self.path}: changed while it was read; run this again")
        if self._known is None:
            found = self._elsewhere.sha256(file) if file and self._elsewhere else None
            self._known = found or self._finish()
            if file is not None and not self._anew:
                remember(file, self._known)
        return FileDigest(self.path.name, stat.st_size, self._known)

    def _finish(self) -> str:
        with self._lock, self.path.open("rb") as file:
            self._pending.clear()
            file.seek(self._position)
            while data := file.read(BUFFER_BYTES):
                self._update(data)
        return self._hash.hexdigest()

    def _update(self, data: memoryview | bytes) -> None:
        self._hash.update(data)
        self._position += len(data)


def digest(path: Path, anew: bool = False) -> FileDigest:
    """The SHA-256 of a whole file."""
    with path.open("rb") as file:
        return RunningDigest(path, file.fileno(), anew).finish()
