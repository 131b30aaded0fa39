from collections.abc import Sequence

from torch import Tensor

from fishertool.merging.method import Passes
from fishertool.merging.parts.sphere import arc, combine, gram, second_share

STRAIGHT = 0.9995


def slerp(
    models: tuple[Tensor, Tensor],
    weights: Sequence[float],
    whole: tuple[float, float],
    *,
    t: float | None = None,
) -> Tensor:
    """Spherical interpolation between two models, a tensor at a time.

        theta = (sin((1 - t) phi) theta_1 + sin(t phi) theta_2) / sin(phi)

    phi is the angle between the two tensors; where |cos(phi)| > 0.9995, or one of them is zero,
    theta = (1 - t) theta_1 + t theta_2. `t` is 0 at the first model (mergekit's `base_model`) and
    1 at the second; without it, it is the second weight's share. A `t` beside weights that
    differ raises ValueError.

    A zero tensor has no angle, for which mergekit takes a right one.

    Shapes: both models and the result alike. Source: Shoemake 1985, Animating Rotation with
    Quaternion Curves; name, parameter and meaning as mergekit's `slerp`.
    """
    return combine(models, whole)


def whole(
    weights: Sequence[float], elements: int, *, t: float | None = None
) -> Passes[tuple[float, float]]:
    """The coefficients of the two models."""
    if t is None:
        t = second_share(weights)
    elif weights[0] != weights[1]:
        raise ValueError("t and weights both say how far to go; give one of them")
    products = yield gram
    first, second = arc((products[0, 0], products[1, 1]), products[0, 1], t, STRAIGHT)
    return float(first), float(second)
