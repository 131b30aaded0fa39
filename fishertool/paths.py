"""Paths as a user types them."""

from pathlib import Path


def expanded(path: str | Path) -> Path:
    """With a home folder for its `~`; as it is where there is no such user.

    >>> expanded("~nobody-of-this-name/model")
    PosixPath('~nobody-of-this-name/model')
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
