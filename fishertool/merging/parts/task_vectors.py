"""The base and a sum of task vectors, which one part of a formula has thinned out."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fishertool.merging.method import total_of

Sparsify = Callable[[int, Tensor], Tensor]
"""A model's number and some rows of its task vector, which may be written to -> what is kept."""


def keep_all(model: int, vector: Tensor) -> Tensor:
    return vector


def add_task_vectors(
    models: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor,
    sparsify: Sparsify = keep_all,
    *,
    elect: bool = False,
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """base + lambda sum_i c_i s(tau_i), with s = `sparsify`.

    With `normalize` the sum is divided by sum_i c_i, where that is not zero. With `elect` the sum
    (and the sum it is divided by) is that of `add_elected`.
    """
    total = total_of(weights)
    scale = 1 / total if normalize and total and not elect else 1.0
    vectors = [sparsify(i, model - base) for i, model in enumerate(models)]
    if elect:
        signed = [
            vector.neg_() if weight < 0 else vector
            for vector, weight in zip(vectors, weights, strict=True)
        ]
        sizes = [abs(weight) for weight in weights]
        mixed = add_elected(signed, sizes, votes=sizes, normalize=normalize)
    else:
        mixed = vectors[0].mul_(weights[0] * scale)
        for vector, weight in zip(vectors[1:], weights[1:], strict=True):
            mixed.add_(vector, alpha=weight * scale)
    return torch.add(base, mixed, alpha=lambda_)


def add_elected(
    vectors: Sequence[Tensor], weights: Sequence[float], votes: Sequence[float], *, normalize: bool
) -> Tensor:
    """Sum at each entry over the vectors that have its elected sign; it overwrites the vectors.

        sign   = sign(sum_i votes_i v_i), positive where that is zero
        result = sum_i weights_i v_i          over the i with sign(v_i) = sign,
                 divided by sum_i weights_i over the same i if `normalize`

    Weights are at least 0. Source: Yadav et al. 2023, arXiv 2306.01708, section 4.
    """
    sign = torch.zeros_like(vectors[0])
    for vector, vote in zip(vectors, votes, strict=True):
        sign.add_(vector, alpha=vote)
    # The sum of numbers that cancel is +0.
    sign = torch.copysign(torch.ones((), dtype=sign.dtype), sign)
    result, total = torch.zeros_like(sign), torch.zeros_like(sign)
    for vector, weight in zip(vectors, weights, strict=True):
        agreeing = vector.mul_(sign).clamp_(min=0)
        result.add_(agreeing, alpha=weight)
        if normalize:
            total.add_(agreeing.sign_(), alpha=weight)
    result.mul_(sign)
    # Where nobody agrees both are zero, and so is the quotient.
    return result.div_(total.clamp_(min=torch.finfo(total.dtype).tiny)) if normalize else result
