from collections.abc import Iterator, Sequence
from math import inf
from typing import Literal

import torch
from torch import Tensor

from fishertool.merging.linear import linear
from fishertool.merging.method import Fisher, Passes, refuse_negative
from fishertool.merging.parts.blocks import blocks
from fishertool.merging.parts.threshold import kth_largest

RELATIVE_FLOOR = 1e-6
ANCHOR = 1e-3


def fisher(
    models: Sequence[Tensor],
    weights: Sequence[float],
    fishers: Sequence[Fisher],
    base: Tensor | None = None,
    whole: Sequence[float] | None = None,
    *,
    normalization: Literal["mean", "l2", "none"] = "mean",
    power: float = 1.0,
    floor: float | None = None,
    floor_scale: Literal["relative", "absolute"] = "relative",
    floor_models: Literal["all", "first"] = "all",
    anchor: float | None = None,
    trim: float = 1.0,
    lambda_: float = 1.0,
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

    With a base, task vectors tau_i = theta_i - theta_0 may be changed before and after:

        tau_i = 0 but for the fraction `trim` of a tensor's weights with the largest F_i tau_i^2
        theta = theta_0 + `lambda` (the average - theta_0)

    A weight trimmed from tau_i speaks for the base as strongly as it spoke for theta_i.

    Shapes: every model, Fisher and the result alike. Raises ValueError for a weight, power, floor or
    anchor below zero, and for an anchor, trim or lambda without a base. Source: Matena and Raffel
    2022, arXiv 2111.09832; `power` 0.5 as in arXiv 2509.11167, lambda as in arXiv 2504.18992.
    """
    if base is None:
        for name, changed in (("anchor", anchor), ("trim", trim != 1), ("lambda", lambda_ != 1)):
            if changed:
                raise ValueError(f"fisher {name} needs a base")
    refuse_negative(weight=weights, power=power, floor=floor or 0.0, anchor=anchor or 0.0)
    if floor is None:
        floor = RELATIVE_FLOOR if base is None else 0.0
    scales = [{"mean": one.mean, "l2": one.l2, "none": 1.0}[normalization] for one in fishers]
    numerator = torch.zeros_like(models[0])
    denominator = torch.zeros_like(models[0])
    for i, (model, weight, one, scale) in enumerate(
        zip(models, weights, fishers, scales, strict=True)
    ):
        lowest = floor * (one.tensor_mean if floor_scale == "relative" else 1.0)
        amount = one.values / scale
        if floor_models == "all" or i == 0:
            amount.clamp_(min=lowest / scale)
        amount.pow_(power).mul_(weight)
        denominator.add_(amount)
        if base is not None and trim != 1.0:
            assert whole is not None, "trim stands on what `whole` finds"
            model = torch.where(_root_saliency(model, base, one.values) >= whole[i], model, base)
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
    if not known.all():
        merged = torch.where(known, merged, linear(models, weights) if base is None else base)
    if base is not None and lambda_ != 1.0:
        merged.sub_(base).mul_(lambda_).add_(base)
    return merged


def whole(
    weights: Sequence[float], elements: int, *, trim: float = 1.0
) -> Passes[list[float] | None]:
    """For each model the least sqrt(F) |tau| that is kept; those equal to it all are."""
    if not 0 <= trim <= 1:
        raise ValueError(f"fisher trim: {trim} is not a fraction")
    if trim == 1.0:
        return None
    kept = round(trim * elements)
    if not kept:
        return [inf] * len(weights)
    found = yield from kth_largest(_root_saliencies, [[kept]] * len(weights), elements)
    return [least for [least] in found]


def _root_saliencies(
    models: Sequence[Tensor], base: Tensor | None, fishers: Sequence[Fisher]
) -> Iterator[list[Tensor]]:
    if base is None:
        raise ValueError("fisher trim needs a base")
    values = [one.values for one in fishers]
    for *parts, origin in blocks(*models, *values, base):
        pairs = zip(parts[: len(models)], parts[len(models) :], strict=True)
        yield [_root_saliency(model, origin, diagonal) for model, diagonal in pairs]


def _root_saliency(model: Tensor, base: Tensor, diagonal: Tensor) -> Tensor:
    # Ordered as F tau^2 is, which of a language model would be too small for float32.
    return (model - base).abs_().mul_(diagonal.sqrt()).float()
