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
"""What was changed later than that before this process began may change again within one tick of
its file system's clock."""
MOST_BYTES = 1 << 20
NAME = "known-sha256"
HEADER = "fishertool: SHA-256 of files, by device, inode, size and times\n"

_BEGAN = time.time_ns()
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


class Identity(NamedTuple):
    """Of a file's content, as far as its inode tells."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int
    """Nanoseconds, of the content and of the inode; on Unix the latter cannot be set at will."""

    @property
    def content(self) -> tuple[int, ...]:
        """Without the time of the inode, which a new link or other permissions change too."""
        return self[:4]


def identity(stat: os.stat_result) -> Identity:
    return Identity(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def recall(file: Identity) -> str | None:
    """The SHA-256 that this file was found to have, if it was remembered."""
    if file.size < SMALLEST or (path := _place()) is None:
        return None
    with suppress(OSError):
        lines = path.read_text("ascii", errors="replace")
        found = re.findall(rf"\n([0-9a-f]{{64}}){_told(file)}", lines)
        return found[-1] if found and lines.startswith(HEADER) else None
    return None


def remember(file: Identity, sha256: str) -> None:
    """Where that is possible; a small file is hashed as fast as it is looked up."""
    settled = _BEGAN - max(file.modified, file.changed) > SETTLED_SECONDS * 10**9
    if file.size < SMALLEST or not settled or (path := _place()) is None:
        return
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | _NO_LINK, 0o600)
        with os.fdopen(descriptor, "r+b", buffering=0) as memory:
            if memory.read(len(HEADER)) not in (b"", HEADER.encode()):
                return  # not ours
            size = os.fstat(descriptor).st_size
            if size > MOST_BYTES:
                memory.truncate(size := 0)
            memory.write(f"{'' if size else HEADER}{sha256}{_told(file)}".encode())


def _told(file: Identity) -> str:
    return f" {' '.join(map(str, file))}\n"


def _place() -> Path | None:
    told = os.environ.get(FOLDER)
    if told == "":
        return None
    if told is not None:
        return Path(told) / NAME
    with suppress(RuntimeError):  # no home
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(base) / "fishertool" / NAME
    return None
