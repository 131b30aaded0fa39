from collections.abc import Sequence

from torch import Tensor

from fishertool.merging.breadcrumbs import whole as whole
from fishertool.merging.method import PerModel
from fishertool.merging.parts.sparsify import Range, keep_range
from fishertool.merging.parts.task_vectors import add_task_vectors


def breadcrumbs_ties(
    models: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor,
    whole: Sequence[Range],
    *,
    density: PerModel = 1.0,
    gamma: PerModel = 0.01,
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Drop each task vector's smallest and largest entries, elect a sign for each entry, merge.

        tau_i = theta_i - theta_0, with zeros for the `gamma` largest of its |tau_i| and for the
                smallest, so that `density` of them are left
        sign  = sign(sum_i c_i tau_i), positive where that is zero
        theta = theta_0 + lambda sum_i c_i tau_i         over the i with that sign

    Where density + gamma > 1, fewer of the largest are dropped; none where the density is 1.
    `density` and `gamma` are fractions, one for all models or one for each. `rescale` scales
    what is kept of each tau_i to the L1 norm of all of it. `normalize` divides the sum by sum_i
    |c_i| over the same i. `lambda` scales it.

    All entries as large as the last one kept at either end are kept; mergekit keeps those that
    its sort happens to leave there.

    Shapes: every model, the base and the result alike. Source: Davari and Belilovsky 2023, arXiv
    2312.06795, with the election of arXiv 2306.01708; name, parameters and meaning as mergekit's
    `breadcrumbs_ties`.
    """
    return add_task_vectors(
        models,
        weights,
        base,
        lambda i, vector: keep_range(vector, whole[i]),
        elect=True,
        normalize=normalize,
        lambda_=lambda_,
    )
