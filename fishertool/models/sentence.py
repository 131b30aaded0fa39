"""The folders of an embedding model: a transformer's, and of the modules behind it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fishertool.checkpoint.json_files import load_json, parse_json
from fishertool.checkpoint.shards import MODEL, has_stem
from fishertool.errors import InputError

PACKAGE = "sentence_transformers."
KINDS = ("Transformer", "Pooling", "Dense", "Normalize")


@dataclass(frozen=True)
class Pipeline:
    """A folder in the layout of sentence-transformers, by its modules.json."""

    folder: Path
    modules: list[tuple[str, Path]]
    """Kind, one of KINDS, and folder of each; the transformer is the first."""

    @property
    def transformer(self) -> Path:
        return self.modules[0][1]

    def folders_of(self, kind: str) -> list[Path]:
        return [folder for one, folder in self.modules if one == kind]

    def max_length(self) -> int | None:
        """Tokens a text may have."""
        return self._settings().get("max_seq_length")

    def warnings(self) -> list[str]:
        told = [
            f"{folder.name}: has a file of its own; its weights take part, but get no Fisher"
            for folder in self.folders_of("Dense")
        ]
        if self._settings().get("do_lower_case"):
            told.append("do_lower_case is left to the tokenizer")
        path = self.folder / "config_sentence_transformers.json"
        prompts = (load_json(path).get("prompts") if path.is_file() else None) or {}
        if names := [name for name, text in prompts.items() if text]:
            told.append(
                f"the model's prompts ({', '.join(names)}) are not added; where it wants them, "
                "put them into the data"
            )
        return told

    def _settings(self) -> dict[str, Any]:
        paths = sorted(self.transformer.glob("sentence_*_config.json"))
        return load_json(paths[0]) if paths else {}


def pipeline_of(folder: Path) -> Pipeline | None:
    """What modules.json in this folder says, or in the one above that has it for a transformer.

    Raises InputError for a module that is not served, by its name.
    """
    for top in (folder, folder.parent):
        path = top / "modules.json"
        if path.is_file():
            entries = _entries(path)
            if top == folder or (entries and top / entries[0][1] == folder):
                return Pipeline(top, _modules(path, entries))
    return None


def transformer_folder(folder: Path) -> Path:
    """Where the transformer's checkpoint lies: here, or in a folder that modules.json names."""
    pipeline = pipeline_of(folder)
    return folder if pipeline is None else pipeline.transformer


def weights_folder(folder: Path) -> Path:
    """The same for what reads only weights, to which modules that are not served do not matter."""
    return folder if has_stem(folder, MODEL) else transformer_folder(folder)


def _entries(path: Path) -> list[tuple[str, str]]:
    """Type and path of each module that modules.json lists."""
    try:
        return [(str(module["type"]), str(module["path"])) for module in parse_json(path)]
    except (TypeError, KeyError) as error:
        raise InputError(f"{path}: not a list of modules: {error!r}") from error


def _modules(path: Path, entries: Sequence[tuple[str, str]]) -> list[tuple[str, Path]]:
    modules = []
    for number, (name, place) in enumerate(entries):
        kind = name.rpartition(".")[2]
        if not name.startswith(PACKAGE) or kind not in KINDS or (kind == KINDS[0]) != (number == 0):
            raise InputError(
                f"{path}: module {number} is {name}, which is not served there; served are a "
                f"Transformer first, then {', '.join(KINDS[1:])}"
            )
        parts = PurePosixPath(place)
        if parts.is_absolute() or ".." in parts.parts:
            raise InputError(f"{path}: module {number} lies out of the folder, in {place!r}")
        modules.append((kind, path.parent / parts))
    if not any(kind == "Pooling" for kind, _ in modules):
        raise InputError(f"{path}: has no Pooling module, so a text has no vector")
    return modules
