"""A file held against what a report says of it."""

from pathlib import Path, PurePosixPath

from fishertool.checkpoint.digest import FileDigest, digest


def difference(folder: Path, told: FileDigest, known: FileDigest | None = None) -> str | None:
    """That a file is missing, or of other bytes than the report of its folder says; None if it is not.

    It is hashed anew, as a digest that is remembered would not tell of a disk that lost some bytes;
    unless that was done already, which `known` tells.
    """
    name = PurePosixPath(told.file)
    if name.is_absolute() or ".." in name.parts:
        return f"{name}: is named in its report, and is no file of the folder"
    path = folder / name
    if not path.is_file():
        return f"{name}: missing, and its report names it"
    if (size := path.stat().st_size) != told.bytes:
        return f"{name}: has {size} bytes, and {told.bytes} in the report"
    if (known or digest(path, anew=True)).sha256 != told.sha256:
        return f"{name}: has other bytes than when it was written (SHA-256)"
    return None
