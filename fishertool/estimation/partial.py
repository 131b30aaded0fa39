"""A partial result on disk: the sums of one worker, in float64, and what they are sums of.

A run saves one now and then to be resumed from; `--part` writes one; `combine-fisher` adds them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from fishertool.checkpoint.digest import FileDigest
from fishertool.checkpoint.layout import ONE_FILE, Layout
from fishertool.checkpoint.reader import Checkpoint, open_checkpoint
from fishertool.checkpoint.shards import PARTIAL
from fishertool.errors import InputError
from fishertool.fisher.header import FisherHeader
from fishertool.sidecar import write_tensors

KEY = "fishertool.partial"
FORMAT = 1


@dataclass(frozen=True)
class Progress:
    """How far a worker is, and what of its result is not a sum."""

    number: int
    """Of the worker, from 0 on."""
    units: int
    """Units of its share that are done."""
    one_by_one: bool = False
    by_autograd: Sequence[str] = ()
    touched: Sequence[str] = ()
    leaders: Mapping[str, str] = field(default_factory=dict)
    transposed: Sequence[str] = ()
    members: Sequence[int] = ()
    """Of a gradient bank, those that it has, in order."""


@dataclass(frozen=True)
class Job:
    """What all parts of one estimate have in common; equal jobs can be resumed and combined."""

    header: FisherHeader
    kinds: Sequence[str]
    shapes: Mapping[str, Sequence[int]]
    """Of the weights."""
    wanted: Sequence[str]
    """Tensors of the checkpoint that were asked for."""
    bank_dtype: str
    workers: int
    units: int
    """Of all workers."""
    batches_sha256: str
    calibration: Mapping[str, Any]
    labelled: bool = True
    """Whether the targets are known, so that there is a loss."""


@dataclass(frozen=True)
class Partial:
    job: Job
    progress: Progress

    def to_metadata(self) -> dict[str, str]:
        content = {"format": FORMAT, **asdict(self)}
        return {KEY: json.dumps(content, allow_nan=False, sort_keys=True)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], where: str) -> Self:
        """Raises InputError, with `where` in front, if it is no partial result."""
        try:
            content = json.loads(metadata[KEY])
            if content["format"] != FORMAT:
                raise InputError(
                    f"{where}: format {content['format']}, this version reads {FORMAT}; "
                    "estimate it again"
                )
            job, progress = content["job"], content["progress"]
            for found, kind in ((job, Job), (progress, Progress)):
                if set(found) != {item.name for item in fields(kind)}:
                    raise KeyError(kind.__name__)
            header = FisherHeader(**job["header"])
            return cls(Job(**{**job, "header": header}), Progress(**progress))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{where}: not a partial result ({error!r})") from error


def write_partial(
    folder: Path, partial: Partial, sums: Mapping[str, Tensor], stem: str = PARTIAL
) -> tuple[Layout, list[FileDigest]]:
    """In one file, so that one rename replaces it."""
    return write_tensors(folder, stem, partial.to_metadata(), sums, ONE_FILE)


def open_partial(folder: Path, stem: str = PARTIAL) -> tuple[Checkpoint, Partial]:
    """Raises InputError for a folder that holds no partial result."""
    tensors = open_checkpoint(folder, stem=stem)
    try:
        return tensors, Partial.from_metadata(tensors.metadata, str(folder))
    except BaseException:
        tensors.close()
        raise


def difference(one: Job, other: Job) -> str | None:
    """The first thing that two jobs do not have in common, as a message names it."""
    mine, theirs = asdict(one), asdict(other)
    pairs = {**mine.pop("header"), **mine}, {**theirs.pop("header"), **theirs}
    for name, value in pairs[0].items():
        if pairs[1][name] != value:
            small = all(isinstance(found[name], str | int | float) for found in pairs)
            told = f": {value} and {pairs[1][name]}" if small else ""
            return f"{name.replace('_', ' ')}{told}"
    return None
