from collections.abc import Sequence

from torch import Tensor

from fishertool.merging.method import total_of


def linear(models: Sequence[Tensor], weights: Sequence[float], *, normalize: bool = True) -> Tensor:
    """Weighted average of the models.

        theta = sum_i c_i theta_i            with c divided by sum_i c_i if `normalize`

    Shapes: every model and the result alike. Raises ZeroDivisionError where the weights sum to
    zero and are to be normalized. Source: Wortsman et al. 2022, arXiv 2203.05482 (model soups);
    name, parameters and meaning as mergekit's `linear`.
    """
    total = total_of(weights) if normalize else 1.0
    result = models[0] * (weights[0] / total)
    for model, weight in zip(models[1:], weights[1:], strict=True):
        result.add_(model, alpha=weight / total)
    return result
