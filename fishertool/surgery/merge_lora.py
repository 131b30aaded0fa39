"""A merge as an adapter: what it changes in a base, by low rank."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from fishertool.checkpoint.digest import FileDigest
from fishertool.models.lora_writer import LoraWriter
from fishertool.models.sources import open_source
from fishertool.progress import Advance
from fishertool.surgery.merge_look import look
from fishertool.surgery.merge_plan import MergePlan
from fishertool.surgery.merge_tensor import cut, merge_piece


def open_lora(opened: ExitStack, base: str, name: str, rank: int) -> LoraWriter:
    """A writer of adapters of this rank for a base, which reports call `name`."""
    return LoraWriter(opened.enter_context(open_source(base)), name, rank)


def write_lora(
    plan: MergePlan, writer: LoraWriter, folder: Path, advance: Advance
) -> tuple[list[FileDigest], dict[str, dict[str, Any]]]:
    """Merge a tensor at a time and write what differs from the base; what became of each by name."""
    told: dict[str, dict[str, Any]] = {}
    for info in plan.outputs():
        if not info.elements:
            told[info.name] = {"action": "as-base"}
            continue
        looks = look(plan, [info], threads=1)
        rows = [merge_piece(plan, piece, looks.get(info.name))[0] for piece in cut(plan, [info])]
        told[info.name] = writer.add(info.name, torch.cat(rows).reshape(info.shape))
        advance(info.elements)
    return writer.write(folder), told
