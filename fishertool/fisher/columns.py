"""A bank of gradients G [member, weight] by its columns, a bounded number of them at a time."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from fishertool.errors import InputError

READ_ELEMENTS = 1 << 23
"""Asked of a source at a time: each member gives a run long enough for a disk."""
PIECE_ELEMENTS = 1 << 19
"""Computed with at a time: few enough to stay in a core's cache."""


class Gradients(Protocol):
    """The rows of G: tensors side by side, one name after another."""

    @property
    def members(self) -> int: ...

    @property
    def sizes(self) -> Mapping[str, int]:
        """name -> elements, in the order in which they make up a row."""

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of one tensor, flat: [member, stop - start], not to be changed."""


class HeldGradients:
    """Gradients in memory: name -> [member, ...weight shape]."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        members = {tensor.shape[0] for tensor in tensors.values()}
        if len(members) != 1 or 0 in members:
            raise ValueError(f"all tensors need the same members, one at least: {sorted(members)}")
        [self.members] = members
        self._rows = {name: tensor.reshape(self.members, -1) for name, tensor in tensors.items()}
        self.sizes = {name: rows.shape[1] for name, rows in self._rows.items()}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self._rows[name][:, start:stop]


class PartialGradients:
    """Gradients of parts of tensors.

    parts  the name of a part -> its tensor's, its first element there, and how many it has
    """

    def __init__(self, gradients: Gradients, parts: Mapping[str, tuple[str, int, int]]):
        self.members = gradients.members
        self.sizes = {name: size for name, (_, _, size) in parts.items()}
        self._gradients, self._parts = gradients, parts

    def read(self, name: str, start: int, stop: int) -> Tensor:
        whole, first, _ = self._parts[name]
        return self._gradients.read(whole, first + start, first + stop)


class MaskedGradients:
    """Gradients with some columns zero: F is then that of the others, these being held.

    masks  name -> True where a column stays, flat
    """

    def __init__(self, gradients: Gradients, masks: Mapping[str, Tensor]):
        self.members, self.sizes = gradients.members, gradients.sizes
        self._gradients, self._masks = gradients, masks

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self._gradients.read(name, start, stop) * self._masks[name][start:stop]


class Piece:
    """Consecutive weights of one tensor, in blocks of one width.

    where      which of all weights these are
    gradients  [block, member, width]
    """

    def __init__(self, rows: Tensor, first: int, width: int, dtype: torch.dtype):
        members, size = rows.shape
        self.where = slice(first, first + size)
        self.width = width
        self.gradients = rows.new_empty(size // width, members, width, dtype=dtype)
        self.gradients.copy_(rows.reshape(members, -1, width).transpose(0, 1))

    @property
    def starts(self) -> range:
        """The first weight of each block."""
        return range(self.where.start, self.where.stop, self.width)

    @cached_property
    def squares(self) -> Tensor:
        """Sums over members of G^2, [block, width]."""
        return self.gradients.square().sum(1).double()

    def of(self, x: Tensor) -> Tensor:
        """The entries of vectors here: [weight, column] -> [block, width, column], float64."""
        return x[self.where].double().reshape(-1, self.width, x.shape[1])

    def project(self, x: Tensor) -> Tensor:
        """G x: [weight, column] -> [block, member, column]."""
        return (self.gradients @ self.of(x).to(self.gradients.dtype)).double()

    def combine(self, coefficients: Tensor) -> Tensor:
        """G^T c: [block, member, column] -> [block, width, column]."""
        return (self.gradients.mT @ coefficients.to(self.gradients.dtype)).double()


class Pieces:
    """All of G in pieces, read anew each time they are iterated over.

    With `block`, a piece has whole blocks of so many weights, or the shorter one at the end of a
    tensor; without, some columns as one block. Raises InputError where a gradient is not finite.
    """

    def __init__(self, gradients: Gradients, block: int | None, dtype: torch.dtype):
        self._gradients, self._block, self._dtype = gradients, block, dtype
        self._finite = 0
        """Weights, from the first on, whose gradients are known to be finite."""

    def __iter__(self) -> Iterator[Piece]:
        first, unit = 0, self._block or 1
        per_unit = unit * self._gradients.members
        for name, size in self._gradients.sizes.items():
            for start, stop in _cuts(0, size, unit * max(1, READ_ELEMENTS // per_unit)):
                rows = self._gradients.read(name, start, stop)
                end = stop - start
                whole = end // unit * unit
                cuts = _cuts(0, whole, unit * max(1, PIECE_ELEMENTS // per_unit))
                for a, b in (*cuts, *_cuts(whole, end, unit)):
                    width = min(b - a, self._block or b - a)
                    piece = Piece(rows[:, a:b], first + start + a, width, self._dtype)
                    if piece.where.stop > self._finite:
                        _check_finite(piece, name)
                        self._finite = piece.where.stop
                    yield piece
            first += size


def _cuts(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    return ((a, min(a + step, stop)) for a in range(start, stop, step))


def _check_finite(piece: Piece, name: str) -> None:
    if piece.gradients.sum().isfinite():
        return
    bad = ~piece.gradients.isfinite().all(2).all(0)
    if bad.any():  # or their sum alone overflowed
        raise InputError(f"gradients of {name}: member {int(bad.nonzero()[0])} is not finite")
