"""Write a pruned checkpoint: new weights in place of old ones, everything else copied."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fishertool.checkpoint.companions import copy_from_folders, write_config
from fishertool.checkpoint.digest import FileDigest
from fishertool.checkpoint.reader import Checkpoint
from fishertool.checkpoint.source import check_finite
from fishertool.checkpoint.stream import Piece, collect, pieces
from fishertool.checkpoint.writer import CheckpointWriter
from fishertool.fisher.sums import Computed
from fishertool.models.recovery import as_stored, check_trained
from fishertool.progress import Advance
from fishertool.pruning.parts.masks import pack
from fishertool.sidecar import write_tensors
from fishertool.surgery.prune_plan import PrunePlan, mask_name
from fishertool.surgery.prune_stage import ONE_FILE

MASK_STEM, MASK_KEY = "pruning_mask", "fishertool.mask"


def write_pruned(
    plan: PrunePlan,
    pruned: Checkpoint,
    trained: Mapping[str, Tensor],
    folder: Path,
    threads: int,
    advance: Advance,
) -> tuple[list[FileDigest], dict[str, int]]:
    """Stream every tensor into `folder`, with config and companions; `trained` ones as they are.

    Also returns how many zeros each pruned one has, with those it had before.
    """
    place = folder / plan.checkpoint.folder.relative_to(plan.top)
    place.mkdir(parents=True, exist_ok=True)
    for shard in plan.layout.shards:
        (place / shard.file).unlink(missing_ok=True)  # of a run that was killed while it wrote
    zeros = {matrix.name: 0 for matrix in plan.matrices}
    with CheckpointWriter(place, plan.layout) as writer:

        def one(piece: Piece) -> int:
            source = pruned if piece.name in zeros else plan.checkpoint
            values = source.read(piece.name, piece.start, piece.stop)
            if piece.name in trained:
                rows = trained[piece.name].detach()[piece.start : piece.stop]
                values = as_stored(rows.cpu(), values)
            if not plan.allow_nonfinite and piece.name in trained:
                check_trained(piece.name, values)
            elif not plan.allow_nonfinite:
                check_finite(plan.checkpoint, piece.name, values)
            writer.write(piece.name, values, piece.start)
            return int((values == 0).sum()) if piece.name in zeros else 0

        def count(piece: Piece, found: int) -> None:
            if piece.name in zeros:
                zeros[piece.name] += found
            advance(piece.elements)

        outputs = [tensor for shard in plan.layout.shards for tensor in shard.tensors]
        collect(pieces(outputs), one, threads, count)
        digests = writer.finish()
    write_config(plan.checkpoint.folder, place, plan.layout.dtype)
    copy_from_folders(plan.top, plan.checkpoint.folder, plan.companions, folder)
    return digests, zeros


def write_mask(plan: PrunePlan, pruned: Checkpoint, folder: Path) -> list[FileDigest]:
    """All masks in one file, eight weights a byte; shapes are in its metadata."""
    shapes = {
        matrix.name: list(plan.checkpoint.info(matrix.name).shape) for matrix in plan.matrices
    }
    packed = Computed(list(shapes), lambda name: pack(pruned[mask_name(name)]))
    (folder / f"{MASK_STEM}.safetensors").unlink(missing_ok=True)  # of a run that was killed
    metadata = {MASK_KEY: json.dumps({"bits": "little", "shapes": shapes})}
    _, digests = write_tensors(folder, MASK_STEM, metadata, packed, ONE_FILE)
    return digests
