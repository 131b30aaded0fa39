"""A checkpoint with a LoRA adapter in it, merged row by row while it is read."""

from threading import Lock

import torch
from torch import Tensor

from fishertool.checkpoint.digest import FileDigest
from fishertool.checkpoint.dtypes import compute_dtype
from fishertool.checkpoint.reader import Checkpoint
from fishertool.checkpoint.source import SourceView
from fishertool.checkpoint.stored import FLOATING
from fishertool.checkpoint.stream import pieces
from fishertool.errors import InputError, some
from fishertool.models.adapters import Adapter
from fishertool.models.names import empty_model, names_on_disk


class AdaptedCheckpoint(SourceView):
    """The base's tensors by name; those that the adapter changes come in float32 (F64 in float64).

    Raises InputError, by name and shape, for an adapter of another base.
    """

    def __init__(self, base: Checkpoint, adapter: Adapter):
        module = empty_model(base)
        stored: dict[str, str] = {}
        if module is not None:
            adapter, stored = adapter.fitted_to(module), names_on_disk(module, base)
        adapter = adapter.renamed({name: stored.get(name, name) for name in adapter.names})
        if lost := [name for name in sorted(adapter.names) if name not in base]:
            raise InputError(
                f"{adapter.tensors.folder}: changes {some(lost)}, which {base.folder} has not on "
                "disk; save the base with the head that the adapter was trained with"
            )
        adapter.check({name: base.info(name).shape for name in adapter.names})
        for name in sorted(adapter.names):
            if base.info(name).dtype not in FLOATING:
                raise InputError(
                    f"{base.where(name)} is {base.info(name).dtype}; dequantize the base first"
                )
        super().__init__(base)
        self.base, self.adapter, self._changed = base, adapter, adapter.names
        self._norms: dict[str, Tensor] = {}
        self._lock = Lock()

    def where(self, name: str) -> str:
        adapter = f" with {self.adapter.tensors.folder}" if name in self._changed else ""
        return f"{self.base.where(name)}{adapter}"

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `[start, stop)` of a tensor, as `Checkpoint.read` gives them."""
        if name not in self._changed:
            return self.base.read(name, start, stop)
        rows = self._summed(name, start, self.info(name).rows if stop is None else stop)
        if (one := self.adapter.layers.get(name)) is not None and one.magnitude is not None:
            rows = one.stretch(rows, start, self._column_norms(name) if one.turned else None)
        return rows

    def digests(self) -> list[FileDigest]:
        """Of the base's files, and then the adapter's."""
        return [*self.base.digests(), *self.adapter.tensors.digests()]

    def fingerprint(self) -> str:
        """That of a Fisher estimated with the same base and adapter."""
        return self.adapter.fingerprint_on(self.base)

    def _summed(self, name: str, start: int, stop: int) -> Tensor:
        rows = self.base.read(name, start, stop).to(compute_dtype(self.info(name).dtype))
        return self.adapter.summed(name, rows, start)

    def _column_norms(self, name: str) -> Tensor:
        """L2 norms of a whole tensor's columns before they are stretched, from one pass over it."""
        with self._lock:
            if name not in self._norms:
                squares = torch.zeros(self.info(name).width, dtype=torch.float64)
                for piece in pieces([self.info(name)]):
                    squares += self._summed(name, piece.start, piece.stop).double().square().sum(0)
                self._norms[name] = squares.sqrt().to(compute_dtype(self.info(name).dtype))
            return self._norms[name]
