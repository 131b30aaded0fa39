from collections.abc import Sequence
from itertools import combinations
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from fishertool.merging.method import Passes, fractions
from fishertool.merging.parts.blocks import blocks
from fishertool.merging.parts.task_vectors import add_elected
from fishertool.merging.parts.threshold import kth_largest


class Selected(NamedTuple):
    least: float
    """The spread from which on an entry is selected."""
    shares: list[float]
    """What each model's entries count for."""


def sce(
    models: Sequence[Tensor],
    base: Tensor,
    whole: Selected,
    *,
    select_topk: float = 1.0,
) -> Tensor:
    """Select the entries that differ most, calculate weights from their size, erase minorities.

        tau_i = theta_i - theta_0, with zeros for all but the `select_topk` of the entries with
                the largest variance over the models, of those where it is not 0
        c_i   = sum of tau_i^2 over the tensor
        sign  = sign(sum_i tau_i), positive where that is zero
        theta = theta_0 + sum_i c_i tau_i / sum_i c_i       over the i with that sign

    The weights are the c_i. All entries as varied as the last
    one selected are selected. The c_i are used at any scale: where the means of tau_i^2 sum to
    under 1e-6, as in most fine-tunes, mergekit takes equal ones.

    Shapes: every model, the base and the result alike. Source: Wan et al. 2024, arXiv 2408.07990
    (FuseChat); name, parameters and meaning as mergekit's `sce`.
    """
    vectors = _selected(models, base, whole.least)
    return base + add_elected(vectors, whole.shares, [1.0] * len(models), normalize=True)


def whole(weights: Sequence[float], elements: int, *, select_topk: float = 1.0) -> Passes[Selected]:
    least = 0.0
    [share] = fractions(select_topk, 1, "select_topk")
    if share < 1:
        varied = yield lambda models, base: _spread(models).count_nonzero()
        count = int(int(varied) * share)
        if count:
            [[least]] = yield from kth_largest(
                lambda models, base: [[_spread(models)]], [[count]], elements
            )
        else:
            least = inf

    def squares(models: Sequence[Tensor], base: Tensor) -> Tensor:
        sums = torch.zeros(len(models), dtype=torch.float64)
        for *parts, origin in blocks(*models, base):
            for i, vector in enumerate(_selected(parts, origin, least)):
                sums[i] += vector.square_().sum(dtype=torch.float64)
        return sums

    sums = yield squares
    total = float(sums.sum())
    return Selected(least, (sums / total).tolist() if total else [1.0] * len(weights))


def _spread(models: Sequence[Tensor]) -> Tensor:
    """Variance over k models times k^2: the sum of their squared differences, pair by pair.

    Of numbers of few digits, as bfloat16 has, it is exact in float32, so that equals stay equal.
    """
    spread = torch.zeros_like(models[0])
    for first, second in combinations(models, 2):
        spread.add_((first - second).square_())
    return spread


def _selected(models: Sequence[Tensor], base: Tensor, least: float) -> list[Tensor]:
    vectors = [model - base for model in models]
    if least > 0:
        selected = _spread(models).ge_(least)
        for vector in vectors:
            vector.mul_(selected)
    return vectors
