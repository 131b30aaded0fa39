from collections.abc import Sequence

from torch import Tensor

from fishertool.merging.method import Passes, PerModel, fractions
from fishertool.merging.parts.sparsify import Range, find_ranges, keep_range
from fishertool.merging.parts.task_vectors import add_task_vectors


def ties(
    models: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor,
    whole: Sequence[Range],
    *,
    density: PerModel = 1.0,
    normalize: bool = True,
    rescale: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Trim each task vector to its largest entries, elect a sign for each entry, merge what agrees.

        tau_i = theta_i - theta_0, with zeros for all but the `density` largest of its |tau_i|
        sign  = sign(sum_i c_i tau_i), positive where that is zero
        theta = theta_0 + lambda sum_i c_i tau_i / sum_i |c_i|       over the i with that sign

    `density` is a fraction, one for all models or one for each. Without `normalize` the sum is
    not divided. `lambda` scales it. `rescale` scales what is kept of each tau_i to the L1 norm
    of all of it.

    All entries as large as the last one kept are kept, as in the paper's code, where mergekit
    keeps those that its sort leaves in front; a negative c_i reverses its vote and does not
    lessen the divisor, as it does there.

    Shapes: every model, the base and the result alike. Source: Yadav et al. 2023, arXiv
    2306.01708; name, parameters and meaning as mergekit's `ties`.
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


def whole(
    weights: Sequence[float], elements: int, *, density: PerModel = 1.0, rescale: bool = False
) -> Passes[list[Range]]:
    """For each model the sizes that are kept; at least one entry where the density is not 0."""
    counts = [
        None if one == 1 else (0, max(1, int(one * elements)) if one else 0)
        for one in fractions(density, len(weights), "density")
    ]
    return find_ranges(counts, elements, rescale)
