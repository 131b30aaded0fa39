from torch import Tensor

from fishertool.merging.method import refuse_negative


def nearswap(models: tuple[Tensor, Tensor], *, t: float = 1e-4) -> Tensor:
    """Move each weight of the first model to the second's, but by `t` at most.

        theta = theta_1 + min(1, t / |theta_2 - theta_1|) (theta_2 - theta_1)

    The first model is mergekit's `base_model`; t is in units of a weight.

    Differences below 1e-6 are not treated apart, as mergekit does.

    Shapes: both models and the result alike. Raises ValueError for a negative t. Source:
    alchemonaut 2024, QuartetAnemoi-70B-t0.0001 (huggingface.co), whose t is the default; name,
    parameter and meaning as mergekit's `nearswap`.
    """
    refuse_negative(t=t)
    first, second = models
    return (second - first).clamp_(-t, t).add_(first)
