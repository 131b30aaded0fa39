"""The new weights of every matrix: masked, and with the update that was asked for or that helps."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fishertool.checkpoint.dtypes import TORCH, all_finite, representable
from fishertool.checkpoint.reader import Checkpoint
from fishertool.errors import InputError
from fishertool.progress import Advance
from fishertool.pruning.parts.columnwise import columnwise
from fishertool.pruning.parts.compensation import joint, summed
from fishertool.pruning.parts.masks import ColumnChooser
from fishertool.surgery.matrix import Matrix
from fishertool.surgery.prune_plan import mask_name
from fishertool.surgery.prune_stage import NO_ANSWER, Step, refusal
from fishertool.surgery.prune_trial import Trial

STEP = 128
"""Columns that SparseGPT prunes before their errors reach the rest."""

Candidate = tuple[str, Tensor, Tensor]
"""An update's name, and the weight [out, in] in its stored dtype and mask it leads to."""


def new_weights(step: Step, masks: Checkpoint, advance: Advance) -> Iterator[tuple[str, Tensor]]:
    gate = None
    if step.recipe.gated:
        assert step.trial is not None
        gate = _Gate(step, masks, step.trial)
    for matrix in step.plan.matrices:
        weight, mask = step.weight(matrix), masks[matrix.key]
        candidates = _candidates(step, matrix, weight, mask)
        if gate is None:
            *_, (name, new, mask) = candidates  # without a gate, the update that was asked for
        else:
            name, new, mask = gate.best(matrix, candidates)
        figures = step.figures.setdefault(matrix.key, {})
        figures["update"] = name
        figures["predicted_loss_change"] = _predicted(step, matrix, weight, new)
        yield matrix.key, matrix.upright(new).contiguous()
        yield mask_name(matrix.key), matrix.upright(mask).contiguous()
        advance(matrix.elements)


def _candidates(step: Step, matrix: Matrix, weight: Tensor, mask: Tensor) -> list[Candidate]:
    """No update, and every one that the recipe names."""
    dtype = TORCH[matrix.dtype]

    def candidate(name: str, new: Tensor, mask: Tensor) -> Candidate:
        rounded = representable(torch.where(mask, new, 0.0), dtype).to(dtype)
        if not step.plan.allow_nonfinite and not all_finite(rounded):
            raise InputError(
                f"{matrix.key}: what --compensate {name} moves does not fit {matrix.dtype}; take "
                "more --damping"
            )
        return name, rounded, mask

    found = [candidate("none", weight, mask)]
    for name in step.recipe.updates:
        if (updated := _updated(step, name, matrix, weight, mask)) is not None:
            found.append(candidate(name, *updated))
    return found


def _updated(
    step: Step, name: str, matrix: Matrix, weight: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor] | None:
    """None where the statistic is zero, and tells of no move."""
    statistics, recipe = step.statistics, step.recipe
    assert statistics is not None
    if name == "columnwise":
        assert recipe.moment_damping is not None
        gone = step.pruned_before(matrix)
        alive = torch.ones_like(mask) if gone is None else ~gone
        chooser = ColumnChooser(alive, recipe.pattern, recipe.sparsity, recipe.budget)

        def chosen(saliency: Tensor, start: int) -> Tensor:
            if recipe.chooses_in_columns:
                return chooser(saliency, start)
            return mask[:, start : start + saliency.shape[1]]

        columns = recipe.pattern.m if recipe.chooses_in_columns and recipe.pattern.m else STEP
        moment = statistics.activations(matrix)
        try:
            return columnwise(weight, moment, chosen, columns, damping=recipe.moment_damping)
        except NO_ANSWER as error:
            raise refusal(matrix, error) from error
    found = statistics.bank.curvature(recipe, matrix, step.pruned_before(matrix))
    if found is None:
        step.counts.setdefault("unmoved", []).append(matrix.key)
        return None
    fisher, gradients = found
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
        found = statistics.bank.curvature(step.recipe, matrix, step.pruned_before(matrix))
        if found is None:
            return 0.0
        fisher, _ = found
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
            plain = torch.where(masks[matrix.key], weight, 0.0)
            trial.put(matrix, matrix.upright(plain))
        self._loss = trial.loss()

    def best(self, matrix: Matrix, candidates: Sequence[Candidate]) -> Candidate:
        best, losses = candidates[0], {candidates[0][0]: self._loss}
        for candidate in candidates[1:]:
            self._trial.put(matrix, matrix.upright(candidate[1]))
            losses[candidate[0]] = self._trial.loss()
            if losses[candidate[0]] < self._loss:
                best, self._loss = candidate, losses[candidate[0]]
        self._trial.put(matrix, matrix.upright(best[1]))
        self._step.figures.setdefault(matrix.key, {})["held_out_loss"] = losses
        return best
