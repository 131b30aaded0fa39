"""Open a checkpoint: a folder of safetensors files as one lazy mapping of tensor names."""

import hashlib
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from fishertool.checkpoint.contents import Contents
from fishertool.checkpoint.digest import FileDigest, RunningDigest
from fishertool.checkpoint.dtypes import TORCH, as_bytes
from fishertool.checkpoint.header import Header
from fishertool.checkpoint.shards import read_headers
from fishertool.errors import InputError

SAMPLE_BYTES = 512


class Shard:
    """One open safetensors file; reads are positioned, so threads share it."""

    def __init__(self, path: Path, header: Header):
        self.path = path
        self.header = header
        self._file = path.open("rb")
        self.digest = RunningDigest(path, self._file.fileno())
        self.digest.feed(0, memoryview(self._file.read(self.header.nbytes)))

    def hash_anew(self) -> None:
        """Have `digest` find out what the bytes are now, whatever is known of the file."""
        self.digest = RunningDigest(self.path, self._file.fileno(), anew=True)
        header = os.pread(self._file.fileno(), self.header.nbytes, 0)
        self.digest.feed(0, memoryview(header))

    def read(self, start: int, size: int, *, strided: bool = False) -> Tensor:
        """Bytes `[start, start + size)` of the file as a uint8 tensor of its own.

        Shown to the digest, unless they are one of many `strided` runs, which come in no order.
        """
        tensor = torch.empty(size, dtype=torch.uint8)
        buffer = as_bytes(tensor)
        done = 0
        while done < size:
            count = os.preadv(self._file.fileno(), [buffer[done:]], start + done)
            if count == 0:
                raise InputError(f"{self.path}: truncated while it was read")
            done += count
        if not strided:
            self.digest.feed(start, buffer)
        return tensor

    def close(self) -> None:
        self._file.close()


class Checkpoint(Contents, Mapping[str, Tensor]):
    """Tensors of a folder by name, read when asked for.

    `checkpoint[name]` is the whole tensor, in its stored dtype; `read` gives some of its rows.
    """

    def __init__(self, folder: Path, shards: list[Shard]):
        super().__init__(folder, {shard.path: shard.header for shard in shards})
        self.shards = shards
        self._shards = {shard.path: shard for shard in shards}

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name).reshape(self.info(name).shape)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        for shard in self.shards:
            shard.close()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `[start, stop)` of a tensor: `[row, width]`, or `[row]` if it is a vector or scalar."""
        info, dtype = self.info(name), self._dtype(name)
        stop = info.rows if stop is None else stop
        if not 0 <= start <= stop <= info.rows:
            raise IndexError(f"rows {start} to {stop} of {name}, which has {info.rows}")
        row_bytes = info.nbytes // max(info.rows, 1)
        data = self._shard(name).read(info.start + start * row_bytes, (stop - start) * row_bytes)
        tensor = data.view(dtype)
        return tensor.reshape(stop - start, info.width) if len(info.shape) > 1 else tensor

    def read_columns(self, name: str, start: int, stop: int) -> Tensor:
        """Elements `[start, stop)` of each entry along a tensor's first dimension, flat.

        `[first dimension, stop - start]`.
        """
        info, dtype = self.info(name), self._dtype(name)
        entries = info.shape[0]
        size = info.elements // max(entries, 1)
        if not 0 <= start <= stop <= size:
            raise IndexError(f"elements {start} to {stop} of {name}, whose entries have {size}")
        shard, columns = self._shard(name), torch.empty(entries, stop - start, dtype=dtype)
        for entry in range(entries):
            offset = info.start + (entry * size + start) * dtype.itemsize
            data = shard.read(offset, (stop - start) * dtype.itemsize, strided=True)
            columns[entry] = data.view(dtype)
        return columns

    def _shard(self, name: str) -> Shard:
        return self._shards[self._file_of[name]]

    def _dtype(self, name: str) -> torch.dtype:
        stored = self.info(name).dtype
        if stored not in TORCH:
            raise InputError(f"{self.where(name)}: {stored} cannot be computed with")
        return TORCH[stored]

    def digests(self) -> list[FileDigest]:
        """SHA-256 of each file, from the bytes already read where they were read in order."""
        return [shard.digest.finish() for shard in self.shards]

    def fingerprint(self) -> str:
        """A SHA-256 of names, dtypes, shapes and a sample of every tensor's bytes.

        Independent of how tensors are sharded, and read in milliseconds: it tells two fine-tunes
        of one architecture apart without reading them whole.
        """
        total = hashlib.sha256()
        for name in sorted(self):
            info, shard = self.info(name), self._shard(name)
            size = min(SAMPLE_BYTES, info.nbytes)
            middle = info.start + (info.nbytes - size) // 2
            total.update(f"{name}\0{info.dtype}\0{info.shape}\0".encode())
            total.update(as_bytes(shard.read(middle, size, strided=True)))
        return total.hexdigest()


def open_checkpoint(folder: Path, stem: str = "model") -> Checkpoint:
    """Open `<stem>.safetensors`, or the shards that `<stem>.safetensors.index.json` names.

    Reads headers only. Raises InputError for what read_headers refuses.
    """
    headers = read_headers(folder, stem)
    with ExitStack() as opened:
        shards = []
        for path, header in headers.items():
            shards.append(Shard(path, header))
            opened.callback(shards[-1].close)
        opened.pop_all()
    return Checkpoint(folder, shards)
