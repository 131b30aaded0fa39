from collections.abc import Sequence

from torch import Generator, Tensor

from fishertool.merging.method import PerModel, fractions
from fishertool.merging.parts.sparsify import drop_at_random
from fishertool.merging.parts.task_vectors import add_task_vectors


def dare_linear(
    models: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor,
    generators: Sequence[Generator],
    *,
    density: PerModel = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
) -> Tensor:
    """Drop entries of each task vector at random, add what is left.

        tau_i = b_i (theta_i - theta_0) / p_i,     b_i = 1 with probability p_i, else 0
        theta = theta_0 + lambda sum_i c_i tau_i

    p_i is `density`, one for all models or one for each. Without `rescale` nothing is divided
    by p_i. `normalize` divides the c_i by their sum, where that is not zero; `lambda` scales
    the sum.

    A kept entry is divided by p_i, as in the paper, so that its mean is right; mergekit scales a
    tensor to its former L1 norm, which is a matter of luck for a small one.

    Shapes: every model, the base and the result alike. Source: Yu et al. 2024, arXiv 2311.03099;
    name, parameters and meaning as mergekit's `dare_linear`.
    """
    densities = fractions("density", density, len(models))
    return add_task_vectors(
        models,
        weights,
        base,
        lambda i, vector: drop_at_random(vector, densities[i], generators[i], rescale),
        elect=False,
        normalize=normalize,
        lambda_=lambda_,
    )
