"""A partial result on disk: the sums of one worker, in float64, and what they are sums of.

A run saves one now and then to be resumed from; `--part` writes one; `combine-fisher` adds them.
"""

import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from fishertool.checkpoint.contents import Contents
from fishertool.checkpoint.digest import FileDigest
from fishertool.checkpoint.layout import ONE_FILE, Layout
from fishertool.checkpoint.reader import Checkpoint, open_checkpoint
from fishertool.checkpoint.shards import PARTIAL
from fishertool.checkpoint.writer import write_tensors
from fishertool.errors import InputError, some
from fishertool.estimation.settings import BANK_DTYPES
from fishertool.fisher.header import FisherHeader
from fishertool.fisher.kinds import KINDS

KEY, SUMS_KEY = "fishertool.partial", "fishertool.sums"
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
                _check_types(found, kind)
            header = FisherHeader(**job["header"])
            partial = cls(Job(**{**job, "header": header}), Progress(**progress))
            _check_values(partial)
            return partial
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{where}: not a partial result ({error!r})") from error


def write_partial(
    folder: Path, partial: Partial, sums: Mapping[str, Tensor], stem: str = PARTIAL
) -> tuple[Layout, list[FileDigest]]:
    """In one file, so that one rename replaces it. It names its sums, as what is absent from a sum
    would go unnoticed."""
    metadata = partial.to_metadata() | {SUMS_KEY: json.dumps(sorted(sums))}
    return write_tensors(folder, stem, metadata, sums, ONE_FILE)


def open_partial(folder: Path, stem: str = PARTIAL) -> tuple[Checkpoint, Partial]:
    """Raises InputError for a folder that holds no partial result, or one without all its sums."""
    tensors = open_checkpoint(folder, stem=stem)
    try:
        return tensors, partial_of(tensors)
    except BaseException:
        tensors.close()
        raise


def partial_of(tensors: Contents) -> Partial:
    """What the file of a partial result says of itself.

    Raises InputError if it is none, or lacks sums that it was written with.
    """
    where = str(tensors.folder)
    partial = Partial.from_metadata(tensors.metadata, where)
    if apart := sorted(set(tensors) ^ _names(tensors.metadata.get(SUMS_KEY), where)):
        raise InputError(
            f"{where}: its sums are not those that it was written with, by {some(apart)}; "
            "estimate it again"
        )
    return partial


def _names(text: str | None, where: str) -> set[str]:
    try:
        return set(json.loads(text or ""))
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: not a partial result ({error!r})") from error


def _check_types(found: Mapping[str, Any], kind: type) -> None:
    """Raises TypeError unless these are the fields of a dataclass, as JSON has them."""
    for name, hint in typing.get_type_hints(kind).items():
        if name in found and not _is(found[name], hint):
            raise TypeError(f"{name}: {found[name]!r:.50}")


def _is(value: Any, hint: Any) -> bool:
    origin, of = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_is(value, one) for one in of)
    if origin in (Mapping, dict):
        return isinstance(value, dict) and all(_is(one, of[1]) for one in value.values())
    if origin in (Sequence, list):
        return isinstance(value, list) and all(_is(one, of[0]) for one in value)
    if is_dataclass(hint):
        if isinstance(value, dict):
            _check_types(value, typing.cast(type, hint))
        return isinstance(value, dict)
    whole = isinstance(value, hint) and isinstance(value, bool) == (hint is bool)
    return whole or (hint is float and _is(value, int))


def _check_values(partial: Partial) -> None:
    """Raises ValueError for what no estimate has."""
    job, progress = partial.job, partial.progress
    positive = (job.header.examples, job.header.tokens + 1, job.header.group, job.workers)
    sizes = [
        job.units + 1,
        progress.units + 1,
        *(n + 1 for one in job.shapes.values() for n in one),
    ]
    if min(*positive, *sizes) < 1 or not 0 <= progress.number < job.workers:
        raise ValueError("a number out of range")
    if not job.kinds or not set(job.kinds) <= set(KINDS) or job.bank_dtype not in BANK_DTYPES:
        raise ValueError(f"kinds {some(list(job.kinds))}, {job.bank_dtype}")
    used = {*progress.leaders, *progress.leaders.values(), *progress.transposed}
    if foreign := sorted(name for name in used if len(job.shapes.get(name, ())) not in (2, 3)):
        raise ValueError(f"no linear layers {some(foreign)}")


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
