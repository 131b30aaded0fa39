"""Carry out a merge plan: read, merge, round and write row pieces, in bounded memory."""

from dataclasses import dataclass
from math import fsum
from pathlib import Path

from fishertool.checkpoint.companions import copy_companions, write_config
from fishertool.checkpoint.digest import FileDigest
from fishertool.checkpoint.dtypes import torch_name
from fishertool.checkpoint.stream import Piece, stream
from fishertool.checkpoint.writer import CheckpointWriter
from fishertool.fisher.predicted_loss import PieceSums, loss_increases_of
from fishertool.progress import Advance
from fishertool.surgery.merge_plan import MergePlan
from fishertool.surgery.merge_tensor import jobs, merge_job
from fishertool.surgery.merge_vocabulary import write_vocabulary


@dataclass(frozen=True)
class Written:
    files: list[FileDigest]
    predicted: dict[str, list[float]]
    """For every tensor merged, by how much each model's loss is predicted to rise, in nats an
    example; empty where sidecars are missing."""

    @property
    def predicted_loss(self) -> list[float] | None:
        """For each model the sum over tensors."""
        return [fsum(column) for column in zip(*self.predicted.values(), strict=True)] or None


def write_merge(plan: MergePlan, folder: Path, threads: int, advance: Advance) -> Written:
    """Stream every tensor of the plan into `folder`, and the companions beside them."""
    increases = PieceSums()
    with CheckpointWriter(folder, plan.layout) as writer:

        def one(job: Piece) -> None:
            for piece, values, part in merge_job(plan, job):
                writer.write(piece.name, values, piece.start)
                if plan.predicts and part is not None and part.fishers:
                    fishers = [fisher.values for fisher in part.fishers]
                    found = loss_increases_of(values.to(fishers[0].dtype), part.models, fishers)
                    increases.add(piece.name, piece.start, found)

        stream(jobs(plan), one, threads, advance)
        digests = writer.finish()
    write_config(plan.first.folder, folder, torch_name(plan.dtype), plan.config)
    copy_companions(plan.first.folder, plan.companions, folder)
    write_vocabulary(plan.vocabulary, plan.inputs.references[0], folder)
    predicted = {name: found.tolist() for name, found in increases.by_tensor().items()}
    return Written(digests, predicted)
