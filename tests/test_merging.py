"""`linear` and `fisher` against loops over numbers."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from merge_driver import PACKAGE, fishers_for, random
from torch import Tensor

from fishertool.errors import UsageError
from fishertool.merging.fisher import fisher
from fishertool.merging.linear import linear
from fishertool.merging.method import Fisher
from fishertool.recipe.flags import PRESETS
from fishertool.registry import find_method
from fishertool.surgery.merge_trial import try_settings

WEIGHTS = [(0.5, 0.5), (0.3, 0.7), (2.0, 1.0)]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [*WEIGHTS, (1.0, 0.0), (-0.5, 1.5)])
def test_linear_is_the_weighted_sum(weights: Sequence[float], normalize: bool) -> None:
    models = [random(5, 3, seed=1), random(5, 3, seed=2)]
    merged = linear(models, weights, normalize=normalize)
    total = sum(weights) if normalize else 1.0
    for row, column in itertools.product(range(5), range(3)):
        value = sum(c * float(m[row, column]) for c, m in zip(weights, models, strict=True)) / total
        assert float(merged[row, column]) == pytest.approx(value, rel=1e-6, abs=1e-7)


def test_linear_cannot_normalize_weights_that_sum_to_zero() -> None:
    with pytest.raises(ZeroDivisionError):
        linear([random(2, seed=1)] * 2, [0.0, 0.0])


def by_loop(
    models: Sequence[Tensor],
    weights: Sequence[float],
    fishers: Sequence[Fisher],
    base: Tensor | None = None,
    normalization: str = "mean",
    power: float = 1.0,
    floor: float | None = None,
    floor_scale: str = "relative",
    floor_models: str = "all",
    anchor: float | None = None,
) -> Tensor:
    """The formula of `fisher`, one float64 number at a time."""
    if floor is None:
        floor = 1e-6 if base is None else 0.0
    scales = [{"mean": f.mean, "l2": f.l2, "none": 1.0}[normalization] for f in fishers]
    floors = [floor * (f.tensor_mean if floor_scale == "relative" else 1.0) for f in fishers]
    if floor_models == "first":
        floors[1:] = [0.0] * (len(floors) - 1)
    prior = 0.0
    if base is not None:
        typical = [(f.mean / s) ** power for f, s in zip(fishers, scales, strict=True)]
        known = sum(c * a for c, a in zip(weights, typical, strict=True))
        prior = (1e-3 if anchor is None else anchor) * known
    result = torch.empty_like(models[0], dtype=torch.float64)
    for j in range(result.numel()):
        above = below = 0.0
        for model, weight, f, s, lowest in zip(
            models, weights, fishers, scales, floors, strict=True
        ):
            amount = weight * (max(float(f.values.flatten()[j]), lowest) / s) ** power
            above += amount * float(model.flatten()[j])
            below += amount
        if base is not None:
            above += prior * float(base.flatten()[j])
            below += prior
        if below > 0:
            result.view(-1)[j] = above / below
        elif base is not None:
            result.view(-1)[j] = float(base.flatten()[j])
        else:
            plain = sum(c * float(m.flatten()[j]) for c, m in zip(weights, models, strict=True))
            result.view(-1)[j] = plain / sum(weights)
    return result


@pytest.mark.parametrize("normalization", ["mean", "l2", "none"])
@pytest.mark.parametrize("power", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("floor_scale", ["relative", "absolute"])
@pytest.mark.parametrize("floor_models", ["all", "first"])
@pytest.mark.parametrize("anchor", ["no base", None, 0.0, 0.3])
def test_fisher_is_its_formula(
    normalization: str, power: float, floor_scale: str, floor_models: str, anchor: Any
) -> None:
    models = [random(4, 5, seed=n, dtype=torch.float64) for n in range(3)]
    base = random(4, 5, seed=9, dtype=torch.float64)
    fishers = fishers_for(models)
    for number, one in enumerate(fishers):
        one.values[0, : 2 + number] = 0.0  # no information: in all, in two, in one
        fishers[number] = one._replace(mean=2.5 * one.mean, l2=3.0 * one.l2)  # of a larger model
    more: dict[str, Any] = {} if anchor == "no base" else {"base": base, "anchor": anchor}
    more |= {"normalization": normalization, "power": power}
    more |= {"floor_scale": floor_scale, "floor_models": floor_models}
    for weights, floor in itertools.product([(0.2, 0.3, 0.5), (2.0, 0.0, 1.0)], [None, 0.0, 0.2]):
        found = fisher(models, weights, fishers, floor=floor, **more)
        exact = by_loop(models, weights, fishers, floor=floor, **more)
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)


def test_fisher_defaults_are_the_documented_ones() -> None:
    settings = find_method(PACKAGE, "fisher").settings
    assert settings == {
        "normalization": "mean",
        "power": 1.0,
        "floor": None,
        "floor_scale": "relative",
        "floor_models": "all",
        "anchor": None,
        "trim": 1.0,
        "lambda_": 1.0,
    }


@pytest.mark.parametrize("normalization", ["mean", "l2"])
@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("factor", [1e-4, 1e-19])
def test_the_scale_of_a_sidecar_does_not_matter(
    normalization: Any, power: float, factor: float
) -> None:
    models = [random(64, seed=1), random(64, seed=2)]
    fishers = fishers_for(models)
    settings: dict[str, Any] = {"normalization": normalization, "power": power}
    merged = fisher(models, (0.5, 0.5), fishers, **settings)
    for scaled in (
        [fishers[0], _scaled(fishers[1], factor)],
        [_scaled(fishers[0], factor), fishers[1]],
        [_scaled(one, factor) for one in fishers],
    ):
        found = fisher(models, (0.5, 0.5), scaled, **settings)
        torch.testing.assert_close(found, merged, rtol=1e-4, atol=1e-5)
        anchored = fisher(models, (0.5, 0.5), scaled, models[0] * 0, **settings)
        unscaled = fisher(models, (0.5, 0.5), fishers, models[0] * 0, **settings)
        torch.testing.assert_close(anchored, unscaled, rtol=1e-4, atol=1e-5)


def test_tiny_fishers_decide_all_the_same() -> None:
    """Those of language models are of 1e-19: an absolute floor would leave the first model."""
    models = [random(64, seed=1), random(64, seed=2)]
    fishers = [_scaled(one, 1e-19) for one in fishers_for(models)]
    merged = fisher(models, (0.5, 0.5), fishers, normalization="none")
    exact = by_loop(models, (0.5, 0.5), fishers, normalization="none")
    torch.testing.assert_close(merged.double(), exact, rtol=1e-5, atol=1e-6)
    assert float((merged - models[0]).abs().mean()) > 0.2


def _scaled(one: Fisher, factor: float) -> Fisher:
    return Fisher(one.values * factor, *(factor * number for number in one[1:]))


def test_without_information_the_base_stays() -> None:
    models, base = [random(8, seed=1), random(8, seed=2)], random(8, seed=3)
    fishers = fishers_for(models)
    for one in fishers:
        one.values[:4] = 0.0
    for anchor in (None, 0.5, 0.0):
        merged = fisher(models, (0.5, 0.5), fishers, base, anchor=anchor)
        torch.testing.assert_close(merged[:4], base[:4], rtol=1e-6, atol=0)
        assert ((merged - base)[4:].abs() > 1e-3).all()
    held = fisher(models, (0.5, 0.5), fishers, base, anchor=1e9)
    torch.testing.assert_close(held, base, rtol=1e-4, atol=1e-4)


def test_an_anchor_needs_a_base() -> None:
    models = [random(3, seed=1), random(3, seed=2)]
    with pytest.raises(ValueError, match="fisher anchor needs a base"):
        fisher(models, (0.5, 0.5), fishers_for(models), anchor=1e-3)


def test_zero_over_zero_is_the_donor_that_has_all_the_weight() -> None:
    """The released code gives NaN here."""
    models = [random(6, seed=1), random(6, seed=2)]
    fishers = fishers_for(models)
    for one in fishers:
        one.values[:3] = 0.0
    merged = fisher(models, (0.0, 1.0), fishers, **PRESETS["matena"])
    torch.testing.assert_close(merged, models[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("target_weight", [1.0, 0.8, 0.5, 0.02])
def test_the_preset_is_the_released_codes_rule(target_weight: float) -> None:
    """coefficient / (global norm of the raw Fisher) * Fisher, floored at 1e-6 in the target alone."""
    models = [random(40, seed=n, dtype=torch.float64) for n in (1, 2)]
    fishers = [_scaled(one, 1e-5) for one in fishers_for(models)]  # the floor bites
    fishers[1].values[:5] = 0.0
    weights = (target_weight, 1 - target_weight)
    norms = [math.sqrt(sum(float(value) ** 2 for value in one.values)) for one in fishers]
    fishers = [one._replace(l2=norm) for one, norm in zip(fishers, norms, strict=True)]
    merged = fisher(models, weights, fishers, **PRESETS["matena"])
    floored = 0
    for j in range(40):
        values = [float(one.values[j]) for one in fishers]
        floored += values[0] < 1e-6
        target = weights[0] / norms[0] * max(values[0], 1e-6)
        donor = weights[1] / norms[1] * values[1]
        wanted = (target * float(models[0][j]) + donor * float(models[1][j])) / (target + donor)
        assert float(merged[j]) == pytest.approx(wanted, rel=1e-9)
    assert 0 < floored < 40


@pytest.mark.parametrize("anchored", [False, True])
def test_only_the_proportion_of_the_weights_counts(anchored: bool) -> None:
    models = [torch.randn(7, 5) for _ in range(2)]
    fishers, base = fishers_for(models), torch.zeros(7, 5) if anchored else None
    once = fisher(models, (0.3, 0.7), fishers, base)
    torch.testing.assert_close(fisher(models, (3.0, 7.0), fishers, base), once)


TOO_LARGE = "its weights or settings are too large to be computed with"


@pytest.mark.parametrize(
    ("name", "weights", "settings", "told"),
    [
        ("fisher", [1.0, -0.3], {}, "weight -0.3 is negative"),
        ("fisher", [1.0, 1.0], {"floor": -1}, "floor -1.0 is negative"),
        ("fisher", [1.0, 1.0], {"anchor": -1}, "anchor -1.0 is negative"),
        ("fisher", [1.0, 1.0], {"power": -1}, "power -1.0 is negative"),
        ("multislerp", [1.0, 1.0], {"eps": -1}, "eps -1.0 is negative"),
        ("regmean", [1.0, -0.3], {}, "weight -0.3 is negative"),
        ("regmean", [1.0, 1.0], {"damping": -1}, "damping -1.0 is negative"),
        ("regmean", [1.0, 1.0], {"damping": "nan"}, "damping nan is negative"),
        ("regmean", [1.0, 1.0], {"alpha": 5}, "alpha 5.0 is not from 0 to 1"),
        ("kronecker", [1.0, -0.3], {}, "weight -0.3 is negative"),
        ("kronecker", [1.0, 1.0], {"damping": -1}, "damping -1.0 is negative"),
        ("kronecker", [1.0, 1.0], {"tolerance": -1}, "tolerance -1.0 is negative"),
        ("kronecker", [1.0, 1.0], {"iterations": -3}, "iterations -3 is negative"),
        ("nearswap", [1.0, 1.0], {"t": -0.5}, "t -0.5 is negative"),
        ("karcher", [1.0, 1.0], {"tol": 0}, "tol 0.0 is not above zero"),
        ("karcher", [1.0, -1.0], {}, "weights that sum to 0 cannot be normalized"),
        ("multislerp", [0.0, 0.0], {}, "weights that sum to 0 cannot be normalized"),
        ("linear", [1e308, 1e308], {}, TOO_LARGE),
        ("linear", [1.0, 1e300], {"normalize": False}, TOO_LARGE),
        ("ties", [1.0, 1.0], {"lambda": 1e300}, TOO_LARGE),
        ("nearswap", [1.0, 1.0], {"t": 1e300}, TOO_LARGE),
    ],
)
def test_settings_out_of_range_are_refused_by_name(
    name: str, weights: list[float], settings: dict[str, Any], told: str
) -> None:
    method = find_method(PACKAGE, name)
    with pytest.raises(UsageError, match=f"^method {name}: {told}$"):
        try_settings(method, weights, method.parse(settings), with_base="base" in method.inputs)


@pytest.mark.parametrize("name", ["linear", "task-arithmetic", "ties"])
def test_weights_below_zero_take_away(name: str) -> None:
    method = find_method(PACKAGE, name)
    try_settings(method, [1.0, -0.3], method.parse({}), with_base="base" in method.inputs)
