"""One pruning of every matrix: saliencies, masks, and moves of the weights that stay.

Each stage leaves its tensors in a folder of the working place, whole or not at all, so that neither
memory nor a killed run's lost work grows with the model.
"""

import functools
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fishertool.checkpoint.header import TensorInfo
from fishertool.checkpoint.json_files import load_json
from fishertool.checkpoint.reader import Checkpoint, open_checkpoint
from fishertool.errors import InputError
from fishertool.progress import Advance
from fishertool.pruning.magnitude import magnitude
from fishertool.pruning.parts.masks import choose, choose_globally
from fishertool.registry import Method
from fishertool.surgery.prune_moves import new_weights
from fishertool.surgery.prune_plan import PrunePlan, mask_name
from fishertool.surgery.prune_recipe import Recipe
from fishertool.surgery.prune_stage import NO_ANSWER, NOTES, STEM, Step, refusal, stored

LEAST = 1e-30
"""Of saliencies that only tell the weights of one matrix apart, at most."""


def run_step(step: Step, place: Path, advance: Advance) -> Path:
    """Prune every matrix; the folder that has each one's new weights and mask, as on disk."""
    plan, pruned = step.plan, place / "pruned"
    saliencies, masks = place / "saliency", place / "mask"
    if not pruned.exists():
        write_saliencies(step, saliencies, advance)
        with open_checkpoint(saliencies, STEM) as scores:
            stored(masks, _infos(plan, "BOOL"), lambda: _masks(step, scores), {})
        with open_checkpoint(masks, STEM) as chosen:
            stored(
                pruned,
                _outputs(plan),
                lambda: new_weights(step, chosen, advance),
                {"figures": step.figures, "counts": step.counts},
            )
    shutil.rmtree(saliencies, ignore_errors=True)
    shutil.rmtree(masks, ignore_errors=True)
    notes = load_json(pruned / NOTES)
    step.figures, step.counts = notes["figures"], notes["counts"]
    return pruned


def write_saliencies(step: Step, folder: Path, advance: Advance) -> None:
    """Those of every matrix, unless they are there."""
    tensors = functools.partial(_saliencies, step, advance)
    step.counts |= stored(folder, _infos(step.plan, "F32"), tensors, step.counts)


def magnitude_masks(plan: PrunePlan, recipe: Recipe, place: Path) -> Path:
    """What magnitude would keep of the model at the same budget; the folder that has it."""
    method = Method("magnitude", magnitude, {"weight": True}, {})
    plain = Step(plan, replace(recipe, method=method, settings={}, updates=()), None, None, 0)
    scores_folder, folder = place / "magnitude-saliency", place / "magnitude"
    write_saliencies(plain, scores_folder, lambda count: None)
    with open_checkpoint(scores_folder, STEM) as scores:
        stored(folder, _infos(plan, "BOOL"), lambda: _masks(plain, scores), {})
    shutil.rmtree(scores_folder, ignore_errors=True)
    return folder


def _outputs(plan: PrunePlan) -> list[TensorInfo]:
    """Of every matrix the new weights and the mask, as on disk."""
    return [
        info
        for matrix in plan.matrices
        for info in (
            matrix.info,
            replace(matrix.info, name=mask_name(matrix.key), dtype="BOOL"),
        )
    ]


def _infos(plan: PrunePlan, dtype: str) -> list[TensorInfo]:
    return [TensorInfo(matrix.key, dtype, matrix.shape) for matrix in plan.matrices]


def _saliencies(step: Step, advance: Advance) -> Iterator[tuple[str, Tensor]]:
    plan, recipe = step.plan, step.recipe
    wanted = recipe.method.inputs
    inputs: dict[str, Any] = {}
    if "magnitude" in wanted:
        total = sum(float(step.weight(one).abs().sum(dtype=torch.float64)) for one in plan.matrices)
        inputs["magnitude"] = total / plan.elements
    for number, matrix in enumerate(plan.matrices):
        weight = step.weight(matrix)
        if "generator" in wanted:
            inputs["generator"] = torch.Generator().manual_seed(
                step.seed * len(plan.matrices) + number
            )
        if step.statistics is not None:
            inputs |= step.statistics.inputs(recipe, plan.matrices, matrix, step.pruned_before)
        try:
            saliency = recipe.method.function(weight, **inputs, **recipe.settings)
        except NO_ANSWER as error:
            raise refusal(matrix, error) from error
        if not bool(saliency.isfinite().all()):
            raise InputError(
                f"{matrix.key}: its {recipe.method.name} saliency is not finite; estimate the "
                "Fisher again, or leave it out with --exclude"
            )
        if not bool(saliency.any()) and bool(weight.any()):
            step.counts.setdefault("by_magnitude", []).append(matrix.key)
        saliency = _told_apart(saliency, weight)
        if recipe.normalize == "mean":
            saliency = saliency / saliency.abs().mean(dtype=torch.float64).clamp(min=1e-300)
        gone = step.pruned_before(matrix)
        if gone is not None:
            saliency = saliency.masked_fill(gone, float("-inf"))
        yield matrix.key, saliency.to(torch.float32)
        advance(matrix.elements)
    if step.statistics is not None and {"inverse_diagonal", "inverse_blocks"} & set(wanted):
        step.counts["fallbacks"] = step.statistics.bank.fallbacks
        step.counts["clamped"] = step.statistics.bank.clamped


def _told_apart(saliency: Tensor, weight: Tensor) -> Tensor:
    """Where a saliency that is never negative is zero, the magnitude below all that is not zero."""
    untold = (saliency == 0) & (weight != 0)
    if not bool(untold.any()) or bool((saliency < 0).any()):
        return saliency
    sizes = weight.abs().to(saliency)
    least = torch.where(saliency > 0, saliency, float("inf")).min().clamp(max=2 * LEAST) / 2
    return torch.where(untold, least * sizes / sizes.max(), saliency)


def _masks(step: Step, scores: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """As [out, in]."""
    matrices, recipe = step.plan.matrices, step.recipe
    if recipe.budget == "global" and not recipe.pattern.m:
        masks = choose_globally(
            lambda: (scores[matrix.key] for matrix in matrices), recipe.pattern, recipe.sparsity
        )
    else:
        masks = (
            choose(scores[matrix.key], recipe.pattern, recipe.sparsity, recipe.budget)
            for matrix in matrices
        )
    for matrix, mask in zip(matrices, masks, strict=True):
        yield matrix.key, mask
