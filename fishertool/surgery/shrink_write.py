"""Write a shrunk checkpoint: tensors cut to the units that stay, config.json that says so."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fishertool.checkpoint.companions import write_config
from fishertool.checkpoint.digest import FileDigest
from fishertool.checkpoint.dtypes import TORCH, representable
from fishertool.checkpoint.source import check_finite
from fishertool.checkpoint.writer import CheckpointWriter
from fishertool.models.recovery import as_stored, check_trained
from fishertool.models.units import Cut
from fishertool.progress import Advance
from fishertool.pruning.parts.units import features_of
from fishertool.surgery.shrink import Outcome
from fishertool.surgery.shrink_plan import ShrinkPlan


def write_shrunk(
    plan: ShrinkPlan,
    outcome: Outcome,
    trained: Mapping[str, Tensor],
    folder: Path,
    *,
    allow_nonfinite: bool = False,
    advance: Advance = lambda weights: None,
) -> list[FileDigest]:
    """Write every tensor into `folder`, whole or cut, with config and companions; `trained` ones
    as they are now, of the checkpoint's shapes.

    Raises InputError naming a tensor with NaN or Inf.
    """
    checkpoint = plan.checkpoint
    place = plan.folders.place(folder)
    place.mkdir(parents=True, exist_ok=True)
    cuts = {
        cut.name: (cut, outcome.kept[block.join.name])
        for block in plan.units.blocks
        for cut in (block.join, *block.read)
    }
    with CheckpointWriter(place, plan.layout) as writer:
        for info in plan.layout.tensors:
            if info.name in outcome.joining and not trained:
                new = outcome.joining[info.name]
                values = new.T if plan.units.turned else new
            else:
                values = checkpoint[info.name]
                if info.name in trained:
                    now = trained[info.name].detach().cpu()
                    refitted = info.name in outcome.joining
                    values = now if refitted else as_stored(now, values)
                if info.name in cuts:
                    values = _cut(values, *cuts[info.name])
            values = representable(values, TORCH[info.dtype]).to(TORCH[info.dtype])
            if not allow_nonfinite and info.name in trained:
                check_trained(info.name, values)
            elif not allow_nonfinite:
                check_finite(checkpoint, info.name, values)
            writer.write(info.name, values.contiguous())
            advance(info.elements)
        digests = writer.finish()
    write_config(checkpoint.folder, place, plan.layout.dtype, plan.units.changes(plan.kept))
    plan.folders.copy(folder)
    return digests


def _cut(values: Tensor, cut: Cut, kept: Tensor) -> Tensor:
    return torch.index_select(values, cut.dimension, features_of(kept, cut.features))
