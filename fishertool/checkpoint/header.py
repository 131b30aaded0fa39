"""The header of a safetensors file: parsed here, with nothing taken on trust.

Layout: 8 bytes, the header's length N as a little-endian integer; N bytes of JSON; the tensors' bytes.
Source: the safetensors format description.
"""

import json
import math
import reprlib
import stat
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fishertool.checkpoint.stored import BITS
from fishertool.errors import InputError

MAX_HEADER_BYTES = 25_000_000
LENGTH_BYTES = 8
MAX_DIMENSIONS = 64
ENTRY = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor. `start` is its first byte, counted from the file's."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @cached_property
    def elements(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def nbytes(self) -> int:
        return self.elements * BITS[self.dtype] // 8

    @property
    def width(self) -> int:
        """Elements in a row: the last dimension of a matrix, 1 for a vector or a scalar."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def rows(self) -> int:
        """All dimensions but the last taken together; pieces of a tensor are runs of rows."""
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else self.elements

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Header:
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    nbytes: int
    """Bytes before the first tensor."""


def read_header(path: Path) -> Header:
    """Read and check the header of one file.

    Raises InputError, naming the file and the tensor, unless: the file is a regular file; its header
    is within the cap and is JSON without duplicate keys; names are printable; dtypes are known;
    and the tensors fill the rest of the file without gap, overlap or excess.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: not a regular file")
    size = status.st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES or length > size - LENGTH_BYTES:
            raise InputError(
                f"{path}: truncated or not a safetensors file ({size} bytes cannot hold its header); "
                "fetch it again"
            )
        if length > MAX_HEADER_BYTES:
            raise InputError(
                f"{path}: its header has {length} bytes, more than the {MAX_HEADER_BYTES} allowed"
            )
        text = file.read(length)
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: its header is not valid JSON: {error}") from error
    if not isinstance(entries, dict):
        raise InputError(f"{path}: its header is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"{path}: __metadata__ must map text to text")
    first = LENGTH_BYTES + length
    tensors = [_tensor(path, name, entry, first) for name, entry in entries.items()]
    end = first
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.nbytes)):
        if tensor.start != end:
            fault = "overlaps the one before it" if tensor.start < end else "leaves a gap before it"
            raise InputError(f"{path}: tensor {tensor.name} {fault} (at byte {tensor.start})")
        end += tensor.nbytes
    if end != size:
        fault = "truncated; fetch it again" if end > size else "has bytes no tensor accounts for"
        raise InputError(f"{path}: {fault} ({size} bytes, its header describes {end})")
    return Header({tensor.name: tensor for tensor in tensors}, metadata, first)


def encode_header(tensors: Sequence[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the first tensor, for tensors laid out in this order without gaps."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for tensor in tensors:
        offsets = [end, end + tensor.nbytes]
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        end = offsets[1]
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # keeps the tensors aligned, as safetensors itself does
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def has_control_characters(text: str) -> bool:
    """Whether it holds anything a terminal would act on, or no text at all (lone surrogates)."""
    # Printable text has none; it is told at once, and nearly every name is.
    return not text.isprintable() and any(
        unicodedata.category(character)[0] == "C" for character in text
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"duplicate key {twice!r}")
    return result


def _tensor(path: Path, name: str, entry: Any, first: int) -> TensorInfo:
    if not name or has_control_characters(name):
        raise InputError(f"{path}: tensor name {name!r} is empty or has control characters")
    where = f"{path}: tensor {name}"
    if not isinstance(entry, dict) or entry.keys() != ENTRY:
        raise InputError(f"{where}: its entry must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise InputError(f"{where}: unknown dtype {dtype!r}; known: {', '.join(BITS)}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise InputError(f"{where}: shape and data_offsets must be lists of non-negative integers")
    # The sizes beside a zero count too: in memory they are multiplied all the same.
    if len(shape) > MAX_DIMENSIONS or BITS[dtype] * math.prod(filter(None, shape)) >= 8 * 2**63:
        raise InputError(f"{where}: its shape {reprlib.repr(shape)} is beyond any memory")
    tensor = TensorInfo(name, dtype, tuple(shape), first + offsets[0])
    if tensor.elements * BITS[dtype] % 8 or offsets[1] - offsets[0] != tensor.nbytes:
        raise InputError(
            f"{where}: {tensor} needs {tensor.nbytes} bytes, "
            f"its offsets hold {offsets[1] - offsets[0]}"
        )
    return tensor


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 2**63 for item in value
    )
