"""A Fisher sidecar on disk: one safetensors checkpoint a kind, keyed by the model's tensor names.

A sidecar is a folder with `diagonal.safetensors`, `kronecker.safetensors`, ... and a report.
"""

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Self

from torch import Tensor

from fishertool.checkpoint.contents import Contents
from fishertool.checkpoint.digest import FileDigest
from fishertool.checkpoint.dtypes import COMPUTED
from fishertool.checkpoint.header import TensorInfo
from fishertool.checkpoint.layout import Layout, lay_out
from fishertool.checkpoint.reader import Checkpoint, open_checkpoint
from fishertool.checkpoint.shards import check_whole, has_stem
from fishertool.checkpoint.source import TensorSource
from fishertool.checkpoint.stored import FLOATING
from fishertool.checkpoint.writer import CheckpointWriter, write_tensors
from fishertool.errors import InputError
from fishertool.fisher.factored import expand
from fishertool.fisher.header import FisherHeader
from fishertool.fisher.kinds import KINDS, MOMENTS


def open_sidecar(folder: Path, kind: str = "diagonal") -> tuple[Checkpoint, FisherHeader]:
    """Open one kind of a sidecar and check its header against its tensors.

    Raises InputError for a folder that is no sidecar, or one part of it, or has not that kind, and
    as `header_of` does.
    """
    check_whole(folder)
    if folder.is_dir() and kind not in (there := kinds_of(folder)):
        others = f", but {', '.join(there)}" if there else ""
        raise InputError(
            f"{folder}: has no Fisher of kind {kind}{others}; estimate it with --kind {kind}"
        )
    tensors = open_checkpoint(folder, stem=kind)
    try:
        return tensors, header_of(tensors, kind)
    except BaseException:
        tensors.close()
        raise


def header_of(tensors: Contents, kind: str) -> FisherHeader:
    """What the file of a kind says of itself.

    Raises InputError for one of no or another kind, and where header and tensors disagree.
    """
    header = FisherHeader.from_metadata(tensors.metadata, f"{tensors.folder}")
    if header.kind != kind:
        raise InputError(f"{tensors.folder}: says it is {header.kind}, expected {kind}")
    names = set(header.statistics)
    if kind in MOMENTS:
        parts = {f"{leader}#input" for leader in header.leaders.values()}
        parts |= {f"{name}#output" for name in names if kind == "kronecker"}
        agree = set(header.leaders) == names and set(tensors) == parts
    else:
        agree = {weight_of(name) for name in tensors} == names
    if not agree:
        raise InputError(f"{tensors.folder}: its header and its tensors have different names")
    for name, info in tensors.infos().items():
        if info.dtype not in COMPUTED:
            raise InputError(f"{tensors.where(name)}: {info} is no statistic; estimate it again")
    return header


def open_diagonal(folder: Path) -> tuple[Checkpoint, FisherHeader]:
    """Open what a sidecar tells of the diagonal: the diagonal itself, or else the factored Fisher.

    Raises InputError as `open_sidecar` does.
    """
    factored = has_stem(folder, "factored") and not has_stem(folder, "diagonal")
    return open_sidecar(folder, "factored" if factored else "diagonal")


def kinds_of(folder: Path) -> list[str]:
    """Those that a sidecar has; none of a folder that is none."""
    return [kind for kind in KINDS if has_stem(folder, kind)]


def has_diagonal(folder: Path) -> bool:
    """Whether it can be told from what is there, as `open_diagonal` does."""
    return has_stem(folder, "diagonal") or has_stem(folder, "factored")


def read_diagonal(tensors: Checkpoint, name: str, start: int, stop: int) -> Tensor:
    """Rows `[start, stop)` of a weight's diagonal, or of its factored form multiplied out."""
    if name in tensors:
        values = tensors.read(name, start, stop)
    else:
        values = expand(tensors.read(f"{name}#rows", start, stop), tensors.read(f"{name}#columns"))
    check_squares(f"{tensors.folder}: tensor {name}", values)
    return values


def check_squares(where: str, values: Tensor) -> None:
    """Raises InputError unless these may be means of squares."""
    if not bool((values >= 0).all()) or not bool(values.isfinite().all()):
        raise InputError(f"{where}: a Fisher must be finite and not negative")


def read_activation(
    tensors: Checkpoint, header: FisherHeader, name: str, expert: int | None = None
) -> Tensor:
    """Second moment of the input of a linear layer's weight, or of one expert's in a stack, [in, in]."""
    stored = f"{header.leaders[name]}#input"
    if expert is None:
        return tensors.read(stored)
    side = tensors.info(stored).width
    return tensors.read(stored, expert * side, (expert + 1) * side)


def read_kronecker(tensors: Checkpoint, header: FisherHeader, name: str) -> tuple[Tensor, Tensor]:
    """The factors A [in, in] and B [out, out] of a weight's Fisher B kron A.

    As stored they are means over tokens; here B is times the tokens an example has.
    """
    a, b = read_activation(tensors, header, name), tensors.read(f"{name}#output")
    traces = float(a.diagonal().double().sum()) * float(b.diagonal().double().sum())
    return a, b * (header.statistics[name].total / traces if traces > 0 else 1.0)


def oriented(header: FisherHeader, name: str, weight: Tensor) -> Tensor:
    """A weight as [out, in], whichever way its layer has it; applied twice, as it was."""
    return weight.mT if name in header.transposed else weight


def write_sidecar(
    folder: Path, header: FisherHeader, tensors: Mapping[str, Tensor], max_shard_bytes: int
) -> tuple[Layout, list[FileDigest]]:
    """Write one kind."""
    return write_tensors(folder, header.kind, header.to_metadata(), tensors, max_shard_bytes)


class StoredGradients:
    """The gradients of a rank-one sidecar, read from disk when asked for; all, or those of `names`.

    What `fisher.rank_one.RankOneFisher` stands on. Raises InputError for tensors that have not
    one and the same number of members, or cannot be computed with.
    """

    def __init__(self, tensors: Checkpoint, names: Sequence[str] | None = None):
        self._tensors = tensors
        infos = {name: tensors.info(name) for name in (tensors if names is None else names)}
        first = next(iter(infos.values()))
        for name, info in infos.items():
            if info.dtype not in FLOATING or not info.shape or not info.shape[0]:
                raise InputError(f"{tensors.where(name)}: {info} holds no gradients")
            if info.shape[0] != first.shape[0]:
                raise InputError(
                    f"{tensors.where(name)}: has {info.shape[0]} members, {first.name} has "
                    f"{first.shape[0]}; estimate it again"
                )
        self.members = first.shape[0]
        self.sizes = {name: info.elements // self.members for name, info in infos.items()}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of one weight, flat: [member, stop - start], as stored."""
        return self._tensors.read_columns(name, start, stop)


class BankWriter:
    """Writes the members of a gradient bank as they come: each weight's are one tensor [member, ...].

    Opening it reserves the disk space, or with `reopen` goes on with what an earlier run left;
    `finish` checks that every member was written.
    """

    def __init__(
        self,
        folder: Path,
        header: FisherHeader,
        shapes: Mapping[str, Sequence[int]],
        dtype: str,
        members: int,
        max_shard_bytes: int,
        reopen: bool = False,
    ):
        infos = [TensorInfo(name, dtype, (members, *shape)) for name, shape in shapes.items()]
        metadata = header.to_metadata()
        self.layout = lay_out(infos, max_shard_bytes, stem=header.kind, metadata=metadata)
        self._widths = {info.name: info.width for info in infos}
        self._rows = {
            name: prod(shape) // max(self._widths[name], 1) for name, shape in shapes.items()
        }
        self._writer = CheckpointWriter(folder, self.layout, reopen)

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()

    def write(self, name: str, member: int, gradient: Tensor) -> None:
        rows = gradient.reshape(-1, self._widths[name]).cpu()
        self._writer.write(name, rows, member * self._rows[name])

    def count_written(self, member: int) -> None:
        """This member is there from an earlier run."""
        for name, rows in self._rows.items():
            self._writer.count_written(name, member * rows, (member + 1) * rows)

    def sync(self) -> None:
        self._writer.sync()

    def finish(self) -> list[FileDigest]:
        return self._writer.finish()


def weight_of(name: str) -> str:
    """The weight that a stored tensor is about.

    >>> weight_of("layer.0.weight#rows")
    'layer.0.weight'
    """
    return name.partition("#")[0]


def check_fits(
    tensors: Checkpoint,
    header: FisherHeader,
    model: TensorSource,
    way_out: str = "give that model's own",
) -> None:
    """Refuse a sidecar estimated on other weights than these, with the way out."""
    infos = {name: model.info(name) for name in header.statistics if name in model}
    check_shapes(tensors, header, infos, model.folder)
    if header.fingerprint != model.fingerprint():
        raise InputError(
            f"{tensors.folder}: was estimated on other weights ({header.model}) than "
            f"{model.folder}; {way_out}, or estimate it again"
        )


def check_shapes(
    tensors: Checkpoint, header: FisherHeader, weights: Mapping[str, TensorInfo], source: Path
) -> None:
    """Refuse a sidecar with tensors of other shapes than these weights', of which `source` tells."""
    for name in header.statistics:
        if name not in weights:
            raise InputError(f"{tensors.folder}: tensor {name}: {source} has no such tensor")
        info = weights[name]
        if name in header.leaders:
            _check_factors(tensors, header, info, source)
        stored = f"{name}#rows" if header.kind == "factored" and name not in tensors else name
        if stored not in tensors:
            continue
        mine, theirs = info.shape, tensors.info(stored).shape
        if header.kind == "rank-one":
            theirs = theirs[1:]
        elif stored != name:
            theirs = (*theirs, *tensors.info(f"{name}#columns").shape)
            mine = (info.rows, info.width)
        if mine != theirs:
            raise InputError(
                f"{tensors.where(stored)} is {list(theirs)}, but {list(mine)} in {source}"
            )


def _check_factors(
    tensors: Checkpoint, header: FisherHeader, weight: TensorInfo, source: Path
) -> None:
    name, shape = weight.name, weight.shape
    *stack, out, width = shape
    if name in header.transposed:
        out, width = width, out
    parts = {f"{header.leaders[name]}#input": width}
    if header.kind == "kronecker":
        parts[f"{name}#output"] = out
    for part, side in parts.items():
        mine, theirs = [*stack, side, side], list(tensors.info(part).shape)
        if theirs != mine:
            raise InputError(
                f"{tensors.where(part)} is {theirs}, but {name} is {list(shape)} in "
                f"{source}, which needs {mine}"
            )
