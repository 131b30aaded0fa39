from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fishertool.merging.linear import linear
from fishertool.merging.method import Fisher

RELATIVE_FLOOR = 1e-6
ANCHOR = 1e-3


def fisher(
    models: Sequence[Tensor],
    weights: Sequence[float],
    fishers: Sequence[Fisher],
    base: Tensor | None = None,
    *,
    normalization: Literal["mean", "l2", "none"] = "mean",
    power: float = 1.0,
    floor: float | None = None,
    floor_scale: Literal["relative", "absolute"] = "relative",
    floor_models: Literal["all", "first"] = "all",
    anchor: float | None = None,
) -> Tensor:
    """Average weighted by how much each model's predictions depend on each weight.

        theta = (sum_i c_i A_i theta_i + mu A_0 theta_0) / (sum_i c_i A_i + mu A_0)
        A_i   = (max(F_i, floor_i) / s_i) ^ power

    s_i      the model's whole Fisher in one number: its mean, its L2 norm, or 1 (`normalization`)
    floor_i  `floor` times the tensor's mean Fisher, or `floor` itself (`floor_scale` relative or
             absolute), for all models or the first only (`floor_models`); 1e-6 unless given, and
             0 if there is a base
    mu       `anchor`, 1e-3 unless given; A_0 is a constant, sum_i c_i times model i's typical A_i,
             so that mu is what the base counts for beside an average weight of all models
             together, whatever the scale of the c_i
    theta_0  the base, if given

    Where the denominator is zero (no model has information, or only models of weight zero have),
    the result is the base's weight, or without a base the average by `weights`.

    Shapes: every model, Fisher and the result alike. Raises ValueError for an anchor without a
    base. Source: Matena and Raffel 2022, arXiv 2111.09832; `power` 0.5 as in arXiv 2509.11167.
    """
    if base is None and anchor:
        raise ValueError("an anchor needs a base")
    if floor is None:
        floor = RELATIVE_FLOOR if base is None else 0.0
    scales = [{"mean": one.mean, "l2": one.l2, "none": 1.0}[normalization] for one in fishers]
    numerator = torch.zeros_like(models[0])
    denominator = torch.zeros_like(models[0])
    for i, (model, weight, one, scale) in enumerate(
        zip(models, weights, fishers, scales, strict=True)
    ):
        amount = one.values / scale
        if floor_models == "all" or i == 0:
            unit = one.tensor_mean if floor_scale == "relative" else 1.0
            amount.clamp_(min=floor * unit / scale)
        if power != 1.0:
            amount.pow_(power)
        amount.mul_(weight)
        denominator.add_(amount)
        numerator.addcmul_(amount, model)
    if base is not None:
        typical = sum(
            weight * (one.mean / scale) ** power
            for weight, one, scale in zip(weights, fishers, scales, strict=True)
        )
        prior = (ANCHOR if anchor is None else anchor) * typical
        denominator.add_(prior)
        numerator.add_(base, alpha=prior)
    known = denominator > torch.finfo(denominator.dtype).tiny
    merged = numerator.div_(denominator)
    if known.all():
        return merged
    return torch.where(known, merged, linear(models, weights) if base is None else base)
