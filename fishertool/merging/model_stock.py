from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from fishertool.merging.method import Passes
from fishertool.merging.parts.sphere import combine, gram


def model_stock(
    models: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor,
    whole: float | None,
    *,
    filter_wise: bool = False,
) -> Tensor:
    """Go from the base towards the mean of the models, as far as these agree.

        theta = t (1/k) sum_i theta_i + (1 - t) theta_0
        t     = k cos(phi) / (1 + (k - 1) cos(phi))

    cos(phi) is the mean over the pairs of models of the cosine between their task vectors; 0
    where one of them is zero. t = 0 where the denominator is zero. With `filter_wise` every run
    along the last dimension has a t of its own. The weights have no part in it.

    Cosines are exact at any scale; mergekit's shrink where the product of two lengths is below
    1e-6.

    Shapes: every model, the base and the result alike. Source: Jang et al. 2024, arXiv
    2403.19522; name, parameters and meaning as mergekit's `model_stock`.
    """
    if whole is not None:
        return combine(models, [whole / len(models)] * len(models), base)
    vectors = [model - base for model in models]
    lengths = [vector.norm(dim=-1, keepdim=True, dtype=torch.float64) for vector in vectors]
    cosines = [
        _cosine(
            (vectors[i] * vectors[j]).sum(-1, keepdim=True, dtype=torch.float64),
            lengths[i] * lengths[j],
        )
        for i, j in combinations(range(len(models)), 2)
    ]
    t = _ratio(torch.stack(cosines).mean(0), len(models)).to(base.dtype)
    merged = vectors[0]
    for vector in vectors[1:]:
        merged.add_(vector)
    return merged.mul_(t / len(models)).add_(base)


def whole(
    weights: Sequence[float], elements: int, *, filter_wise: bool = False
) -> Passes[float | None]:
    """t of the whole tensor."""
    if filter_wise:
        return None
    products = yield gram
    lengths = products.diagonal().sqrt()
    cosines = _cosine(products, lengths * lengths[:, None])
    pairs = torch.ones_like(cosines).triu(1).bool()
    return float(_ratio(cosines[pairs].mean(), len(weights)))


def _cosine(product: Tensor, length: Tensor) -> Tensor:
    return torch.where(length > 0, product / length, 0).clamp(-1, 1)


def _ratio(cosine: Tensor, models: int) -> Tensor:
    denominator = 1 + (models - 1) * cosine
    return torch.where(denominator.abs() < 1e-6, 0, models * cosine / denominator)
