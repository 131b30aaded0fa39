"""What a surgery reads from: a checkpoint, or a view of one whose tensors are made while read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from fishertool.checkpoint.digest import FileDigest
from fishertool.checkpoint.dtypes import all_finite
from fishertool.checkpoint.header import TensorInfo
from fishertool.errors import InputError


class TensorSource(Protocol):
    """Tensors by name, in rows; see `Checkpoint`, which is one."""

    @property
    def folder(self) -> Path:
        """Where config and companion files lie."""

    def __iter__(self) -> Iterator[str]: ...

    def __contains__(self, name: object) -> bool: ...

    def info(self, name: str) -> TensorInfo:
        """Shape that `read` gives rows of, and the dtype to store the tensor in.

        A view may give values in a wider dtype, which are not rounded to that one yet.
        """

    def where(self, name: str) -> str: ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor: ...

    def config(self) -> dict[str, Any]: ...

    def digests(self) -> list[FileDigest]: ...

    def fingerprint(self) -> str: ...


class SourceView:
    """A source seen through another; all is as it is there but for what a subclass changes."""

    def __init__(self, source: TensorSource):
        self.source = source

    @property
    def folder(self) -> Path:
        return self.source.folder

    def __iter__(self) -> Iterator[str]:
        return iter(self.source)

    def __contains__(self, name: object) -> bool:
        return name in self.source

    def info(self, name: str) -> TensorInfo:
        return self.source.info(name)

    def where(self, name: str) -> str:
        return self.source.where(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.source.read(name, start, stop)

    def config(self) -> dict[str, Any]:
        return self.source.config()

    def digests(self) -> list[FileDigest]:
        return self.source.digests()

    def fingerprint(self) -> str:
        return self.source.fingerprint()


def check_finite(source: TensorSource, name: str, values: Tensor) -> None:
    """Raises InputError if these, of the tensor `name`, have NaN or Inf."""
    if not all_finite(values):
        raise InputError(
            f"{source.where(name)}: has NaN or Inf; repair it, or go on with --allow-nonfinite"
        )
