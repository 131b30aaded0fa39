from collections.abc import Sequence

from torch import Tensor


def passthrough(models: tuple[Tensor], weights: Sequence[float], *, scale: float = 1.0) -> Tensor:
    """One model as it is, or scaled: for slices of models put on top of each other.

        theta = scale theta_1

    `scale` may differ from tensor to tensor; the weights given have no part in it.

    Shapes: the model and the result alike. Source: name, parameter and meaning as mergekit's
    `passthrough`.
    """
    [model] = models
    return model * scale
