from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fishertool.factorization.fwsvd import fwsvd
from fishertool.factorization.method import Decomposition, Factors

RIDGE = 1e-9
"""Of the mean diagonal entry of all rows' systems; steps are towards the last solution, so that
the objective never rises."""
TILE_ELEMENTS = 1 << 23


def tfwsvd(
    weight: Tensor,
    fisher: Tensor,
    start: Decomposition | None = None,
    *,
    iterations: int = 10,
    tolerance: float = 1e-3,
) -> Decomposition:
    """Every weight by its own Fisher: alternating least squares from another method's result.

        min sum_ij F_ij (W - left @ right)_ij^2

    No closed form exists. Each iteration solves for all rows of left, then for all columns of
    right; it costs out in rank^2 operations. Iterations end after `iterations`, or when one lowers
    the objective by less than `tolerance` of it. The start is fwsvd's of both sides, unless given.

    Shapes: weight and fisher [out, in]. Raises ValueError for a Fisher that is zero everywhere,
    negative or not finite. Source: Hua et al. 2022, arXiv 2211.09718.
    """
    wide, f = weight.double(), fisher.double()
    if not bool((f >= 0).all()) or not 0 < float(f.sum()) < float("inf"):
        raise ValueError("the statistic is zero everywhere, negative or not finite")
    if start is None:
        start = fwsvd(weight, f.sum(1), f.sum(0), sides="both")

    def square_norm(error: Tensor) -> Tensor:
        return (f * error.square()).sum()

    refine = partial(_alternate, wide, f, iterations, tolerance)
    return replace(start, square_norm=square_norm, refine=refine)


def _alternate(
    wide: Tensor, fisher: Tensor, iterations: int, tolerance: float, factors: Factors
) -> Factors:
    left, right = factors
    before = float("inf")
    for _ in range(iterations):
        left = left + _step(wide - left @ right, fisher, right)
        right = right + _step((wide - left @ right).T, fisher.T, left.T).T
        objective = float((fisher * (wide - left @ right).square()).sum())
        if objective >= before * (1 - tolerance):
            break
        before = objective
    return Factors(left, right)


def _step(residual: Tensor, fisher: Tensor, basis: Tensor) -> Tensor:
    """What to add to the coefficients of every row, to fit its residual by the basis.

    Shapes: residual, fisher [row, width], basis [rank, width] -> [row, rank].
    """
    rank, width = basis.shape
    ridge = RIDGE * float((fisher @ basis.square().T).mean())
    ridge = max(ridge, torch.finfo(basis.dtype).tiny)
    tile = max(1, TILE_ELEMENTS // (rank * width))
    diagonal = ridge * torch.eye(rank, dtype=basis.dtype, device=basis.device)
    steps = []
    for start in range(0, len(residual), tile):
        f, rest = fisher[start : start + tile], residual[start : start + tile]
        systems = (basis * f[:, None, :]) @ basis.T + diagonal
        sides = ((f * rest) @ basis.T)[..., None]
        steps.append(torch.cholesky_solve(sides, torch.linalg.cholesky(systems))[..., 0])
    return torch.cat(steps)
