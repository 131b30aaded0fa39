"""Systems of linear equations whose matrix is symmetric."""

from collections.abc import Callable
from math import inf

import torch
from torch import Tensor


def solve_symmetric(matrix: Tensor, right: Tensor) -> Tensor:
    """X of `matrix` X = `right`; of a singular matrix that of the least norm. float64."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not failed:
        solved: Tensor = torch.cholesky_solve(right, factor)
        return solved
    values, vectors = torch.linalg.eigh(matrix)
    smallest = values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    inverse = torch.where(values.abs() > smallest, 1 / values, 0.0)
    least: Tensor = vectors @ (inverse[:, None] * (vectors.mT @ right))
    return least


def inverse_of_damped(matrix: Tensor, damping: float) -> Tensor:
    """(matrix + damping I)^-1, for a matrix that is positive semidefinite but for rounding.

    Where rounding leaves it indefinite, damping grows tenfold until it is not. float64. Raises
    ValueError for NaN or Inf.
    """
    while damping < inf:
        damped = matrix.clone()
        damped.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse: Tensor = torch.cholesky_inverse(factor)
            return inverse
        damping *= 10
    raise ValueError("a matrix to be inverted is not finite")


def conjugate_gradients(
    multiply: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    right: Tensor,
    iterations: int,
    tolerance: float,
) -> Tensor:
    """X of `multiply`(X) = `right`, from X = 0, until |residual| <= tolerance |right|.

    multiply and precondition are symmetric and positive. Sums are in float64, whatever the dtype
    of `right`. Source: Hestenes and Stiefel 1952.
    """
    result = torch.zeros_like(right)
    residual = right.clone()
    goal = tolerance**2 * _dot(right, right)
    direction, before = torch.zeros_like(right), 1.0
    for _ in range(iterations):
        if _dot(residual, residual) <= goal:
            break
        improved = precondition(residual)
        now = _dot(residual, improved)
        direction.mul_(now / before).add_(improved)
        product = multiply(direction)
        curvature = _dot(direction, product)
        if curvature <= 0:  # rounding has the better of it
            break
        result.add_(direction, alpha=now / curvature)
        residual.sub_(product, alpha=now / curvature)
        before = now
    return result


def _dot(left: Tensor, right: Tensor) -> float:
    return float((left * right).sum(dtype=torch.float64))
