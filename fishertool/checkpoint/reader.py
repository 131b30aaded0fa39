"""Open a checkpoint: a folder of safetensors files as one lazy mapping of tensor names."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from fishertool.checkpoint.digest import FileDigest, RunningDigest
from fishertool.checkpoint.dtypes import TORCH, as_bytes
from fishertool.checkpoint.header import (
    Header,
    TensorInfo,
    has_control_characters,
    read_header,
)
from fishertool.checkpoint.json_files import check_link, load_json
from fishertool.errors import InputError, some

MODEL = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SAMPLE_BYTES = 512


class Shard:
    """One open safetensors file; reads are positioned, so threads share it."""

    def __init__(self, path: Path):
        self.path = path
        self.header: Header = read_header(path)
        self._file = path.open("rb")
        self.digest = RunningDigest(path, self._file.fileno())
        self.digest.feed(0, memoryview(self._file.read(self.header.nbytes)))

    def read(self, start: int, size: int) -> Tensor:
        """Bytes `[start, start + size)` of the file as a uint8 tensor of its own."""
        tensor = torch.empty(size, dtype=torch.uint8)
        buffer = as_bytes(tensor)
        done = 0
        while done < size:
            count = os.preadv(self._file.fileno(), [buffer[done:]], start + done)
            if count == 0:
                raise InputError(f"{self.path}: truncated while it was read")
            done += count
        return tensor

    def close(self) -> None:
        self._file.close()


class Checkpoint(Mapping[str, Tensor]):
    """Tensors of a folder by name, read when asked for.

    `checkpoint[name]` is the whole tensor, in its stored dtype; `read` gives some of its rows.
    Names iterate in file order, so that a loop over them reads each shard front to back.
    """

    def __init__(self, folder: Path, shards: list[Shard]):
        self.folder = folder
        self.shards = shards
        self._shard_of = {
            name: shard
            for shard in shards
            for name in sorted(
                shard.header.tensors, key=lambda name: shard.header.tensors[name].start
            )
        }

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name).reshape(self.info(name).shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard_of)

    def __len__(self) -> int:
        return len(self._shard_of)

    def __contains__(self, name: object) -> bool:
        return name in self._shard_of

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        for shard in self.shards:
            shard.close()

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the first file's header carries besides tensors."""
        return self.shards[0].header.metadata

    def info(self, name: str) -> TensorInfo:
        return self._shard_of[name].header.tensors[name]

    def infos(self) -> dict[str, TensorInfo]:
        return {name: self.info(name) for name in self}

    def where(self, name: str) -> str:
        """File and tensor, as messages name them."""
        return f"{self._shard_of[name].path}: tensor {name}"

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `[start, stop)` of a tensor: `[row, width]`, or `[row]` if it is a vector or scalar."""
        info, dtype = self.info(name), self._dtype(name)
        stop = info.rows if stop is None else stop
        if not 0 <= start <= stop <= info.rows:
            raise IndexError(f"rows {start} to {stop} of {name}, which has {info.rows}")
        shard, row_bytes = self._shard_of[name], info.nbytes // max(info.rows, 1)
        offset = info.start + start * row_bytes
        data = shard.read(offset, (stop - start) * row_bytes)
        shard.digest.feed(offset, as_bytes(data))
        tensor = data.view(dtype)
        return tensor.reshape(stop - start, info.width) if len(info.shape) > 1 else tensor

    def read_columns(self, name: str, start: int, stop: int) -> Tensor:
        """Elements `[start, stop)` of each entry along a tensor's first dimension, flat.

        `[first dimension, stop - start]`. Being strided, these reads leave the digest alone.
        """
        info, dtype = self.info(name), self._dtype(name)
        entries = info.shape[0]
        size = info.elements // max(entries, 1)
        if not 0 <= start <= stop <= size:
            raise IndexError(f"elements {start} to {stop} of {name}, whose entries have {size}")
        columns = torch.empty(entries, stop - start, dtype=dtype)
        for entry in range(entries):
            offset = info.start + (entry * size + start) * dtype.itemsize
            data = self._shard_of[name].read(offset, (stop - start) * dtype.itemsize)
            columns[entry] = data.view(dtype)
        return columns

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
            info, shard = self.info(name), self._shard_of[name]
            size = min(SAMPLE_BYTES, info.nbytes)
            middle = info.start + (info.nbytes - size) // 2
            total.update(f"{name}\0{info.dtype}\0{info.shape}\0".encode())
            total.update(as_bytes(shard.read(middle, size)))
        return total.hexdigest()

    def config(self) -> dict[str, Any]:
        """config.json of the folder."""
        path = self.folder / "config.json"
        if not path.is_file():
            raise InputError(f"{path}: missing; a checkpoint is a folder with a config.json")
        config = load_json(path)
        names = config.get("architectures") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{path}: architectures must be a list of names")
        return config


def open_checkpoint(folder: Path, stem: str = "model") -> Checkpoint:
    """Open `<stem>.safetensors`, or the shards that `<stem>.safetensors.index.json` names.

    Reads headers only. Raises InputError for what read_header refuses, and for an index that
    names files outside the folder, names tensors its shards lack (or the reverse), or lies beside
    a file it would be ambiguous with.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.exists() and index.exists():
        raise InputError(
            f"{folder}: both {single.name} and {index.name}; remove the one that is stale"
        )
    if not single.exists() and not index.exists():
        raise _nothing_to_open(folder, single.name)
    weight_map = _weight_map(index) if index.exists() else None
    names = sorted(set(weight_map.values())) if weight_map is not None else [single.name]
    with ExitStack() as opened:
        shards: list[Shard] = []
        for name in names:
            path = folder / name
            if not path.exists():
                raise InputError(f"{index}: names {name}, which is missing; fetch it again")
            check_link(path)
            shards.append(Shard(path))
            opened.callback(shards[-1].close)
        _check_tensors(index, weight_map, shards)
        opened.pop_all()
    return Checkpoint(folder, shards)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = load_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: weight_map must map tensor names to file names")
    for name, file in weight_map.items():
        if has_control_characters(name):
            raise InputError(f"{index}: tensor name {name!r} has control characters")
        plain = isinstance(file, str) and (
            PurePosixPath(file).name == PureWindowsPath(file).name == file
            and not has_control_characters(file)
        )
        if not plain or not file.endswith(".safetensors"):
            raise InputError(
                f"{index}: tensor {name} is said to be in {file!r}; "
                "only plain .safetensors file names in the same folder are read"
            )
    return weight_map


def _check_tensors(index: Path, weight_map: dict[str, str] | None, shards: list[Shard]) -> None:
    found: dict[str, str] = {}
    for shard in shards:
        for name in shard.header.tensors:
            if name in found:
                raise InputError(f"{shard.path}: tensor {name} is also in {found[name]}")
            found[name] = shard.path.name
    if not found:
        raise InputError(f"{shards[0].path}: holds no tensors")
    if weight_map is None:
        return
    for name, file in weight_map.items():
        if found.get(name) != file:
            raise InputError(f"{index}: tensor {name} is not in {file}")
    if unnamed := sorted(found.keys() - weight_map.keys()):
        raise InputError(f"{index}: does not name {some(unnamed)} in {found[unnamed[0]]}")


def _nothing_to_open(folder: Path, wanted: str) -> InputError:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if not pickles:
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        hint = f", but {some(others)}" if others else ""
        if wanted == MODEL:
            hint += "; give the folder of a model"
        if wanted == MODEL and "adapter_model.safetensors" in others:
            hint += ": an adapter is merged into its own by fishertool merge BASE+ADAPTER"
        return InputError(f"{folder}: no {wanted} in it{hint}")
    # A pattern, not a name: what is printed to be pasted holds nothing that the folder says.
    weights = [name for name in pickles if fnmatchcase(name, "pytorch_model*.bin")]
    pattern = "pytorch_model*.bin" if weights else f"*{Path(pickles[0]).suffix}"
    return InputError(
        f"{folder / (weights or pickles)[0]}: pickled weights can run code and are not read; "
        'convert them: python -c "import glob, torch; from safetensors.torch import save_file; '
        f"save_file({{k: v.clone().contiguous() for f in sorted(glob.glob('{pattern}')) "
        "for k, v in torch.load(f, weights_only=True).items()}, "
        f"'{wanted}', {{'format': 'pt'}})\""
    )
