"""A merge as an adapter: what it changes in a base, by low rank."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from fishertool.checkpoint.digest import FileDigest
from fishertool.checkpoint.stream import Piece
from fishertool.models.lora_writer import LoraWriter
from fishertool.models.sources import open_source
from fishertool.progress import Advance
from fishertool.surgery.merge_plan import MergePlan
from fishertool.surgery.merge_tensor import merge_job


def open_lora(opened: ExitStack, base: str, name: str, rank: int) -> LoraWriter:
    """A writer of adapters of this rank for a base, which reports call `name`."""
    return LoraWriter(opened.enter_context(open_source(base)), name, rank)


def write_lora(
    plan: MergePlan, writer: LoraWriter, folder: Path, advance: Advance
) -> tuple[list[FileDigest], dict[str, dict[str, Any]]]:
    """Merge a tensor at a time and write what differs from the base; what became of each by name."""
    told = {}
    for info in plan.outputs():
        job = Piece(info.name, 0, info.rows, info.elements)
        rows = [values for _, values, _ in merge_job(plan, job)]
        told[info.name] = writer.add(info.name, torch.cat(rows).reshape(info.shape))
        advance(info.elements)
    return writer.write(folder), told
