"""SHA-256 of large files, remembered from one run to the next while a file stays as it was.

Hashing is most of what a merge computes, and the same models are merged, measured and pruned again
and again. As make or git do, a file is taken to be what it was while its inode says so.
"""

import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

FOLDER = "FISHERTOOL_CACHE"
"""Environment variable: where to remember; nothing is remembered where it is set to nothing."""
SMALLEST = 16 << 20
SETTLED_SECONDS = 2
"""A file changed later than that before it was read may change again within one tick of its clock."""
MOST_BYTES = 1 << 20


class Identity(NamedTuple):
    """Of a file's content, as far as its inode tells."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int
    """Nanoseconds, of the content and of the inode; the latter cannot be set at will."""


def identity(stat: os.stat_result) -> Identity:
    return Identity(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def recall(file: Identity) -> str | None:
    """The SHA-256 that this file was found to have, if it was remembered."""
    if file.size < SMALLEST or (path := _place()) is None:
        return None
    with suppress(OSError, UnicodeDecodeError):
        lines = "\n" + path.read_text("ascii")
        if found := re.search(rf"\n([0-9a-f]{{64}}){_told(file)}", lines):
            return found[1]
    return None


def remember(file: Identity, sha256: str) -> None:
    """Where that is possible; a small file is hashed as fast as it is looked up."""
    settled = time.time_ns() - max(file.modified, file.changed) > SETTLED_SECONDS * 10**9
    if file.size < SMALLEST or not settled or (path := _place()) is None:
        return
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > MOST_BYTES:
            path.unlink()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, f"{sha256}{_told(file)}".encode())
        finally:
            os.close(descriptor)


def _told(file: Identity) -> str:
    return f" {' '.join(map(str, file))}\n"


def _place() -> Path | None:
    told = os.environ.get(FOLDER)
    if told == "":
        return None
    if told is not None:
        return Path(told) / "sha256"
    with suppress(RuntimeError):  # no home
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(base) / "fishertool" / "sha256"
    return None
