"""Write a pruned checkpoint: new weights in place of old ones, everything else copied."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fishertool.checkpoint.companions import write_config
from fishertool.checkpoint.digest import FileDigest
from fishertool.checkpoint.layout import ONE_FILE
from fishertool.checkpoint.reader import Checkpoint
from fishertool.checkpoint.source import check_finite
from fishertool.checkpoint.stream import Piece, collect, pieces
from fishertool.checkpoint.writer import CheckpointWriter, write_tensors
from fishertool.fisher.sums import Computed
from fishertool.models.recovery import as_stored, check_trained
from fishertool.progress import Advance
from fishertool.pruning.parts.masks import pack
from fishertool.surgery.prune_plan import PrunePlan, mask_name

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
    place = plan.folders.place(folder)
    place.mkdir(parents=True, exist_ok=True)
    for shard in plan.layout.shards:
        (place / shard.file).unlink(missing_ok=True)  # of a run that was killed while it wrote
    zeros = {matrix.key: 0 for matrix in plan.matrices}
    homes = {one.key: (one.name, one.start) for one in plan.selected}
    with CheckpointWriter(place, plan.layout) as writer:

        def one(piece: Piece) -> int:
            name, first = homes.get(piece.name, (piece.name, 0))
            start, stop = first + piece.start, first + piece.stop
            if piece.name in zeros:
                values = pruned.read(piece.name, piece.start, piece.stop)
            else:
                values = plan.checkpoint.read(name, start, stop)
            if name in trained:
                rows = trained[name].detach().reshape(plan.checkpoint.info(name).rows, -1)
                values = as_stored(rows[start:stop].reshape(values.shape).cpu(), values)
            if not plan.allow_nonfinite and name in trained:
                check_trained(piece.name, values)
            elif not plan.allow_nonfinite:
                check_finite(plan.checkpoint, name, values)
            writer.write(name, values, start)
            return int((values == 0).sum()) if piece.name in zeros else 0

        def count(piece: Piece, found: int) -> None:
            if piece.name in zeros:
                zeros[piece.name] += found
            advance(piece.elements)

        collect(pieces(plan.parts), one, threads, count)
        digests = writer.finish()
    write_config(plan.checkpoint.folder, place, plan.layout.dtype)
    plan.folders.copy(folder)
    return digests, zeros


def write_mask(plan: PrunePlan, pruned: Checkpoint, folder: Path) -> list[FileDigest]:
    """All masks in one file, eight weights a byte; shapes are in its metadata."""
    shapes = {one.name: list(plan.checkpoint.info(one.name).shape) for one in plan.matrices}

    def whole(name: str) -> Tensor:
        masks = (
            torch.ones(one.info.shape, dtype=torch.bool)
            if one.key in plan.kept
            else pruned[mask_name(one.key)]
            for one in plan.by_name[name]
        )
        return torch.cat(list(masks))

    packed = Computed(list(shapes), lambda name: pack(whole(name)))
    (folder / f"{MASK_STEM}.safetensors").unlink(missing_ok=True)  # of a run that was killed
    metadata = {MASK_KEY: json.dumps({"bits": "little", "shapes": shapes})}
    _, digests = write_tensors(folder, MASK_STEM, metadata, packed, ONE_FILE)
    return digests
