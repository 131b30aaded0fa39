"""The tensors that a report names, held against those that are there."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from fishertool.checkpoint.header import TensorInfo
from fishertool.checkpoint.reader import Checkpoint
from fishertool.errors import InputError, some
from fishertool.fisher.header import FisherHeader
from fishertool.inspection.values import Values
from fishertool.inspection.written import Row
from fishertool.models.low_rank import Factors
from fishertool.sidecar import check_shapes, weight_of

EXPERT = re.compile(r"(.+)\[(\d+)\]")
"""Name of one expert's part of a stack, which is one tensor on disk."""


def faults_of_rows(
    rows: Sequence[Row], checkpoint: Checkpoint, factors: Sequence[Factors]
) -> Iterator[str]:
    """Of a report on a checkpoint's tensors: those that are not there as it says, or not in it.

    `factors` are those that stand in place of dense weights, under whose names it tells of them.
    """
    by_weight = {one.weight: one for one in factors}
    biases = {one.bias: one.up_bias for one in factors}
    missing, other, told = [], [], set()
    for row in rows:
        name = biases.get(row.info.name, row.info.name)
        told |= {name, _stack(name)}
        one = by_weight.get(name)
        if one is not None:
            told |= {one.down, one.up}
            there = f"{one.dtype} [{one.outputs}, {one.inputs}] of rank {one.rank}"
            shapes = ((one.outputs, one.inputs), (one.inputs, one.outputs))
            agrees = (row.info.dtype, row.more.get("rank")) == (one.dtype, one.rank)
            agrees = agrees and row.info.shape in shapes
        elif (info := _info(checkpoint, name)) is None:
            missing.append(name)
            continue
        else:
            there = str(info)
            agrees = (info.dtype, info.shape) == (row.info.dtype, row.info.shape)
        if not agrees:
            other.append(f"{name} ({there}, and {row.info} in the report)")
    if missing:
        yield f"lacks {some(missing)}, of which its report tells"
    if other:
        yield f"has another {some(other)}"
    if untold := [name for name in checkpoint if name not in told]:
        yield f"has {some(untold)}, of which its report does not tell"


def counted(rows: Sequence[Row]) -> set[str]:
    """Tensors of whose zeros a report tells."""
    names = {row.info.name for row in rows if "zeros" in row.more}
    return names | {_stack(name) for name in names}


def faults_of_zeros(rows: Sequence[Row], checkpoint: Checkpoint, values: Values) -> Iterator[str]:
    """Where the share of zeros is not the one that a report tells of."""
    wrong = []
    zeros: Counter[str] = Counter()
    for (name, _), count in values.zeros.items():
        zeros[name] += count
    for row in rows:
        name, share = row.info.name, row.more.get("zeros")
        info = _info(checkpoint, name)
        if share is None or info is None or not info.elements:
            continue
        if name in checkpoint:
            found = zeros[name]
        else:
            [(_, expert)] = EXPERT.findall(name)
            found = values.zeros.get((_stack(name), int(expert)), 0)
        told = isinstance(share, int | float)
        if not (told and abs(share * info.elements - found) < 0.5):
            wrong.append(f"{name} ({found / info.elements:.6g}, and {share} in the report)")
    if wrong:
        yield f"the share of zeros is another in {some(wrong)}"


def faults_of_kind(
    rows: Sequence[Row], tensors: Checkpoint, header: FisherHeader, source: Path
) -> Iterator[str]:
    """Of a report, `source`, on the weights that a kind of Fisher tells of."""
    own = {row.info.name: row.info for row in rows if row.more.get("kind") == header.kind}
    if untold := [name for name in header.statistics if name not in own]:
        yield f"{header.kind}: has {some(untold)}, of which its report does not tell"
    if missing := [name for name in own if name not in header.statistics]:
        yield f"{header.kind}: lacks {some(missing)}, of which its report tells"
    if flat := [name for name in header.leaders if name in own and len(own[name].shape) < 2]:
        yield f"{header.kind}: has factors of {some(flat)}, no matrix by its report"
    elif not untold:
        try:
            check_shapes(tensors, header, own, source)
        except InputError as error:
            yield str(error)
    other = {
        f"{own[name].name} ({info.dtype}, and {own[name].dtype} in the report)": None
        for stored, info in tensors.infos().items()
        if (name := weight_of(stored)) in own and info.dtype != own[name].dtype
    }
    if other:
        yield f"{header.kind}: has another dtype in {some([*other])}"


def _info(checkpoint: Checkpoint, name: str) -> TensorInfo | None:
    """Of a tensor, or of an expert's part of one."""
    if name in checkpoint:
        return checkpoint.info(name)
    match = EXPERT.fullmatch(name)
    if match is None or match[1] not in checkpoint:
        return None
    info = checkpoint.info(match[1])
    inside = len(info.shape) > 2 and int(match[2]) < info.shape[0]
    return replace(info, name=name, shape=info.shape[1:]) if inside else None


def _stack(name: str) -> str:
    match = EXPERT.fullmatch(name)
    return name if match is None else match[1]
