"""Which of the things that this tool reads or writes a folder is."""

from dataclasses import dataclass
from pathlib import Path

from fishertool.checkpoint.reader import Checkpoint, open_checkpoint
from fishertool.checkpoint.shards import PARTIAL
from fishertool.estimation.partial import Partial, open_partial
from fishertool.fisher.header import FisherHeader
from fishertool.models.adapters import STEM
from fishertool.models.sentence import weights_folder
from fishertool.sidecar import has_kind, kinds_of, open_sidecar

MODEL = "model"
About = FisherHeader | Partial | None
"""What the file of a Fisher says of itself."""


@dataclass(frozen=True)
class Place:
    what: str
    """checkpoint, adapter, sidecar, or part of an estimate."""
    top: Path
    weights: Path
    """Where the files with tensors lie; of sentence-transformers that may be a folder below."""
    stems: tuple[str, ...]
    """Of these files' names."""

    def open(self, stem: str) -> tuple[Checkpoint, About]:
        """Open the files of one stem by their headers.

        Raises InputError as open_checkpoint, open_sidecar and open_partial do.
        """
        if stem == PARTIAL:
            return open_partial(self.weights)
        if self.what == "sidecar":
            return open_sidecar(self.weights, stem)
        return open_checkpoint(self.weights, stem), None


def place_of(top: Path) -> Place:
    """By names of files alone; a folder that has none of them is taken for a checkpoint.

    Raises InputError for a modules.json that does not say where the transformer lies.
    """
    if has_kind(top, PARTIAL):
        return Place("part", top, top, (PARTIAL, *kinds_of(top)))
    if not has_kind(top, MODEL):
        if kinds := kinds_of(top):
            return Place("sidecar", top, top, tuple(kinds))
        if has_kind(top, STEM):
            return Place("adapter", top, top, (STEM,))
    return Place("checkpoint", top, weights_folder(top), (MODEL,))
