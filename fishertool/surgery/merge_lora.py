"""A merge as an adapter: what it changes in a base, by low rank."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fishertool.checkpoint.digest import FileDigest
from fishertool.checkpoint.dtypes import NAMES
from fishertool.errors import InputError, some
from fishertool.models.lora_writer import LoraWriter
from fishertool.models.sources import public_reference
from fishertool.paths import expanded
from fishertool.progress import Advance
from fishertool.surgery.merge_look import look
from fishertool.surgery.merge_plan import MergePlan
from fishertool.surgery.merge_tensor import computed_in, cut, merge_piece

WAY_OUT = "--as-lora needs a base of the models' architecture, with their head"


def open_lora(plan: MergePlan, base: str, rank: int) -> LoraWriter:
    """A writer of adapters of this rank for a base, one of the plan's sources.

    Raises InputError for a base that lacks a tensor of the merge, or has it in another shape, and
    for a weight that is merged and that no adapter can hold.
    """
    source = plan.inputs.sources[plan.inputs.references.index(base)]
    outputs = plan.layout.tensors
    if lost := [info.name for info in outputs if info.name not in source]:
        raise InputError(f"{source.folder}: lacks {some(lost)}, which the merge has; {WAY_OUT}")
    for info in outputs:
        if source.info(info.name).shape != info.shape:
            raise InputError(
                f"{source.where(info.name)} is {source.info(info.name)}, but {info} in the merge; "
                f"{WAY_OUT}"
            )
    name, revision = _name_for_peft(base)
    writer = LoraWriter(source, name, rank, revision)
    merged = [
        name
        for name, target in plan.targets.items()
        if target.action in ("merge", "average") and target.info.elements
    ]
    if lost := writer.cannot_hold(merged):
        more = f", nor {len(lost) - 1} more" if len(lost) > 1 else ""
        raise InputError(
            f"{source.where(lost[0])}: no adapter can hold it{more}, as of experts that are "
            "fused on load; leave them out with --exclude where the "
            "models have them as the base has, or merge without --as-lora"
        )
    return writer


def _name_for_peft(base: str) -> tuple[str, str | None]:
    """What peft finds the base by, and its revision: it takes a bare name for a folder where it is
    run, or for somebody's model on the Hub, so that a folder is named by its whole path."""
    folder = expanded(base)
    if folder.is_dir():
        return str(folder.resolve()), None
    name, _, revision = base.partition("@")
    return name, revision or None


def told_of_base(base: str) -> list[str]:
    """What to tell of an adapter whose base is a folder."""
    if not expanded(base).is_dir():
        return []
    return [
        f"adapter_config.json names its base, {public_reference(base)}, by its folder on this "
        "machine; where others are to load the adapter, give --base as a Hub id"
    ]


def write_lora(
    plan: MergePlan, writer: LoraWriter, folder: Path, advance: Advance
) -> tuple[list[FileDigest], dict[str, dict[str, Any]]]:
    """Merge a tensor at a time and write what differs from the base; what became of each by name.

    Merges are rounded after the base is subtracted: a change may be smaller than a stored dtype
    tells apart.
    """
    targets = {
        name: replace(target, info=replace(target.info, dtype=NAMES[computed_in(plan, target)]))
        if target.action in ("merge", "average")
        else target
        for name, target in plan.targets.items()
    }
    plan = replace(plan, targets=targets)
    told: dict[str, dict[str, Any]] = {}
    for info in plan.layout.tensors:
        if not info.elements:
            told[info.name] = {"action": "as-base"}
            continue
        looks = look(plan, [info], threads=1)
        rows = [merge_piece(plan, piece, looks.get(info.name))[0] for piece in cut(plan, [info])]
        told[info.name] = writer.add(info.name, torch.cat(rows).reshape(info.shape))
        advance(info.elements)
    return writer.write(folder), told
