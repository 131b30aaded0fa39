"""What the values of an open checkpoint are: one pass over all its bytes, which are hashed by the way."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor

from fishertool.checkpoint.dtypes import TORCH, all_finite
from fishertool.checkpoint.header import TensorInfo
from fishertool.checkpoint.reader import Checkpoint
from fishertool.checkpoint.stored import FLOATING
from fishertool.checkpoint.stream import Piece, collect, pieces
from fishertool.fisher.kinds import MOMENTS
from fishertool.progress import Advance

SQUARES = ("diagonal", "factored")
"""Kinds of Fisher whose entries are means of squares; of MOMENTS only those on the diagonal are."""


@dataclass
class Values:
    nonfinite: list[str] = field(default_factory=list)
    """Floating-point tensors with NaN or Inf."""
    negative: list[str] = field(default_factory=list)
    """Those with a mean of squares below zero."""
    zeros: dict[tuple[str, int], int] = field(default_factory=lambda: defaultdict(int))
    """By tensor and entry along its first dimension, if it is a stack of matrices; else entry 0."""


@dataclass(frozen=True)
class _Seen:
    finite: bool
    negative: bool
    zeros: Mapping[int, int]


def look_through(
    checkpoint: Checkpoint,
    kind: str | None,
    counted: Collection[str],
    threads: int,
    advance: Advance,
) -> Values:
    """Read every tensor once; of those in `counted`, count the zeros.

    `kind` is that of a Fisher, if it is one.
    """
    found = Values()
    broken: dict[str, None] = {}
    negative: dict[str, None] = {}

    def one(piece: Piece) -> _Seen:
        info = checkpoint.info(piece.name)
        values = checkpoint.read(piece.name, piece.start, piece.stop)
        floating = info.dtype in FLOATING
        below = floating and _has_negative(values, kind, info, piece.start)
        zeros = _zeros(values, info, piece) if piece.name in counted else {}
        return _Seen(not floating or all_finite(values), below, zeros)

    def take(piece: Piece, seen: _Seen) -> None:
        if not seen.finite:
            broken[piece.name] = None
        if seen.negative:
            negative[piece.name] = None
        for entry, count in seen.zeros.items():
            found.zeros[piece.name, entry] += count
        advance(piece.elements)

    collect(_work(checkpoint, threads), one, threads, take)
    found.nonfinite, found.negative = list(broken), list(negative)
    return found


def _work(checkpoint: Checkpoint, threads: int) -> Iterator[Piece]:
    """Pieces of as many files in turn as there are threads, as one file's are hashed one by one."""
    for first in range(0, len(checkpoint.shards), threads):
        each = [
            pieces(_readable(shard.header.tensors.values()))
            for shard in checkpoint.shards[first : first + threads]
        ]
        yield from (piece for row in zip_longest(*each) for piece in row if piece is not None)


def _readable(tensors: Collection[TensorInfo]) -> list[TensorInfo]:
    """In file order; what torch has no dtype for is only hashed."""
    known = (info for info in tensors if info.dtype in TORCH)
    return sorted(known, key=lambda info: info.start)


def _has_negative(values: Tensor, kind: str | None, info: TensorInfo, start: int) -> bool:
    if kind in MOMENTS and len(info.shape) > 1:
        rows = torch.arange(start, start + len(values)) % info.width
        values = values.gather(1, rows.unsqueeze(1))
    elif kind not in SQUARES:
        return False
    return bool((values < 0).any())


def _zeros(values: Tensor, info: TensorInfo, piece: Piece) -> dict[int, int]:
    wide = values.float() if values.dtype.itemsize == 1 else values
    rows = (wide == 0).reshape(piece.stop - piece.start, -1).sum(1)
    rows_each = info.rows // info.shape[0] if len(info.shape) > 2 else info.rows
    entries = torch.arange(piece.start, piece.stop) // rows_each
    there = range(int(entries[0]), int(entries[-1]) + 1)
    return {one: int(rows[entries == one].sum()) for one in there}
