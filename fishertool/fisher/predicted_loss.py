"""The loss a merge will have, predicted from diagonal Fishers without an evaluation.

Model t has loss L_t on its own task, and there a Fisher F_t as curvature. To second order

    L_t(theta) - L_t(theta_t) = 1/2 (theta - theta_t)^T F_t (theta - theta_t)

in the units of the Fisher's loss: nats an example. For theta = theta_0 + sum_i c_i tau_i, with
tau_i = theta_i - theta_0, this is a quadratic form in the k numbers c - e_t:

    1/2 (c - e_t)^T Q_t (c - e_t),    Q_t[i, j] = tau_i^T F_t tau_j

Where c sums to one, as without a base it must, c - e_t sums to zero: whatever is subtracted from
all models alike has no influence, and the first model serves as theta_0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 1 << 16
"""Elements at a time: what is widened to float64 stays in the processor's cache."""


class PieceSums:
    """What the pieces of all tensors add up to, the same whatever order they come in."""

    def __init__(self) -> None:
        self._found: dict[str, dict[int, Tensor]] = {}

    def add(self, name: str, start: int, value: Tensor) -> None:
        """What the piece of tensor `name` that begins at row `start` contributes."""
        self._found.setdefault(name, {})[start] = value

    def by_tensor(self) -> dict[str, Tensor]:
        """Sums over the pieces of each tensor, by name in alphabetical order."""
        return {
            name: torch.stack([value for _, value in sorted(pieces.items())]).sum(0)
            for name, pieces in sorted(self._found.items())
        }

    def total(self) -> Tensor:
        """Raises RuntimeError where nothing was added."""
        return torch.stack(list(self.by_tensor().values())).sum(0)


def quadratic_forms(
    models: Sequence[Tensor], fishers: Sequence[Tensor], base: Tensor | None = None
) -> Tensor:
    """Q_t[i, j] = tau_i^T F_t tau_j of one piece, for every task t: [task, model, model], float64.

    Shapes: k models, the base (the first model if None) and the Fishers of all tasks alike.
    """
    origin = (models[0] if base is None else base).flatten()
    flat = [model.flatten() for model in models]
    curvatures = [fisher.flatten() for fisher in fishers]
    count = len(models)
    forms = origin.new_zeros(len(fishers), count, count, dtype=torch.float64)
    for start in range(0, len(origin), CHUNK):
        part = slice(start, start + CHUNK)
        task_vectors = torch.stack([model[part].double() for model in flat]) - origin[part].double()
        for form, curvature in zip(forms, curvatures, strict=True):
            form.addmm_(task_vectors * curvature[part], task_vectors.mT)
    return forms


def loss_increases_of(
    merged: Tensor, models: Sequence[Tensor], fishers: Sequence[Tensor]
) -> Tensor:
    """1/2 (theta - theta_t)^T F_t (theta - theta_t) of one piece of any merge: [task], float64.

    Shapes: merged, and model and Fisher of every task alike.
    """
    flat = merged.flatten()
    increases = flat.new_zeros(len(models), dtype=torch.float64)
    for task, (model, fisher) in enumerate(zip(models, fishers, strict=True)):
        own, curvature = model.flatten(), fisher.flatten()
        for start in range(0, len(flat), CHUNK):
            part = slice(start, start + CHUNK)
            apart = flat[part].double() - own[part].double()
            increases[task] += torch.dot(apart * curvature[part], apart) / 2
    return increases
