"""The files beside the weights that a loader needs: copied by an allow-list, never code or pickles."""

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from filecmp import cmp
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any, Self

from fishertool.checkpoint.digest import FileDigest, digest
from fishertool.checkpoint.json_files import check_link, load_json, parse_json
from fishertool.checkpoint.staging import REPORT_FILE
from fishertool.errors import InputError

LOADED = (
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "*vocab*.json",
    "vocab.txt",
    "merges.txt",
    "dict.txt",
    "bpe.codes",
    "byte_maps.json",
    "emoji.json",
    "normalizer.json",
    "tekken.json",
    "word_*.json",
    "*.model",
    "*.spm",
    "*.tokenizer",
    "*.tiktoken",
    "chat_template.*",
    "preprocessor_config.json",
    "processor_config.json",
    "*_preprocessor_config.json",
    "sentence_*_config.json",
    "config_sentence_transformers.json",
    "modules.json",
)
TERMS = ("LICENSE*", "NOTICE*")
LOADED_IN_FOLDERS = ("config.json", "*.safetensors", "*.jinja")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
TEMPLATES = "additional_chat_templates"
FORBIDDEN = (".py", ".so", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True)
class Companions:
    """Names relative to the folder."""

    copied: tuple[str, ...]
    left_out: tuple[str, ...]


def find_companions(folder: Path) -> Companions:
    """Sort the files beside the weights into those that go along and those that stay.

    Raises InputError for one that links out of the folder.
    """
    folders = {TEMPLATES, *module_folders(folder)}
    copied, left_out = [], []
    for path in files_of(folder):
        name = path.relative_to(folder)
        top = len(name.parts) == 1
        if top and (name.name == "config.json" or matches(name, WEIGHTS)):
            continue
        if _goes_along(name, folders, (*LOADED, *TERMS)):
            check_link(path)
            copied.append(name.as_posix())
        else:
            left_out.append(name.as_posix())
    return Companions(tuple(copied), tuple(left_out))


def loaded_beside(folder: Path) -> list[str]:
    """Names of the files beside the weights that change what a loader makes of a folder."""
    folders = {TEMPLATES, *module_folders(folder)}
    names = (path.relative_to(folder) for path in files_of(folder))
    return [name.as_posix() for name in names if _goes_along(name, folders, LOADED)]


def _goes_along(name: PurePath, folders: Collection[str], at_the_top: tuple[str, ...]) -> bool:
    top = len(name.parts) == 1
    inside = top or name.parent.as_posix() in folders
    allowed = at_the_top if top else LOADED_IN_FOLDERS
    return inside and matches(name, allowed) and name.suffix.lower() not in FORBIDDEN


def same_file(one: Path, other: Path) -> bool:
    """Whether `other` is there with the bytes of `one`."""
    return other.is_file() and cmp(one, other, shallow=False)


def copy_companions(folder: Path, companions: Companions, out: Path) -> None:
    """Copy contents only, so that the new files get the umask's mode."""
    for name in companions.copied:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, out / name)


def digests_beside(folder: Path, besides: Collection[Path]) -> list[FileDigest]:
    """Of all files that were written into an output's folder but its report, and what is, or lies
    below, one of `besides`; by names relative to the folder."""
    return [
        replace(digest(path, anew=True), file=path.relative_to(folder).as_posix())
        for path in files_of(folder)
        if path != folder / REPORT_FILE and not {path, *path.parents} & {*besides}
    ]


@dataclass(frozen=True)
class Folders:
    """Where a model lies, and what goes along with its weights."""

    top: Path
    checkpoint: Path
    """`top` too, or of sentence-transformers a folder in it."""
    companions: Mapping[Path, Companions]
    """By folder."""

    @classmethod
    def of(cls, top: Path, checkpoint: Path) -> Self:
        """Raises InputError as `find_companions` does."""
        folders = dict.fromkeys([top, checkpoint])
        return cls(top, checkpoint, {folder: find_companions(folder) for folder in folders})

    @property
    def of_top(self) -> Companions:
        return self.companions[self.top]

    def place(self, out: Path) -> Path:
        """Where in an output's folder its checkpoint lies."""
        return out / self.checkpoint.relative_to(self.top)

    def copy(self, out: Path) -> None:
        """Of what lies in the checkpoint's folder, only its own go along."""
        inside = self.checkpoint.relative_to(self.top).as_posix()
        for source, found in self.companions.items():
            copied = found.copied
            if source != self.checkpoint:
                copied = tuple(name for name in copied if not name.startswith(f"{inside}/"))
            place = out / source.relative_to(self.top)
            copy_companions(source, Companions(copied, found.left_out), place)


def write_config(
    folder: Path, out: Path, dtype: str, changes: Mapping[str, Any] | None = None
) -> None:
    """Copy config.json byte for byte, unless it would be untrue of `out`: by dtype, or `changes`."""
    source = folder / "config.json"
    config = load_json(source)
    changed = {key: value for key, value in (changes or {}).items() if config.get(key) != value}
    stated = config.get("dtype", config.get("torch_dtype"))
    if stated not in (None, dtype):
        config.pop("torch_dtype", None)
        changed["dtype"] = dtype
    if changed:
        write_json(out / "config.json", config | changed)
    else:
        shutil.copyfile(source, out / "config.json")


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    # Lone surrogates, which UTF-8 cannot hold, become the escapes that JSON has for them.
    path.write_bytes(text.encode("utf-8", "backslashreplace"))


def module_folders(folder: Path) -> Iterator[str]:
    """Folders that a sentence-transformers modules.json names, such as 1_Pooling."""
    path = folder / "modules.json"
    if not path.exists():
        return
    try:
        for module in parse_json(path):
            yield PurePath(str(module["path"])).as_posix()
    except (TypeError, KeyError) as error:
        raise InputError(f"{path}: not a list of modules: {error}") from error


def files_of(folder: Path) -> Iterator[Path]:
    """Every file below a folder in sorted order; a linked folder as itself; nothing hidden."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        linked = [name for name in folders if Path(parent, name).is_symlink()]
        for name in sorted([*names, *linked]):
            if not name.startswith("."):
                yield Path(parent, name)


def matches(name: PurePath, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name.name, pattern) for pattern in patterns)
