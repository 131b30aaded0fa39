from collections.abc import Sequence

from torch import Generator, Tensor

from fishertool.merging.method import PerModel, fractions
from fishertool.merging.parts.sparsify import drop_at_random
from fishertool.merging.parts.task_vectors import add_task_vectors


def dare_ties(
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
    """Drop entries of each task vector at random, elect a sign for each entry, merge what agrees.

        tau_i = b_i (theta_i - theta_0) / p_i,     b_i = 1 with probability p_i, else 0
        sign  = sign(sum_i c_i tau_i), positive where that is zero
        theta = theta_0 + lambda sum_i c_i tau_i         over the i with that sign

    p_i is `density`, one for all models or one for each. Without `rescale` nothing is divided
    by p_i. `normalize` divides the sum by sum_i |c_i| over the same i. `lambda` scales it.

    A kept entry is divided by p_i, as in the paper, so that its mean is right; mergekit scales a
    tensor to its former L1 norm, which is a matter of luck for a small one.

    Shapes: every model, the base and the result alike. Source: Yu et al. 2024, arXiv 2311.03099,
    with the election of arXiv 2306.01708; name, parameters and meaning as mergekit's `dare_ties`.
    """
    densities = fractions("density", density, len(models))
    return add_task_vectors(
        models,
        weights,
        base,
        lambda i, vector: drop_at_random(vector, densities[i], generators[i], rescale),
        elect=True,
        normalize=normalize,
        lambda_=lambda_,
    )
