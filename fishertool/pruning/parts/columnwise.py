"""Column by column: zero some weights of one, and let the columns after it take up the error."""

from collections.abc import Callable

import torch
from torch import Tensor

Choose = Callable[[Tensor, int], Tensor]
"""Saliencies of some columns and the first one's number -> mask of these columns."""


def inverse_factor(activations: Tensor, damping: float) -> Tensor:
    """U, upper triangular, with H^-1 = U^T U for H = 2 A + damping mean(diag(2 A)) I.

    Shapes: activations A [in, in] -> [in, in], float64. Raises ValueError for a moment that is zero
    everywhere.
    """
    hessian = 2 * activations.double()
    added = damping * hessian.diagonal().mean()
    if not added > 0:
        raise ValueError("the input is zero everywhere")
    hessian = hessian + added * torch.eye(len(hessian), dtype=hessian.dtype)
    # With rows and columns reversed, H = R R^T for an upper triangular R, and U = R^-1.
    upper = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    eye = torch.eye(len(hessian), dtype=hessian.dtype)
    factor: Tensor = torch.linalg.solve_triangular(upper, eye, upper=True)
    return factor


def columnwise(
    weight: Tensor,
    activations: Tensor,
    choose: Choose,
    step: int = 128,
    *,
    damping: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Prune from the first column to the last, the error of each pushed into the later ones.

        e_j = (w_j - masked w_j) / U_jj,        w_k -= e_j U_jk  for k > j

    `choose` is given w^2 / U_jj^2 of `step` columns at a time, as the columns before left them.

    Shapes: weight [out, in], activations [in, in] -> the new weight, float64, and its mask, True
    where kept. Source: Frantar and Alistarh 2023, arXiv 2301.00774, algorithm 1.
    """
    factor = inverse_factor(activations, damping)
    values = weight.double().clone()
    mask = torch.ones_like(values, dtype=torch.bool)
    width = values.shape[1]
    for start in range(0, width, step):
        stop = min(start + step, width)
        block, diagonal = values[:, start:stop], factor.diagonal()[start:stop]
        kept = choose((block / diagonal).square().to(torch.float32), start)
        mask[:, start:stop] = kept
        errors = torch.empty_like(block)
        for j in range(stop - start):
            column = block[:, j]
            errors[:, j] = torch.where(kept[:, j], 0.0, column) / diagonal[j]
            later = factor[start + j, start + j + 1 : stop]
            block[:, j + 1 :] -= errors[:, j, None] * later
        block[~kept] = 0
        values[:, stop:] -= errors @ factor[start:stop, stop:]
    return values, mask
