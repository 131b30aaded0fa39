from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fishertool.merging.method import Passes
from fishertool.merging.parts.blocks import blocks
from fishertool.merging.parts.threshold import kth_largest


def arcee_fusion(models: tuple[Tensor, Tensor], whole: float) -> Tensor:
    """The second model's weights where they matter most, and the first's elsewhere.

        score = |theta_2 - theta_1| KL(softmax(theta_2) | softmax(theta_1))
        theta = theta_2 where score >= q_2 + 1.5 (q_3 - q_1), else theta_1

    q are the quartiles of the scores over the tensor. Softmax and KL divergence are taken along
    the last dimension, one for each row; those of a vector are the same for all its entries and
    so have no part in it. The first model is mergekit's `base_model`.

    The quartiles are exact, where mergekit draws a million scores of a larger tensor; and the
    divergence is computed without the cancellation that makes that of near models mostly
    rounding in mergekit.

    Shapes: both models and the result alike. Source: Arcee AI, Arcee Fusion (mergekit); name and
    meaning as mergekit's `arcee_fusion`.
    """
    first, second = models
    return torch.where(_score(first, second) >= whole, second, first)


def whole(weights: Sequence[float], elements: int) -> Passes[float]:
    """The least score at which the second model's weight is taken."""

    def scores(models: Sequence[Tensor], base: Tensor | None) -> Iterator[list[Tensor]]:
        for first, second in blocks(*models):
            yield [_score(first, second)]

    ranks = [elements - int(share * (elements - 1)) for share in (0.75, 0.5, 0.25)]
    [[third, median, first]] = yield from kth_largest(scores, [ranks], elements)
    return median + 1.5 * (third - first)


def _score(first: Tensor, second: Tensor) -> Tensor:
    difference = (second - first).abs_()
    if first.ndim == 1:
        return difference
    return difference.mul_(_divergence(second, first))


def _divergence(these: Tensor, those: Tensor) -> Tensor:
    """KL(softmax(these) | softmax(those)) of each row, `[rows, 1]`.

        p = softmax(these), x = those - these - mean_p(those - these):  log(mean_p(exp(x)))

    mean_p(x) is zero and so may be taken off: no term of mean_p(exp(x) - 1 - x) is negative.
    """
    p = these.softmax(-1)
    x = those - these
    x.sub_((p * x).sum(-1, keepdim=True))
    return x.expm1().sub_(x).mul_(p).sum(-1, keepdim=True).log1p_()
