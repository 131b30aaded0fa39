from collections.abc import Sequence

from torch import Generator, Tensor

from fishertool.merging.method import PerModel, fractions, per_model
from fishertool.merging.parts.sparsify import drop_by_rank
from fishertool.merging.parts.task_vectors import add_task_vectors


def della(
    models: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor,
    generators: Sequence[Generator],
    *,
    density: PerModel = 1.0,
    epsilon: PerModel = 0.15,
    normalize: bool = True,
    rescale: bool = True,
    lambda_: float = 1.0,
) -> Tensor:
    """Keep larger entries of each task vector more likely, elect a sign for each entry, merge.

        tau_i = b_i (theta_i - theta_0) / p_i,     b_i = 1 with probability p_i, else 0
        p_i   = density + epsilon (2 (r - 1) / (n - 1) - 1)
        sign  = sign(sum_i c_i tau_i), positive where that is zero
        theta = theta_0 + lambda sum_i c_i tau_i / sum_i |c_i|       over the i with that sign

    r is an entry's rank by |tau_i| among the n of its row, 1 for the smallest; a vector is one
    row. `density` and `epsilon` are one for all models or one for each. Without `rescale`
    nothing is divided by p_i. Without `normalize` the sum is not divided. `lambda` scales it.

    A kept entry is divided by its own p_i, as in the paper, so that its mean is right; mergekit
    scales a tensor to its former L1 norm.

    Shapes: every model, the base and the result alike. Raises ValueError unless every p_i is
    between 0 and 1, or the density is 0 or 1. Source: Deep et al. 2024, arXiv
    2406.11617; name, parameters and meaning as mergekit's `della`.
    """
    densities = fractions("density", density, len(models))
    epsilons = per_model(epsilon, len(models))
    return add_task_vectors(
        models,
        weights,
        base,
        lambda i, vector: drop_by_rank(vector, densities[i], epsilons[i], generators[i], rescale),
        elect=True,
        normalize=normalize,
        lambda_=lambda_,
    )
