"""Carry out a merge plan: read, merge, round and write row pieces, in bounded memory."""

from pathlib import Path

from fishertool.checkpoint.companions import copy_companions, write_config
from fishertool.checkpoint.digest import FileDigest
from fishertool.checkpoint.dtypes import torch_name
from fishertool.checkpoint.stream import Piece, stream
from fishertool.checkpoint.writer import CheckpointWriter
from fishertool.progress import Advance
from fishertool.surgery.merge_plan import MergePlan
from fishertool.surgery.merge_tensor import jobs, merge_job


def write_merge(plan: MergePlan, folder: Path, threads: int, advance: Advance) -> list[FileDigest]:
    """Stream every tensor of the plan into `folder`, and the companions beside them."""
    with CheckpointWriter(folder, plan.layout) as writer:

        def one(job: Piece) -> None:
            for piece, values, _ in merge_job(plan, job):
                writer.write(piece.name, values, piece.start)

        stream(jobs(plan), one, threads, advance)
        digests = writer.finish()
    write_config(plan.first.folder, folder, torch_name(plan.dtype), plan.config)
    copy_companions(plan.first.folder, plan.companions, folder)
    return digests
