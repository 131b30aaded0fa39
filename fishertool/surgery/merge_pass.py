"""The one pass of a merge over all its weights, and what can be told of the result from it."""

from collections.abc import Callable
from dataclasses import dataclass
from math import fsum

import torch
from torch import Tensor

from fishertool.checkpoint.stream import Piece, stream
from fishertool.fisher.predicted_loss import PieceSums, loss_increases_of
from fishertool.progress import Advance
from fishertool.surgery.merge_look import groups, look
from fishertool.surgery.merge_plan import MergePlan
from fishertool.surgery.merge_tensor import Look, cut, merge_piece

Put = Callable[[Piece, Tensor], None]
"""Takes rows of the output, in its dtype; called from several threads."""


@dataclass(frozen=True)
class Passed:
    predicted: dict[str, list[float]]
    """For every tensor merged, by how much each model's loss is predicted to rise, in nats an
    example; empty where sidecars are missing."""
    distance: float | None
    """Mean over the weights merged of abs(theta - theta_0); None without a base, or not asked for."""
    sparsity: float | None
    """Share of the weights merged that are the base's."""

    @property
    def predicted_loss(self) -> list[float] | None:
        """For each model the sum over tensors."""
        return [fsum(column) for column in zip(*self.predicted.values(), strict=True)] or None


def merge_pass(
    plan: MergePlan, put: Put, threads: int, advance: Advance, *, to_base: bool
) -> Passed:
    """Merge every tensor of the plan, piece by piece; with `to_base`, compare it with the base."""
    increases, changes = PieceSums(), PieceSums()

    for group in groups(plan):
        looks = look(plan, group, threads)

        def one(piece: Piece, looks: dict[str, Look] = looks) -> None:
            values, part = merge_piece(plan, piece, looks.get(piece.name))
            put(piece, values)
            if part is None:
                return
            if plan.predicts and part.fishers:
                fishers = [fisher.values for fisher in part.fishers]
                found = loss_increases_of(values, part.models, fishers)
                increases.add(piece.name, piece.start, found)
            if to_base and part.base is not None:
                changes.add(piece.name, piece.start, _change(values, part.base))

        stream(cut(plan, group), one, threads, advance)
    predicted = {name: found.tolist() for name, found in increases.by_tensor().items()}
    if not changes.by_tensor():
        return Passed(predicted, None, None)
    apart, same, count = changes.total().tolist()
    return Passed(predicted, apart / count, same / count)


def _change(values: Tensor, base: Tensor) -> Tensor:
    """Sum of abs(theta - theta_0), how many are equal, how many there are, of one piece."""
    apart = values.double().reshape(base.shape) - base.double()
    return torch.stack(
        [
            apart.abs().sum(),
            (apart == 0).sum().double(),
            torch.tensor(float(apart.numel()), dtype=torch.float64),
        ]
    )
