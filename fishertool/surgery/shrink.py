"""Leave out heads or neurons: which, by what of the Fisher, and what the others make up for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fishertool.errors import InputError
from fishertool.estimation.subject import LoadedSubject
from fishertool.estimation.work import divide
from fishertool.fisher.column_blocks import ColumnBlocks
from fishertool.fisher.estimate import estimate
from fishertool.fisher.kronecker import InputMoments, mirrored
from fishertool.fisher.mask import Masked, MaskMoments
from fishertool.models.units import Block
from fishertool.progress import Advance
from fishertool.pruning.parts.elimination import left_by_elimination
from fishertool.pruning.parts.reconstruction import mask_scales, refitted
from fishertool.pruning.parts.units import (
    features_of,
    most_salient,
    predicted_loss,
    rearranged,
    weight_norms,
)
from fishertool.surgery.shrink_plan import ShrinkPlan

Loss = Callable[[], float]
"""Of the model in memory, on held-out examples."""


@dataclass
class Statistics:
    """Of the calibration examples, by joining weight."""

    masks: dict[str, Tensor] = field(default_factory=dict)
    """Mean of u u^T, [unit, unit]; or of u^2, [unit], where nothing is rearranged or tuned."""
    inputs: dict[str, Tensor] = field(default_factory=dict)
    """Mean of x x^T / |y|^2, y the layer's output, [in, in]."""
    outputs: dict[str, Tensor] = field(default_factory=dict)
    """Mean of G G^T, [out, out]: the Fisher's block of a column of the weight, summed over them."""


@dataclass
class Outcome:
    kept: dict[str, Tensor]
    """By joining weight: the units that stay, in order."""
    joining: dict[str, Tensor]
    """The new weights, [out, count * features], float64."""
    compensate: str
    """What was done, where `auto` was asked for."""
    losses: dict[str, float]
    """Held-out, by what was tried; `dense` is that of the whole model."""
    figures: dict[str, dict[str, Any]]
    """What the report says of each block, by joining weight."""


def run_shrink(
    plan: ShrinkPlan,
    calibration: LoadedSubject | None,
    loss: Loss | None,
    seed: int,
    advance: Advance = lambda examples: None,
) -> Outcome:
    """Choose the units of every block, and the weights that join those that stay.

    `calibration` is the loaded model with the examples to gather statistics on, needed where the
    recipe needs data; its weights are the dense ones again afterwards. Without `loss` nothing is
    measured, and `auto` does nothing.
    """
    gathered = Statistics()
    if plan.recipe.needs_data:
        assert calibration is not None
        gathered = gather(plan, calibration, advance)
    kept = {
        block.join.name: _chosen(plan, block, gathered, seed + number)
        for number, block in enumerate(plan.units.blocks)
    }
    asked = plan.recipe.compensate
    losses: dict[str, float] = {}
    if loss is not None and calibration is not None:
        losses["dense"] = loss()
        tried = ("none", "mask", "joint") if asked == "auto" else ("none", asked)
        for way in dict.fromkeys(tried):
            losses[way] = _loss_by(plan, calibration, kept, gathered, way, loss)
    if asked == "auto":
        asked = min(
            (way for way in losses if way != "dense"), key=losses.__getitem__, default="none"
        )
    return Outcome(
        kept,
        _joining(plan, kept, gathered, asked),
        asked,
        losses,
        {
            block.join.name: _figures(plan, block, kept[block.join.name], gathered)
            for block in plan.units.blocks
        },
    )


def gather(plan: ShrinkPlan, loaded: LoadedSubject, advance: Advance) -> Statistics:
    """One pass over the examples: gradients of masks or weights, and inputs of the joining layers."""
    recipe, names = plan.recipe, [block.join.name for block in plan.units.blocks]
    if lost := [name for name in names if name not in loaded.parameters]:
        raise InputError(f"{plan.checkpoint.folder}: {lost[0]} is no parameter of the model")
    parameters = {name: loaded.parameters[name] for name in names}
    masks = None
    if recipe.method == "fisher" or recipe.tunes_masks:
        layers = {
            block.join.name: Masked(
                parameters[block.join.name], block.join.features, plan.units.turned
            )
            for block in plan.units.blocks
        }
        masks = MaskMoments(layers, cross=recipe.rearrange or recipe.tunes_masks)
    outputs = ColumnBlocks(parameters, plan.units.turned) if recipe.method == "obs" else None
    inputs = None
    if recipe.method == "obs" or recipe.compensate in ("joint", "auto"):
        inputs = InputMoments(parameters, relative=True)
    examples = loaded.texts.examples
    sizes, rows = [one.size for one in examples], [len(one.texts) for one in examples]
    done = estimate(
        loaded.module,
        parameters,
        loaded.batch,
        divide(sizes, rows, size=None).units,
        [one for one in (masks, outputs) if one is not None],
        probe=loaded.probe,
        longer=loaded.longer,
        inputs=inputs,
        labels=loaded.labels,
        seed=loaded.subject.data.seed,
        advance=advance,
    )
    found = Statistics()
    if masks is not None:
        found.masks = {
            name: mirrored(total, done.examples) if total.dim() == 2 else total / done.examples
            for name, total in masks.sums.items()
        }
    if inputs is not None:
        for name in names:
            leader = inputs.leader.get(name)
            if leader is None:
                raise InputError(
                    f"{plan.checkpoint.where(name)}: the inputs of its layer were not seen; use "
                    "--method fisher or magnitude and --compensate none"
                )
            found.inputs[name] = mirrored(inputs.sums[leader], float(inputs.tokens[leader]))
    if outputs is not None:
        found.outputs = {name: total / done.examples for name, total in outputs.sums.items()}
    return found


def _chosen(plan: ShrinkPlan, block: Block, gathered: Statistics, seed: int) -> Tensor:
    method = plan.recipe.method
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(plan.units.number, generator=generator)[: plan.kept].sort().values
    if method == "magnitude":
        return _by_magnitude(plan, block)
    if method == "obs":
        return _by_elimination(plan, block, gathered)
    moments = gathered.masks[block.join.name].cpu()
    salient = most_salient(moments if moments.dim() == 1 else moments.diagonal(), plan.kept)
    return rearranged(moments, salient) if plan.recipe.rearrange else salient


def _by_magnitude(plan: ShrinkPlan, block: Block) -> Tensor:
    tensors = [
        plan.checkpoint[cut.name].transpose(0, cut.dimension) for cut in (block.join, *block.read)
    ]
    return most_salient(weight_norms(tensors, plan.units.number), plan.kept)


def _by_elimination(plan: ShrinkPlan, block: Block, gathered: Statistics) -> Tensor:
    name, features = block.join.name, block.join.features
    inputs, outputs = gathered.inputs[name].cpu(), gathered.outputs[name].cpu()
    try:
        return left_by_elimination(_dense(plan, block), inputs, outputs, plan.kept, features)
    except ValueError:
        raise InputError(
            f"{plan.checkpoint.where(name)}: its inputs or its gradients are zero in every example, "
            "so no unit costs more than another; take other data, or --method magnitude"
        ) from None


def _dense(plan: ShrinkPlan, block: Block) -> Tensor:
    weight = plan.checkpoint[block.join.name].double()
    return weight.T if plan.units.turned else weight


def _joining(
    plan: ShrinkPlan, kept: Mapping[str, Tensor], gathered: Statistics, way: str
) -> dict[str, Tensor]:
    """The new joining weights, [out, count * features]."""
    found: dict[str, Tensor] = {}
    for block in plan.units.blocks:
        name, features = block.join.name, block.join.features
        weight, stay = _dense(plan, block), kept[name]
        if way == "joint":
            found[name] = refitted(weight, gathered.inputs[name].cpu(), stay, features)
            continue
        found[name] = weight[:, features_of(stay, features)]
        if way == "mask":
            scales = mask_scales(gathered.masks[name].cpu(), stay)
            found[name] = found[name] * scales.repeat_interleave(features)
    return found


def _loss_by(
    plan: ShrinkPlan,
    loaded: LoadedSubject,
    kept: Mapping[str, Tensor],
    gathered: Statistics,
    way: str,
    loss: Loss,
) -> float:
    """With the units masked in the model in memory, which is whole again afterwards: what it
    predicts is what the shrunk one will."""
    dense = {name: loaded.parameters[name].detach().clone() for name in kept}
    try:
        put(plan, loaded, kept, _joining(plan, kept, gathered, way))
        return loss()
    finally:
        with torch.no_grad():
            for name, weight in dense.items():
                loaded.parameters[name].copy_(weight)


def put(
    plan: ShrinkPlan,
    loaded: LoadedSubject,
    kept: Mapping[str, Tensor],
    joining: Mapping[str, Tensor],
) -> None:
    """Set the joining weights of the model in memory, zero for the units that are left out."""
    for block in plan.units.blocks:
        name, cut = block.join.name, block.join
        parameter, new = loaded.parameters[name], joining[name]
        stay = features_of(kept[name], cut.features).to(parameter.device)
        with torch.no_grad():
            parameter.zero_()
            upright = new.T if plan.units.turned else new
            parameter.index_copy_(cut.dimension, stay, upright.to(parameter))


def _figures(plan: ShrinkPlan, block: Block, kept: Tensor, gathered: Statistics) -> dict[str, Any]:
    by_magnitude = _by_magnitude(plan, block)
    found = {"overlap_with_magnitude": float(torch.isin(kept, by_magnitude).double().mean())}
    moments = gathered.masks.get(block.join.name)
    if moments is not None and moments.dim() == 2:
        found["predicted_loss_change"] = predicted_loss(moments.cpu(), kept)
    return found
