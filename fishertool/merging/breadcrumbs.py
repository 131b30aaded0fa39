from collections.abc import Sequence

from torch import Tensor

from fishertool.merging.method import Passes, PerModel, fractions
from fishertool.merging.parts.sparsify import Range, find_ranges, keep_range
from fishertool.merging.parts.task_vectors import add_task_vectors


def breadcrumbs(
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
    """Drop the smallest and the very largest entries of each task vector, add what is left.

        tau_i = theta_i - theta_0, with zeros for the `gamma` largest of its |tau_i| and for the
                smallest, so that `density` of them are left
        theta = theta_0 + lambda sum_i c_i tau_i

    Where density + gamma > 1, fewer of the largest are dropped; none where the density is 1.
    `density` and `gamma` are fractions, one for all models or one for each. `rescale` scales
    what is kept of each tau_i to the L1 norm of all of it. `normalize` divides the c_i by their
    sum, where that is not zero; `lambda` scales the sum.

    All entries as large as the last one kept at either end are kept; mergekit keeps those that
    its sort happens to leave there.

    Shapes: every model, the base and the result alike. Source: Davari and Belilovsky 2023, arXiv
    2312.06795; name, parameters and meaning as mergekit's `breadcrumbs`.
    """
    return add_task_vectors(
        models,
        weights,
        base,
        lambda i, vector: keep_range(vector, whole[i]),
        elect=False,
        normalize=normalize,
        lambda_=lambda_,
    )


def whole(
    weights: Sequence[float],
    elements: int,
    *,
    density: PerModel = 1.0,
    gamma: PerModel = 0.01,
    rescale: bool = False,
) -> Passes[list[Range]]:
    """For each model the sizes that are kept."""
    counts: list[tuple[int, int] | None] = []
    for share, outliers in zip(
        fractions(density, len(weights), "density"),
        fractions(gamma, len(weights), "gamma"),
        strict=True,
    ):
        count = int(share * elements)
        top = min(int(outliers * elements), elements - count)
        counts.append(None if share == 1 else (top, count))
    return find_ranges(counts, elements, rescale)
