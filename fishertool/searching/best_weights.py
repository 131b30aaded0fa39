"""The merge weights of least predicted loss, in closed form."""

import torch
from torch import Tensor

DAMPING = 1e-10
"""Of the mean diagonal: where weights make no difference, those nearest to equal ones are taken."""


def best_weights(forms: Tensor, *, on_simplex: bool) -> list[float]:
    """The c that minimizes sum_t 1/2 (c - e_t)^T Q_t (c - e_t).

    forms       Q, [task, model, model], as in `fisher.predicted_loss`; task t is model t's
    on_simplex  c at least 0 and summing to 1; else any c, which needs forms made with a base

    Free: (sum_t Q_t) c = sum_t Q_t e_t. On the simplex: the same under its constraints, exactly, by
    an active set.
    """
    models = len(forms)
    matrix = forms.sum(0)
    right = sum(form[:, task] for task, form in enumerate(forms))
    unit = float(matrix.diagonal().mean()) or 1.0
    matrix = matrix / unit + DAMPING * torch.eye(models, dtype=torch.float64)
    right = right / unit + DAMPING / models
    best = _on_simplex(matrix, right) if on_simplex else torch.linalg.solve(matrix, right)
    found: list[float] = best.tolist()
    return found


def _on_simplex(matrix: Tensor, right: Tensor) -> Tensor:
    """The c >= 0 with sum 1 that minimizes c^T matrix c / 2 - right^T c; matrix positive definite.

    Begins at the best vertex, lets in the weight that lowers the objective fastest, and goes to
    the minimum over those let in, leaving out what would become negative on the way (Lawson and
    Hanson 1974, chapter 23, with a sum that is fixed).
    """
    vertex = int((matrix.diagonal() / 2 - right).argmin())
    support, c, least = [vertex], torch.eye(len(right), dtype=right.dtype)[vertex], torch.inf
    while (value := float(c @ (matrix @ c / 2 - right))) < least:
        best, least = c, value
        slopes = matrix @ c - right
        gains = slopes @ c - slopes
        gains[support] = 0.0
        if float(gains.max()) <= 0:
            break
        support.append(int(gains.argmax()))
        while True:
            goal = torch.zeros_like(c)
            goal[support] = _on_face(matrix[support][:, support], right[support])
            falling = [i for i in support if goal[i] <= 0]
            if not falling:
                c = goal
                break
            steps = c[falling] / (c[falling] - goal[falling])
            c = c + steps.min() * (goal - c)
            support.remove(falling[int(steps.argmin())])
            c[[i for i in range(len(c)) if i not in support]] = 0.0
    return best


def _on_face(matrix: Tensor, right: Tensor) -> Tensor:
    """The c with sum 1, of any sign, that minimizes c^T matrix c / 2 - right^T c."""
    free, per_multiplier = torch.linalg.solve(
        matrix, torch.stack([right, torch.ones_like(right)], 1)
    ).unbind(1)
    least: Tensor = free + per_multiplier * ((1 - free.sum()) / per_multiplier.sum())
    return least
