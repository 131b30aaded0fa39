"""Which tensor goes where: shards, file names and the index, known before the first byte is written."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from fishertool.checkpoint.header import TensorInfo, encode_header
from fishertool.checkpoint.stored import BITS, CONFIG_NAMES, FLOATING
from fishertool.errors import UsageError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
ONE_FILE = 1 << 62
"""A limit for shards that leaves everything in one."""


@dataclass(frozen=True)
class ShardLayout:
    file: str
    header: bytes
    tensors: tuple[TensorInfo, ...]
    """In file order, `start` counted from the file's first byte."""

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Layout:
    shards: tuple[ShardLayout, ...]
    index_file: str
    index: dict[str, Any] | None
    """None where one file holds everything."""

    @property
    def tensors(self) -> list[TensorInfo]:
        """In the order in which they lie in the files."""
        return [tensor for shard in self.shards for tensor in shard.tensors]

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @property
    def parameters(self) -> int:
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def dtype(self) -> str:
        return main_dtype(self.tensors)


def main_dtype(tensors: Iterable[TensorInfo]) -> str:
    """What most weights have, as config.json calls it; where config.json has no word, as headers do."""
    totals: dict[str, int] = {}
    for tensor in tensors:
        totals[tensor.dtype] = totals.get(tensor.dtype, 0) + tensor.elements
    floating = {dtype: count for dtype, count in totals.items() if dtype in FLOATING}
    dtype = max(floating or totals, key=lambda dtype: totals[dtype])
    return CONFIG_NAMES.get(dtype, dtype)


def lay_out(
    tensors: Iterable[TensorInfo],
    max_shard_bytes: int,
    stem: str = "model",
    metadata: dict[str, str] | None = None,
) -> Layout:
    """Fill shards in the order given, as transformers does: a tensor over the limit has its own.

    Within a file, wider dtypes come first so that every tensor starts at a multiple of its size.
    """
    groups: list[list[TensorInfo]] = []
    filling: list[TensorInfo] = []
    size = 0
    for tensor in tensors:
        if tensor.nbytes > max_shard_bytes:
            groups.append([tensor])
            continue
        if size + tensor.nbytes > max_shard_bytes:
            groups.append(filling)
            filling, size = [], 0
        filling.append(tensor)
        size += tensor.nbytes
    if filling or not groups:
        groups.append(filling)
    metadata = {"format": "pt", **(metadata or {})}
    shards = []
    for number, group in enumerate(groups, start=1):
        suffix = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
        ordered = sorted(group, key=lambda tensor: -BITS[tensor.dtype])
        header = encode_header(ordered, metadata)
        placed, end = [], len(header)
        for tensor in ordered:
            placed.append(TensorInfo(tensor.name, tensor.dtype, tensor.shape, end))
            end += tensor.nbytes
        shards.append(ShardLayout(f"{stem}{suffix}.safetensors", header, tuple(placed)))
    layout = Layout(tuple(shards), f"{stem}.safetensors.index.json", None)
    return layout if len(groups) == 1 else replace(layout, index=_index(layout))


def _index(layout: Layout) -> dict[str, Any]:
    weight_map = {tensor.name: shard.file for shard in layout.shards for tensor in shard.tensors}
    total_size = sum(tensor.nbytes for tensor in layout.tensors)
    return {
        "metadata": {"total_parameters": layout.parameters, "total_size": total_size},
        "weight_map": dict(sorted(weight_map.items())),
    }


def encode_index(index: dict[str, Any]) -> bytes:
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def parse_size(text: str) -> int:
    """Bytes in a size as transformers writes it: decimal units, or binary ones with an i.

    >>> parse_size("5GB"), parse_size("1.5 MiB"), parse_size("800")
    (5000000000, 1572864, 800)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    unit = UNITS.get(match[2].upper(), 0) if match else 0
    size = float(match[1]) * unit if match else 0.0
    if not 1 <= size < 2**63:
        raise UsageError(f"--max-shard-size {text!r}: write a size such as 5GB, 500MB or 2GiB")
    return math.floor(size)


def show_size(size: float) -> str:
    """A size for people.

    >>> show_size(2_200_000_000), show_size(532)
    ('2.2 GB', '532 B')
    """
    for unit in ("GB", "MB", "KB"):
        if size >= UNITS[unit]:
            return f"{size / UNITS[unit]:.1f} {unit}"
    return f"{size:.0f} B"
