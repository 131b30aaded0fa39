from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fishertool.factorization.fwsvd import fwsvd
from fishertool.factorization.method import Decomposition, Factors

RIDGE = 1e-9
"""Of what a preconditioner's diagonal has on average."""
INNER = 4
"""Conjugate gradient steps: on fine-tuned models as good as solving to the end, to four digits; of
a Fisher far from any of rank one, iterations gain less than they would by solving to the end."""
DONE = 1e-18
"""Of a row's first slope: from there on its gradient is rounding, with no step that follows it."""


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

    No closed form exists. Each iteration improves all rows of left, then all columns of right, by
    conjugate gradients preconditioned by the closed form that a Fisher of rank one would have; the
    objective never rises, and it costs about 40 out in rank operations. Iterations end after
    `iterations`, or when one lowers the objective by less than `tolerance` of it. The start is
    fwsvd's of both sides, unless given.

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
    def objective_of(factors: Factors) -> float:
        return float((fisher * (wide - factors.left @ factors.right).square()).sum())

    least = objective_of(factors)
    for _ in range(iterations):
        left = factors.left + _step(wide - factors.left @ factors.right, fisher, factors.right)
        right = factors.right + _step((wide - left @ factors.right).T, fisher.T, left.T).T
        found = Factors(left, right)
        objective, before = objective_of(found), least
        if objective < before:
            factors, least = found, objective
        if objective >= before * (1 - tolerance):
            break
    return factors


def _step(residual: Tensor, fisher: Tensor, basis: Tensor) -> Tensor:
    """What to add to the coefficients of every row, to fit its residual by the basis.

        min over X of sum_ij F_ij (residual - X basis)_ij^2

    The rows' systems are solved side by side. Were F rows x columns^T / total, each would be the
    same matrix but for a factor, which is the preconditioner.

    Shapes: residual, fisher [row, width], basis [rank, width] -> [row, rank].
    """
    rows, columns = fisher.sum(1, keepdim=True), fisher.sum(0)
    rows = rows.clamp(min=RIDGE * float(rows.mean()))
    shared = (basis * columns) @ basis.T / fisher.sum()
    ridge = max(RIDGE * float(shared.diagonal().mean()), torch.finfo(basis.dtype).tiny)
    cholesky = torch.linalg.cholesky(shared + ridge * torch.eye(len(basis)).to(shared))

    def preconditioned(gradient: Tensor) -> Tensor:
        return torch.cholesky_solve(gradient.T, cholesky).T / rows

    step = residual.new_zeros(len(residual), len(basis))
    gradient = (fisher * residual) @ basis.T
    direction = towards = preconditioned(gradient)
    slope = (gradient * towards).sum(1, keepdim=True)
    done = DONE * slope
    for _ in range(INNER):
        curved = (fisher * (direction @ basis)) @ basis.T
        length = _ratio(slope, (direction * curved).sum(1, keepdim=True)) * (slope > done)
        step += length * direction
        gradient -= length * curved
        towards, before = preconditioned(gradient), slope
        slope = (gradient * towards).sum(1, keepdim=True)
        direction = towards + _ratio(slope, before) * direction
    return step


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Zero where a row has nothing left to gain."""
    return torch.where(below > 0, above / below, 0.0)
