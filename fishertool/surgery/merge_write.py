"""Carry out a merge plan: read, merge, round and write row pieces, in bounded memory."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fishertool.checkpoint.companions import copy_companions, write_config
from fishertool.checkpoint.digest import FileDigest
from fishertool.checkpoint.stream import Piece
from fishertool.checkpoint.writer import CheckpointWriter
from fishertool.models.chat_template import FILE as TEMPLATE_FILE
from fishertool.progress import Advance
from fishertool.surgery.merge_pass import Passed, merge_pass
from fishertool.surgery.merge_plan import MergePlan
from fishertool.surgery.merge_vocabulary import write_vocabulary


@dataclass(frozen=True)
class Written:
    files: list[FileDigest]
    passed: Passed
    """What the pass over all weights found out."""


def write_merge(
    plan: MergePlan, folder: Path, threads: int, advance: Advance, *, to_base: bool = False
) -> Written:
    """Stream every tensor of the plan into `folder`, and the companions beside them."""
    with CheckpointWriter(folder, plan.layout) as writer:

        def put(piece: Piece, values: Tensor) -> None:
            writer.write(piece.name, values, piece.start)

        passed = merge_pass(plan, put, threads, advance, to_base=to_base)
        digests = writer.finish()
    write_config(plan.first.folder, folder, plan.layout.dtype, plan.config)
    copy_companions(plan.first.folder, plan.companions, folder)
    write_vocabulary(plan.vocabulary, plan.inputs.references[0], folder)
    if plan.chat_template is not None:
        (folder / TEMPLATE_FILE).write_text(plan.chat_template, encoding="utf-8")
    return Written(digests, passed)
