from collections.abc import Sequence

from torch import Tensor

from fishertool.merging.parts.task_vectors import add_task_vectors


def task_arithmetic(
    models: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor,
    *,
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """The base plus a weighted sum of task vectors.

        theta = theta_0 + lambda sum_i c_i (theta_i - theta_0)

    `normalize` divides the c_i by their sum, where that is not zero; `lambda` scales the sum.

    Shapes: every model, the base and the result alike. Source: Ilharco et al. 2023, arXiv
    2212.04089; name, parameters and meaning as mergekit's `task_arithmetic`.
    """
    return add_task_vectors(models, weights, base, normalize=normalize, lambda_=lambda_)
