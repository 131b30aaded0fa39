"""What a checkpoint holds, as the headers of its files tell; no tensor is read."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fishertool.checkpoint.header import Header, TensorInfo
from fishertool.checkpoint.json_files import load_json
from fishertool.checkpoint.shards import MODEL, read_headers
from fishertool.errors import InputError


class Contents:
    """Names and shapes of a folder's tensors.

    Names iterate in file order, so that a loop over them reads each file front to back.
    """

    def __init__(self, folder: Path, headers: Mapping[Path, Header]):
        self.folder = folder
        self.headers = headers
        """By file."""
        self._infos: dict[str, TensorInfo] = {}
        self._file_of: dict[str, Path] = {}
        for path, header in headers.items():
            ordered = sorted(header.tensors.values(), key=lambda tensor: tensor.start)
            self._infos |= {tensor.name: tensor for tensor in ordered}
            self._file_of |= {tensor.name: path for tensor in ordered}

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the first file's header carries besides tensors."""
        return next(iter(self.headers.values())).metadata

    def info(self, name: str) -> TensorInfo:
        return self._infos[name]

    def infos(self) -> dict[str, TensorInfo]:
        return dict(self._infos)

    def where(self, name: str) -> str:
        """File and tensor, as messages name them."""
        return f"{self._file_of[name]}: tensor {name}"

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


def read_contents(folder: Path, stem: str = MODEL) -> Contents:
    """Of the files that `open_checkpoint` opens. Raises InputError as `read_headers` does."""
    return Contents(folder, read_headers(folder, stem))
