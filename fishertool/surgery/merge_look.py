"""Passes over whole tensors before they are merged, where a method needs them."""

from collections.abc import Iterator, Sequence
from typing import Any

from fishertool.checkpoint.header import TensorInfo
from fishertool.checkpoint.stream import PIECE_ELEMENTS, Piece, collect, pieces
from fishertool.merging.method import Pass
from fishertool.surgery.merge_plan import MergePlan
from fishertool.surgery.merge_tensor import (
    Look,
    computed_in,
    passes_of,
    reader,
    shown_to_passes,
)

GROUP_ELEMENTS = 1 << 25
"""What is read again soon is still in the page cache."""
GROUP_TENSORS = 32
"""Of each, what the passes sum up is in memory: for ties up to a MB a model."""


def groups(plan: MergePlan) -> Iterator[list[TensorInfo]]:
    """The output's tensors in their order, in groups that are looked at and merged in turn."""
    outputs = plan.layout.tensors
    if plan.method.whole is None:
        yield outputs
        return
    group: list[TensorInfo] = []
    for info in outputs:
        elements = sum(one.elements for one in group) + info.elements
        if group and (elements > GROUP_ELEMENTS or len(group) == GROUP_TENSORS):
            yield group
            group = []
        group.append(info)
    yield group


def look(plan: MergePlan, group: Sequence[TensorInfo], threads: int) -> dict[str, Look]:
    """Make the method's passes over each of these tensors that is more than one piece.

    The threads share the pieces of all; a pass adds up those of a tensor in their order.
    """
    if plan.method.whole is None:
        return {}
    merged = [
        plan.targets[info.name]
        for info in group
        if info.elements > PIECE_ELEMENTS and plan.targets[info.name].action == "merge"
    ]
    running = {target.info.name: passes_of(plan, target) for target in merged}
    shown = shown_to_passes(plan)
    found: dict[str, Look] = {}
    wanted: dict[str, Pass] = {}
    totals: dict[str, Any] = {}
    looked = False

    def go_on(name: str) -> None:
        try:
            passes = running[name]
            wanted[name] = passes.send(totals.pop(name)) if name in totals else next(passes)
        except StopIteration as end:
            found[name] = Look(end.value, looked)
            wanted.pop(name, None)

    def one(piece: Piece) -> Any:
        target = plan.targets[piece.name]
        part = reader(plan, target, trusted=looked)(piece).to(computed_in(plan, target))
        return wanted[piece.name](*part[:shown])

    def add(piece: Piece, part: Any) -> None:
        total = totals.get(piece.name)
        totals[piece.name] = part if total is None else total + part

    for name in running:
        go_on(name)
    while wanted:
        collect(pieces(t.info for t in merged if t.info.name in wanted), one, threads, add)
        looked = True
        for name in list(wanted):
            go_on(name)
    return found
