"""Write safetensors shards whose every byte has its place before the first is written."""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Self

from safetensors import safe_open
from torch import Tensor

from fishertool.checkpoint.digest import FileDigest, RunningDigest, digest
from fishertool.checkpoint.dtypes import NAMES, TORCH, as_bytes
from fishertool.checkpoint.header import TensorInfo
from fishertool.checkpoint.layout import Layout, ShardLayout, encode_index, lay_out

WRITE_BACK_BYTES = 64 << 20


class CheckpointWriter:
    """Fills the files of a layout by positioned writes, in any order and from any thread.

    Opening it reserves the disk space. What is written goes to disk in the background and then
    leaves the page cache: an output of any size takes little of the machine's memory. `finish`
    checks that every byte was written and that the safetensors library reads the headers as meant.
    With `reopen`, files of this layout that an earlier run left in the folder are gone on with.
    """

    def __init__(self, folder: Path, layout: Layout, reopen: bool = False):
        self.folder = folder
        self.layout = layout
        self._reopen = reopen
        self._files: dict[str, int] = {}
        self._digests: dict[str, RunningDigest] = {}
        self._place: dict[str, tuple[str, TensorInfo]] = {}
        self._written: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self._left = {
            shard.file: sum(tensor.nbytes for tensor in shard.tensors) for shard in layout.shards
        }
        self._dirty: dict[str, int] = defaultdict(int)
        self._lock = Lock()
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="write-back")
        self._flushes: list[Future[None]] = []

    def __enter__(self) -> Self:
        try:
            for shard in self.layout.shards:
                self._reserve(shard)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._disk.shutdown(cancel_futures=True)
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Write rows of a tensor from row `start` on; `values` has the dtype laid out for it."""
        file, info = self._place[name]
        if values.dtype != TORCH[info.dtype]:
            raise TypeError(f"{name} is laid out as {info.dtype}, got {values.dtype}")
        data = as_bytes(values.contiguous())
        offset = info.start + start * (info.nbytes // max(info.rows, 1))
        self._write(file, offset, data)
        with self._lock:
            self._written[name].append((offset, offset + len(data)))
            self._left[file] -= len(data)
            self._dirty[file] += len(data)
            if self._dirty[file] >= WRITE_BACK_BYTES or self._left[file] == 0:
                self._dirty[file] = 0
                self._flushes.append(self._disk.submit(_flush, self._files[file]))

    def count_written(self, name: str, start: int, stop: int) -> None:
        """Rows `[start, stop)` of a tensor are there from an earlier run."""
        file, info = self._place[name]
        row_bytes = info.nbytes // max(info.rows, 1)
        self._written[name].append((info.start + start * row_bytes, info.start + stop * row_bytes))
        self._left[file] -= (stop - start) * row_bytes

    def sync(self) -> None:
        """Have on disk all that was written so far."""
        for descriptor in self._files.values():
            os.fsync(descriptor)

    def finish(self) -> list[FileDigest]:
        """Close the files, verify them, write the index; the SHA-256 of each file."""
        for name, (_, info) in self._place.items():
            end = info.start
            for start, stop in sorted(self._written[name]):
                if start != end:
                    raise RuntimeError(f"not every byte was written of {name}, or some twice")
                end = stop
            if end != info.start + info.nbytes:
                raise RuntimeError(f"not every byte was written of {name}")
        for flush in self._flushes:
            flush.result()
        self.close()
        digests = [self._digests[shard.file].finish() for shard in self.layout.shards]
        for shard in self.layout.shards:
            self._verify(shard)
        if self.layout.index is not None:
            path = self.folder / self.layout.index_file
            path.write_bytes(encode_index(self.layout.index))
            digests.append(digest(path))
        return digests

    def _reserve(self, shard: ShardLayout) -> None:
        path = self.folder / shard.file
        again = self._reopen and path.is_file() and path.stat().st_size == shard.nbytes
        flags = os.O_WRONLY if again else os.O_WRONLY | os.O_CREAT | os.O_EXCL
        self._files[shard.file] = descriptor = os.open(path, flags, 0o666)
        if hasattr(os, "posix_fallocate") and not again:
            with _naming(path):
                os.posix_fallocate(descriptor, 0, shard.nbytes)
        self._digests[shard.file] = RunningDigest(path)
        self._write(shard.file, 0, memoryview(shard.header))
        self._place.update({tensor.name: (shard.file, tensor) for tensor in shard.tensors})

    def _write(self, file: str, offset: int, data: memoryview) -> None:
        done = 0
        with _naming(self._digests[file].path):
            while done < len(data):
                done += os.pwrite(self._files[file], data[done:], offset + done)
        self._digests[file].feed(offset, data)

    def _verify(self, shard: ShardLayout) -> None:
        """Read the header back with the library that users' loaders are built on."""
        path = self.folder / shard.file
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            for tensor in shard.tensors:
                view = found[tensor.name]
                if (view.get_dtype(), tuple(view.get_shape())) != (tensor.dtype, tensor.shape):
                    raise RuntimeError(f"{path}: tensor {tensor.name} does not read back")
        if path.stat().st_size != shard.nbytes or len(found) != len(shard.tensors):
            raise RuntimeError(f"{path}: does not read back as it was laid out")


def write_tensors(
    folder: Path,
    stem: str,
    metadata: dict[str, str],
    tensors: Mapping[str, Tensor],
    max_shard_bytes: int,
) -> tuple[Layout, list[FileDigest]]:
    """Write tensors in their own dtypes to `<stem>.safetensors`, or to shards of that name."""
    infos = [
        TensorInfo(name, NAMES[value.dtype], tuple(value.shape)) for name, value in tensors.items()
    ]
    layout = lay_out(infos, max_shard_bytes, stem=stem, metadata=metadata)
    with CheckpointWriter(folder, layout) as writer:
        for name, value in tensors.items():
            writer.write(name, value.cpu())
        return layout, writer.finish()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Have an error of the disk say which file it is about, as those of an open one do not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _flush(descriptor: int) -> None:
    os.fsync(descriptor)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
