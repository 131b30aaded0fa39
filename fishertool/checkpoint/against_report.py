"""Files held against what a report says of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from fishertool.checkpoint.digest import digest


def differences(folder: Path, listed: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line a file of `folder` that is missing, or differs in bytes or SHA-256 from its entry.

    `listed` is a report's `output.files`: each with file, bytes and sha256. The bytes are hashed
    anew, as a digest that is remembered would not tell of a disk that lost some.
    """
    found = (_difference(folder, entry) for entry in listed)
    return [told for told in found if told is not None]


def _difference(folder: Path, entry: Mapping[str, Any]) -> str | None:
    name = PurePosixPath(str(entry["file"]))
    if name.is_absolute() or ".." in name.parts:
        return f"{name}: is listed, and is no file of the folder"
    path = folder / name
    if not path.is_file():
        return f"{name}: is missing"
    if (size := path.stat().st_size) != entry["bytes"]:
        return f"{name}: has {size} bytes, the report says {entry['bytes']}"
    if (sha256 := digest(path, anew=True).sha256) != entry["sha256"]:
        return f"{name}: has SHA-256 {sha256}, the report says {entry['sha256']}"
    return None
