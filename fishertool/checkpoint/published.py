"""What of an output folder may be published: opened weights, and files by an allow-list."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

from fishertool.checkpoint.companions import (
    FORBIDDEN,
    LOADED,
    TEMPLATES,
    TERMS,
    WEIGHTS,
    files_of,
    matches,
    module_folders,
)
from fishertool.checkpoint.header import Header
from fishertool.checkpoint.json_files import check_link
from fishertool.checkpoint.shards import check_whole, read_headers
from fishertool.checkpoint.staging import REPORT_FILE
from fishertool.errors import InputError

CARD = "README.md"
CONFIGS = ("config.json", "adapter_config.json")
WEIGHT_FILE = re.compile(r"(.+?)(?:-\d{5}-of-\d{5})?\.safetensors(?:\.index\.json)?")


@dataclass(frozen=True)
class Published:
    """Names are relative to the folder, with a slash between parts."""

    folder: Path
    weights: Mapping[str, Header]
    """By file; without the indexes."""
    sent: tuple[str, ...]
    """Weights and indexes too."""
    left_out: tuple[str, ...]

    @property
    def place(self) -> Path:
        """The folder that the report's files are in: the first of those with weights."""
        return (self.folder / next(iter(self.weights))).parent

    @property
    def is_model(self) -> bool:
        """Whether it has what config.json is about."""
        return any(PurePath(name).name.startswith("model") for name in self.weights)


def open_published(folder: Path) -> Published:
    """Open every checkpoint in a folder, and in those that its modules.json names, by headers alone.

    Raises InputError for what read_headers refuses, for a part of an estimate, for a model without
    config.json, and for a file that links out of the folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the output of a run")
    check_whole(folder)
    folders = dict.fromkeys(["", *filter(_is_inside(folder), module_folders(folder))])
    weights: dict[str, Header] = {}
    opened: set[str] = set()
    for place in (folder / name for name in folders):
        for stem in sorted(_stems(place)):
            headers = read_headers(place, stem)
            names = {path.relative_to(folder).as_posix(): one for path, one in headers.items()}
            weights |= names
            index = place / f"{stem}.safetensors.index.json"
            opened |= {*names, *([index.relative_to(folder).as_posix()] if index.exists() else ())}
    if not weights:
        read_headers(folder)  # which says what is there instead
    sent, left_out = [], [path.name for path in sorted(folder.iterdir()) if _is_hidden(path)]
    for path in files_of(folder):
        name = path.relative_to(folder)
        if name.as_posix() in opened or (path.is_file() and _may_go(name, folders.keys())):
            check_link(path)
            sent.append(name.as_posix())
        else:
            left_out.append(name.as_posix())
    found = Published(folder, weights, tuple(sent), tuple(left_out))
    if found.is_model and not (found.place / "config.json").is_file():
        raise InputError(
            f"{found.place / 'config.json'}: missing; a checkpoint is a folder with a config.json"
        )
    return found


def is_replaced(name: str, sent: tuple[str, ...]) -> bool:
    """Whether a file on the Hub is weights of an earlier push that a loader would prefer or mix up.

    >>> is_replaced("model.safetensors", ("model-00001-of-00002.safetensors",))
    True
    >>> is_replaced("diagonal.safetensors", ("model.safetensors",))
    False
    """
    return name not in sent and _whose(name) in {_whose(one) for one in sent} - {None}


def _whose(name: str) -> tuple[str, str] | None:
    """Folder and stem of a file of weights, or of an index."""
    path = PurePath(name)
    match = WEIGHT_FILE.fullmatch(path.name)
    return match and (path.parent.as_posix(), match[1])


def _stems(folder: Path) -> set[str]:
    """Of the checkpoints in a folder; shards beside a whole one are nobody's."""
    if not folder.is_dir():
        return set()
    names = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    return {match[1] for match in map(WEIGHT_FILE.fullmatch, names) if match}


def _may_go(name: PurePath, folders: Collection[str]) -> bool:
    if name.suffix.lower() in FORBIDDEN or matches(name, WEIGHTS):
        return False
    place = _place(name)
    if name.parent.name == TEMPLATES:
        return _place(name.parent) in folders and fnmatchcase(name.name, "*.jinja")
    if not place and name.name in (CARD, REPORT_FILE):
        return True
    return place in folders and (name.name in CONFIGS or matches(name, (*LOADED, *TERMS)))


def _place(name: PurePath) -> str:
    """The folder that a name is in, as modules.json writes it."""
    return "" if len(name.parts) == 1 else name.parent.as_posix()


def _is_inside(folder: Path) -> Callable[[str], bool]:
    """Whether a folder that modules.json names is one below, and not a link."""

    def inside(name: str) -> bool:
        parts = PurePath(name).parts
        return bool(parts) and ".." not in parts and not (folder / name).is_symlink()

    return inside


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".")
