"""One pruning of every matrix: saliencies, masks, and moves of the weights that stay.

Each stage leaves its tensors in a folder of the working place, whole or not at all, so that neither
memory nor a killed run's lost work grows with the model.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fishertool.checkpoint.companions import write_json
from fishertool.checkpoint.dtypes import TORCH
from fishertool.checkpoint.header import TensorInfo
from fishertool.checkpoint.layout import lay_out
from fishertool.checkpoint.reader import Checkpoint, load_json, open_checkpoint
from fishertool.checkpoint.writer import CheckpointWriter
from fishertool.errors import InputError
from fishertool.progress import Advance
from fishertool.pruning.magnitude import magnitude
from fishertool.pruning.parts.columnwise import columnwise
from fishertool.pruning.parts.compensation import joint, summed
from fishertool.pruning.parts.masks import choose, choose_columns, choose_globally
from fishertool.registry import Method
from fishertool.surgery.factorize_matrix import Matrix
from fishertool.surgery.prune_plan import PrunePlan, mask_name
from fishertool.surgery.prune_recipe import Recipe
from fishertool.surgery.prune_statistics import Statistics
from fishertool.surgery.prune_trial import Trial

STEM, NOTES = "tensors", "notes.json"
ONE_FILE = 1 << 62
STEP = 128
"""Columns that SparseGPT prunes before their errors reach the rest."""


@dataclass
class Step:
    """The weights before a pruning, and what decides about them."""

    plan: PrunePlan
    recipe: Recipe
    statistics: Statistics | None
    before: Checkpoint | None
    """What the step before left; None for the model itself."""
    seed: int
    trial: Trial | None = None
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By matrix: predicted loss change, and the update it got."""
    counts: dict[str, int] = field(default_factory=dict)
    """Blocks that got more damping, and entries of the inverse diagonal out of bounds."""

    def weight(self, matrix: Matrix) -> Tensor:
        """[out, in], float32."""
        source = self.before or self.plan.checkpoint
        values = matrix.upright(source[matrix.name]).to(torch.float32)
        if not self.plan.allow_nonfinite and not bool(values.isfinite().all()):
            raise InputError(
                f"{source.where(matrix.name)}: has NaN or Inf; repair it, or go on with "
                "--allow-nonfinite"
            )
        return values

    def pruned_before(self, matrix: Matrix) -> Tensor | None:
        """True where an earlier step pruned, [out, in]."""
        if self.before is None:
            return None
        return ~matrix.upright(self.before[mask_name(matrix.name)])


def stored(
    folder: Path,
    infos: Iterable[TensorInfo],
    tensors: Callable[[], Iterator[tuple[str, Tensor]]],
    notes: Mapping[str, Any],
) -> dict[str, Any]:
    """Write tensors as they are made into `folder`, and the notes taken of them, which are returned;
    unless an earlier run has."""
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with CheckpointWriter(partial, lay_out(infos, ONE_FILE, stem=STEM)) as writer:
            for name, values in tensors():
                writer.write(name, values)
            writer.finish()
        write_json(partial / NOTES, notes)
        partial.rename(folder)
    return load_json(folder / NOTES)


def run_step(step: Step, place: Path, advance: Advance) -> Path:
    """Prune every matrix; the folder that has each one's new weights and mask, as on disk."""
    plan, pruned = step.plan, place / "pruned"
    saliencies, masks = place / "saliency", place / "mask"
    if not pruned.exists():
        counts = stored(
            saliencies, _infos(plan, "F32"), lambda: _saliencies(step, advance), step.counts
        )
        step.counts |= counts
        with open_checkpoint(saliencies, STEM) as scores:
            stored(masks, _infos(plan, "BOOL"), lambda: _masks(step, scores), {})
        with open_checkpoint(masks, STEM) as chosen:
            stored(
                pruned,
                _outputs(plan),
                lambda: _new_weights(step, chosen, advance),
                {"figures": step.figures, "counts": step.counts},
            )
    shutil.rmtree(saliencies, ignore_errors=True)
    shutil.rmtree(masks, ignore_errors=True)
    notes = load_json(pruned / NOTES)
    step.figures, step.counts = notes["figures"], notes["counts"]
    return pruned


def magnitude_masks(plan: PrunePlan, recipe: Recipe, place: Path) -> Path:
    """What magnitude would keep of the model at the same budget; the folder that has it."""
    method = Method("magnitude", magnitude, {"weight": True}, {})
    plain = Step(plan, replace(recipe, method=method, settings={}, updates=()), None, None, 0)
    scores_folder, folder = place / "magnitude-saliency", place / "magnitude"
    stored(scores_folder, _infos(plan, "F32"), lambda: _saliencies(plain, lambda count: None), {})
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
            plan.checkpoint.info(matrix.name),
            TensorInfo(mask_name(matrix.name), "BOOL", plan.checkpoint.info(matrix.name).shape),
        )
    ]


def _infos(plan: PrunePlan, dtype: str) -> list[TensorInfo]:
    return [TensorInfo(matrix.name, dtype, matrix.shape) for matrix in plan.matrices]


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
            inputs |= step.statistics.inputs(recipe, plan.matrices, matrix)
        try:
            saliency = recipe.method.function(weight, **inputs, **recipe.settings)
        except ValueError as error:
            raise InputError(f"{matrix.name}: {error}; leave it out with --exclude") from error
        if not bool(saliency.isfinite().all()):
            raise InputError(
                f"{matrix.name}: its {recipe.method.name} saliency is not finite; estimate the "
                "Fisher again, or leave it out with --exclude"
            )
        if recipe.normalize == "mean":
            saliency = saliency / saliency.abs().mean(dtype=torch.float64).clamp(min=1e-300)
            saliency = saliency.to(torch.float32)
        gone = step.pruned_before(matrix)
        if gone is not None:
            saliency = saliency.masked_fill(gone, float("-inf"))
        yield matrix.name, saliency
        advance(matrix.elements)
    if step.statistics is not None and "inverse_diagonal" in wanted:
        step.counts["fallbacks"] = step.statistics.fallbacks
        step.counts["clamped"] = step.statistics.clamped


def _masks(step: Step, scores: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """As [out, in]."""
    matrices, recipe = step.plan.matrices, step.recipe
    if recipe.budget == "global" and not recipe.pattern.m:
        masks = choose_globally(
            lambda: (scores[matrix.name] for matrix in matrices), recipe.pattern, recipe.sparsity
        )
    else:
        masks = (
            choose(scores[matrix.name], recipe.pattern, recipe.sparsity, recipe.budget)
            for matrix in matrices
        )
    for matrix, mask in zip(matrices, masks, strict=True):
        yield matrix.name, mask


Candidate = tuple[str, Tensor, Tensor]
"""An update's name, and the weight [out, in] in its stored dtype and mask it leads to."""


def _new_weights(step: Step, masks: Checkpoint, advance: Advance) -> Iterator[tuple[str, Tensor]]:
    gate = None
    if step.recipe.gated:
        assert step.trial is not None
        gate = _Gate(step, masks, step.trial)
    for matrix in step.plan.matrices:
        weight, mask = step.weight(matrix), masks[matrix.name]
        candidates = _candidates(step, matrix, weight, mask)
        if gate is None:
            *_, (name, new, mask) = candidates  # without a gate, the update that was asked for
        else:
            name, new, mask = gate.best(matrix, candidates)
        figures = step.figures.setdefault(matrix.name, {})
        figures["update"] = name
        figures["predicted_loss_change"] = _predicted(step, matrix, weight, new)
        yield matrix.name, matrix.upright(new).contiguous()
        yield mask_name(matrix.name), matrix.upright(mask).contiguous()
        advance(matrix.elements)


def _candidates(step: Step, matrix: Matrix, weight: Tensor, mask: Tensor) -> list[Candidate]:
    """No update, and every one that the recipe names."""
    dtype = TORCH[matrix.dtype]

    def candidate(name: str, new: Tensor, mask: Tensor) -> Candidate:
        rounded = torch.where(mask, new, 0.0).to(dtype)
        if not step.plan.allow_nonfinite and not bool(rounded.isfinite().all()):
            raise InputError(
                f"{matrix.name}: what --compensate {name} moves does not fit {matrix.dtype}; take "
                "more --damping"
            )
        return name, rounded, mask

    found = [candidate("none", weight, mask)]
    for name in step.recipe.updates:
        new, its_mask = _updated(step, name, matrix, weight, mask)
        found.append(candidate(name, new, its_mask))
    return found


def _updated(
    step: Step, name: str, matrix: Matrix, weight: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    statistics, recipe = step.statistics, step.recipe
    assert statistics is not None
    if name == "columnwise":
        assert recipe.damping is not None
        gone = step.pruned_before(matrix)

        def chosen(saliency: Tensor, start: int) -> Tensor:
            if not recipe.chooses_in_columns:
                return mask[:, start : start + saliency.shape[1]]
            if gone is not None:
                hidden = gone[:, start : start + saliency.shape[1]]
                saliency = saliency.masked_fill(hidden, float("-inf"))
            return choose_columns(saliency, start, recipe.pattern, recipe.sparsity, recipe.budget)

        columns = recipe.pattern.m if recipe.chooses_in_columns and recipe.pattern.m else STEP
        moment = statistics.activations(matrix)
        return columnwise(weight, moment, chosen, columns, damping=recipe.damping)
    fisher, gradients = statistics.curvature(recipe, matrix)
    flat, kept = weight.flatten(), mask.flatten()
    moved = {
        "summed": lambda: summed(flat, kept, fisher),
        "joint": lambda: joint(flat, kept, fisher, gradients),
    }
    return moved[name]().reshape(weight.shape), mask


def _predicted(step: Step, matrix: Matrix, weight: Tensor, new: Tensor) -> float | None:
    """1/2 d^T F d of the change d, by the rank-one Fisher's blocks or the diagonal, undamped; None
    where neither is there."""
    statistics = step.statistics
    if statistics is None:
        return None
    change = (new.double() - weight.double()).flatten()
    if "rank-one" in statistics.kinds:
        fisher, _ = statistics.curvature(step.recipe, matrix)
        return (float(fisher.quadratic_form(change)) - fisher.damping * float(change @ change)) / 2
    if "diagonal" in statistics.kinds:
        values = statistics.diagonal(matrix).double().flatten()
        return float(values @ change.square()) / 2
    return None


class _Gate:
    """Keeps, matrix after matrix, the candidate with the least held-out loss.

    It begins with no weight moved; the loss that decides on a matrix is that of the model with what
    was decided on the matrices before it.
    """

    def __init__(self, step: Step, masks: Checkpoint, trial: Trial):
        self._step, self._trial = step, trial
        for matrix in step.plan.matrices:
            weight = step.weight(matrix)
            plain = torch.where(masks[matrix.name], weight, 0.0)
            trial.put({matrix.name: matrix.upright(plain)})
        self._loss = trial.loss()

    def best(self, matrix: Matrix, candidates: Sequence[Candidate]) -> Candidate:
        best, losses = candidates[0], {candidates[0][0]: self._loss}
        for candidate in candidates[1:]:
            self._trial.put({matrix.name: matrix.upright(candidate[1])})
            losses[candidate[0]] = self._trial.loss()
            if losses[candidate[0]] < self._loss:
                best, self._loss = candidate, losses[candidate[0]]
        self._trial.put({matrix.name: matrix.upright(best[1])})
        self._step.figures.setdefault(matrix.name, {})["held_out_loss"] = losses
        return best
