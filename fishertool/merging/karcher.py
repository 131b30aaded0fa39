from collections.abc import Sequence

import torch
from torch import Tensor

from fishertool.merging.method import Passes, total_of
from fishertool.merging.parts.sphere import combine, gram


def karcher(
    models: Sequence[Tensor],
    weights: Sequence[float],
    whole: Sequence[float],
    *,
    max_iter: int = 10,
    tol: float = 1e-5,
) -> Tensor:
    """The point of the sphere that is nearest to the models' directions, at their mean length.

        theta = (sum_i c_i |theta_i|) m,     c divided by sum_i c_i
        m     = argmin sum_i c_i angle(m, theta_i)^2

    m is found by steps along the mean of the directions as seen from m, from their normalized
    average on: at most `max_iter`, or until a step is shorter than `tol` (radians). Zero tensors
    count for the length alone, and directions opposite to m not at all.

    Equal weights are mergekit's, which takes none. Inner products are in float64; in mergekit's
    float32 the angles between near models are rounding.

    Shapes: every model and the result alike. Raises ZeroDivisionError where the weights sum to
    zero, ValueError for a tol that is not above zero. Source: Karcher 1977, Riemannian
    center of mass and mollifier smoothing; name, parameters and meaning as mergekit's `karcher`.
    """
    return combine(models, whole)


def whole(
    weights: Sequence[float], elements: int, *, max_iter: int = 10, tol: float = 1e-5
) -> Passes[list[float]]:
    """The models' coefficients: every point on the way lies in their span."""
    if not tol > 0:
        raise ValueError(f"tol {tol} is not above zero")
    if not total_of(weights):
        raise ZeroDivisionError("the weights sum to zero")
    products: Tensor = yield gram
    shares = torch.tensor(weights, dtype=torch.float64)
    shares /= shares.sum()
    lengths = products.diagonal().sqrt()
    units = torch.where(lengths > 0, 1 / lengths, 0)
    cosines = products * units * units[:, None]
    pulls = torch.where(lengths > 0, shares, 0)
    pulls /= pulls.sum().clamp(min=torch.finfo(pulls.dtype).tiny)
    mean = pulls.clone()  # coefficients of the directions, as all that follows
    if _norm(mean, cosines) < tol:
        mean = torch.zeros_like(pulls)
        mean[pulls.argmax()] = 1
    mean /= _norm(mean, cosines).clamp(min=tol)
    for _ in range(max_iter):
        cosine = (cosines @ mean).clamp(-1, 1)
        angle = cosine.acos()
        stretch = torch.where(angle > 0, angle / angle.sin(), 1)
        seen = pulls * torch.where(angle < torch.pi - tol, stretch, 0)
        step = seen - (seen @ cosine) * mean
        length = _norm(step, cosines)
        if length < tol:
            break
        mean = torch.cos(length) * mean + (torch.sin(length) / length) * step
        mean /= _norm(mean, cosines)
    return (mean * units * (shares @ lengths)).tolist()


def _norm(coefficients: Tensor, cosines: Tensor) -> Tensor:
    return (coefficients @ cosines @ coefficients).clamp(min=0).sqrt()
