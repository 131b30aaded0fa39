from collections.abc import Sequence

import torch
from torch import Tensor

from fishertool.merging.method import Passes, refuse_negative, total_of
from fishertool.merging.parts.sphere import combine, gram


def multislerp(
    models: Sequence[Tensor],
    weights: Sequence[float],
    whole: Sequence[float],
    base: Tensor | None = None,
    *,
    normalize_weights: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """Weighted mean direction of the models, or of their task vectors, at their mean length.

        theta = (sum_i c_i |v_i|) m / |m|      [+ theta_0]
        m     = sum_i c_i v_i / |v_i|,         v_i = theta_i [- theta_0]

    `normalize_weights` divides the c_i by their sum. Where |m| is below `eps` the directions
    cancel, and the result is sum_i c_i v_i; with more than two models mergekit raises an error
    there.

    mergekit projects to the plane that touches the sphere at m / |m|, averages, and projects
    back; as that average is zero, the result is the same.

    Shapes: every model, the base and the result alike. Raises ValueError for an eps below zero,
    ZeroDivisionError where the weights sum to zero and are to be normalized.
    Source: C. Goddard 2025, Multi-SLERP (goddard.blog); name, parameters and meaning as mergekit's
    `multislerp`.
    """
    return combine(models, whole, base)


def whole(
    weights: Sequence[float], elements: int, *, normalize_weights: bool = True, eps: float = 1e-8
) -> Passes[list[float]]:
    """The models' coefficients."""
    refuse_negative(eps=eps)
    if normalize_weights and not total_of(weights):
        raise ZeroDivisionError("the weights sum to zero")
    products: Tensor = yield gram
    shares = torch.tensor(weights, dtype=torch.float64)
    if normalize_weights:
        shares /= shares.sum()
    lengths = products.diagonal().sqrt()
    direction = torch.where(lengths > 0, shares / lengths, 0)
    length = float((direction @ products @ direction).clamp(min=0).sqrt())
    if length < eps:
        return shares.tolist()
    return (direction * ((shares @ lengths) / length)).tolist()
