from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fishertool.merging.method import Passes
from fishertool.merging.parts.sphere import arc, gram, second_share

# Beyond this cosine spherical and linear interpolation agree to 1e-12.
STRAIGHT = 1 - 1e-12


class Arc(NamedTuple):
    """Coefficients of the two models, of a shape that broadcasts over a piece."""

    first: Tensor
    second: Tensor


def nuslerp(
    models: tuple[Tensor, Tensor],
    weights: Sequence[float],
    whole: Arc | None,
    base: Tensor | None = None,
    *,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Tensor:
    """Spherical interpolation between two models, or between their task vectors.

        theta = (sin((1 - t) phi) v_1 + sin(t phi) v_2) / sin(phi)     [+ theta_0]
        v_i   = theta_i [- theta_0],       t = c_2 / (c_1 + c_2)

    phi is the angle between v_1 and v_2. Without `nuslerp_flatten` every run along the last
    dimension has an angle of its own or, with `nuslerp_row_wise`, every column over all of them.
    Parallel, opposite and zero v_i are interpolated linearly; a zero has no angle, for which
    mergekit takes a right one.

    Shapes: both models, the base and the result alike. Source: Shoemake 1985, Animating Rotation
    with Quaternion Curves; name, parameters and meaning as mergekit's `nuslerp`.
    """
    if whole is None:
        whole = _arc(_products(models, base, -1), weights)
    first, second = (one.to(models[0].dtype) for one in whole)
    merged = (models[0] * first).addcmul_(models[1], second)
    return merged if base is None else merged.addcmul_(base, 1 - first - second)


def whole(
    weights: Sequence[float],
    elements: int,
    *,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Passes[Arc | None]:
    """The coefficients, but for those that a run along the last dimension has of its own."""
    if nuslerp_flatten:
        products = yield gram
        return _arc(products.flatten()[[0, 3, 1]], weights)
    if nuslerp_row_wise:
        products = yield lambda models, base: _products(models, base, 0)
        return _arc(products, weights)
    return None


def _products(models: Sequence[Tensor], base: Tensor | None, along: int) -> Tensor:
    """Inner products (1, 1), (2, 2) and (1, 2) of v, `[3, rows, 1]` or `[3, 1, width]`."""
    first, second = models if base is None else (model - base for model in models)
    if along == 0 and first.ndim > 2:
        first, second = first.flatten(0, -2), second.flatten(0, -2)
    pairs = ((first, first), (second, second), (first, second))
    return torch.stack([(a * b).sum(along, keepdim=True, dtype=torch.float64) for a, b in pairs])


def _arc(products: Tensor, weights: Sequence[float]) -> Arc:
    first, second, product = products
    return Arc(*arc((first, second), product, second_share(weights), STRAIGHT))
