"""The report that lies in an output, read back: what was written there, by its own account."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from fishertool.checkpoint.digest import FileDigest
from fishertool.checkpoint.header import TensorInfo
from fishertool.checkpoint.json_files import load_json
from fishertool.checkpoint.staging import REPORT_FILE
from fishertool.errors import InputError
from fishertool.report import SCHEMA


@dataclass(frozen=True)
class Row:
    """What a report says of one tensor."""

    info: TensorInfo
    action: str
    more: Mapping[str, Any]


@dataclass(frozen=True)
class Written:
    command: str
    options: Mapping[str, Any]
    summary: Mapping[str, Any]
    rows: tuple[Row, ...]
    files: tuple[FileDigest, ...] = ()
    parameters: int | None = None
    dtype: str | None = None
    companions: tuple[FileDigest, ...] = ()

    @property
    def method(self) -> Any:
        """The summary has it where the options leave it to the command."""
        return self.summary.get("method", self.options.get("method"))

    @property
    def figures(self) -> dict[str, Any]:
        """The summary without its lists and tables."""
        single = (str, int, float)
        return {name: one for name, one in self.summary.items() if isinstance(one, single)}


def read_written(folder: Path) -> Written | None:
    """The report of an output; None of a folder without one.

    Raises InputError for a file of its name that is no such report.
    """
    path = folder / REPORT_FILE
    if not path.exists() and not path.is_symlink():
        return None
    document = load_json(path)
    try:
        if document["schema"] != SCHEMA:
            raise ValueError(document["schema"])
        return _written(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not a report that this version reads ({error!r})") from error


def _written(document: Mapping[str, Any]) -> Written:
    options, summary = (_is(document[name], dict) for name in ("options", "summary"))
    rows = tuple(_row(one) for one in _is(document["tensors"], list))
    found = Written(_is(document["command"], str), options, summary, rows)
    output = document["output"]
    if output is None:
        return found
    return Written(
        found.command,
        options,
        summary,
        rows,
        tuple(map(_file, _is(output["files"], list))),
        _is(output["parameters"], int),
        _is(output["dtype"], str),
        tuple(map(_companion, _is(output["companions"], list))),
    )


def _file(entry: Mapping[str, Any]) -> FileDigest:
    found = _companion(entry)
    if PurePath(found.file).name != found.file:
        raise ValueError(found.file)
    return found


def _companion(entry: Mapping[str, Any]) -> FileDigest:
    return FileDigest(_inside(entry["file"]), _is(entry["bytes"], int), _is(entry["sha256"], str))


def _row(entry: Mapping[str, Any]) -> Row:
    shape = tuple(_is(size, int) for size in _is(entry["shape"], list))
    info = TensorInfo(_is(entry["name"], str), _is(entry["dtype"], str), shape)
    more = {name: one for name, one in entry.items() if name not in ("name", "dtype", "shape")}
    return Row(info, _is(entry["action"], str), more)


def _inside(name: Any) -> str:
    """The name of a file below the folder."""
    path = PurePath(_is(name, str))
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(name)
    return str(name)


def _is(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r:.50} is no {kind.__name__}")
    return value
