"""Which of the things that this tool reads or writes a folder is."""

from dataclasses import dataclass
from pathlib import Path

from fishertool.checkpoint.shards import MODEL, PARTIAL, has_stem
from fishertool.models.adapter_options import STEM
from fishertool.models.sentence import weights_folder


@dataclass(frozen=True)
class Place:
    what: str
    """checkpoint, adapter, sidecar, or part of an estimate."""
    top: Path
    weights: Path
    """Where the files with tensors lie; of sentence-transformers that may be a folder below."""
    stems: tuple[str, ...]
    """Of these files' names."""


def place_of(top: Path) -> Place:
    """By names of files alone; a folder that has none of them is taken for a checkpoint.

    Raises InputError for a modules.json that does not say where the transformer lies.
    """
    if has_stem(top, MODEL) and not has_stem(top, PARTIAL):
        return Place("checkpoint", top, weights_folder(top), (MODEL,))
    from fishertool.sidecar import kinds_of  # by which torch is loaded

    if has_stem(top, PARTIAL):
        return Place("part", top, top, (PARTIAL, *kinds_of(top)))
    if kinds := kinds_of(top):
        return Place("sidecar", top, top, tuple(kinds))
    if has_stem(top, STEM):
        return Place("adapter", top, top, (STEM,))
    return Place("checkpoint", top, weights_folder(top), (MODEL,))
