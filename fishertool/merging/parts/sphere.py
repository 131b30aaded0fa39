"""Interpolation between directions: it stays in the span of the models, so that the products
of the models with each other say all that is needed of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fishertool.merging.linear import linear
from fishertool.merging.method import total_of
from fishertool.merging.parts.blocks import blocks


def gram(models: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
    """Inner products of the models, or of their task vectors, of one piece: [k, k] in float64."""
    total = torch.zeros(len(models), len(models), dtype=torch.float64)
    origin = [] if base is None else [base]
    for parts in blocks(*models, *origin):
        vectors = torch.stack([part.flatten() for part in parts]).double()
        if base is not None:
            vectors = vectors[:-1] - vectors[-1]
        total.addmm_(vectors, vectors.T)
    return total


def combine(
    models: Sequence[Tensor], coefficients: Sequence[float], base: Tensor | None = None
) -> Tensor:
    """sum_i a_i theta_i, or theta_0 + sum_i a_i (theta_i - theta_0)."""
    if base is None:
        return linear(models, coefficients, normalize=False)
    rest = 1 - sum(coefficients)
    return linear([*models, base], [*coefficients, rest], normalize=False)


def second_share(weights: Sequence[float]) -> float:
    """Where between two models their weights put the result: 0 at the first, 1 at the second."""
    total = total_of(weights)
    return weights[1] / total if total else 0.5


def arc(
    squares: tuple[Tensor, Tensor], product: Tensor, t: float, straight: float
) -> tuple[Tensor, Tensor]:
    """Coefficients of two vectors for the point at `t` of the arc between them, elementwise.

        sin((1 - t) angle) / sin(angle), sin(t angle) / sin(angle)

    and 1 - t, t where the angle's |cosine| is above `straight`, or one of the vectors is zero.
    """
    length = (squares[0] * squares[1]).sqrt()
    known = length > 0
    cosine = torch.where(known, product / length, 1).clamp(-1, 1)
    curved = cosine.abs() <= straight
    angle = torch.where(curved, cosine, 0).acos()
    first, second = ((share * angle).sin() / angle.sin() for share in (1 - t, t))
    return torch.where(curved, first, 1 - t), torch.where(curved, second, t)
