"""Merge methods: identities over all of them, and each formula against a loop over numbers."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fishertool.merging.fisher import fisher
from fishertool.merging.linear import linear
from fishertool.merging.method import Fisher
from fishertool.recipe.flags import PRESETS
from fishertool.registry import find_method, method_names

PACKAGE = "fishertool.merging"
SHAPES = [(1,), (2,), (63,), (64,), (7, 9)]
KNOWN_INPUTS = {"models", "weights", "fishers", "base"}
METHODS = [
    name
    for name in method_names(PACKAGE)
    if {i for i, required in find_method(PACKAGE, name).inputs.items() if required} <= KNOWN_INPUTS
]
WITHOUT_BASE = [name for name in METHODS if not find_method(PACKAGE, name).inputs.get("base")]
WEIGHTS = [(0.5, 0.5), (0.3, 0.7), (2.0, 1.0)]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sidecar(values: Tensor) -> Fisher:
    """One tensor that is the whole model."""
    wide = values.double()
    mean = float(wide.mean())
    return Fisher(values, mean, mean, float(wide.square().sum().sqrt()))


def fishers_for(models: Sequence[Tensor]) -> list[Fisher]:
    """Squares, over several orders of magnitude."""
    return [
        sidecar(random(*model.shape, seed=50 + n, dtype=model.dtype).pow(4))
        for n, model in enumerate(models)
    ]


def run(
    name: str, models: Sequence[Tensor], weights: Sequence[float], base: Tensor | None
) -> Tensor:
    inputs = find_method(PACKAGE, name).inputs
    arguments: dict[str, Any] = {}
    if "fishers" in inputs:
        arguments["fishers"] = fishers_for(models)
    if base is not None and "base" in inputs:
        arguments["base"] = base
    before = [tensor.clone() for tensor in _tensors(models, arguments)]
    merged: Tensor = find_method(PACKAGE, name).function(models, weights, **arguments)
    for tensor, old in zip(_tensors(models, arguments), before, strict=True):
        assert torch.equal(tensor, old)
        assert merged.data_ptr() != tensor.data_ptr()
    assert (merged.shape, merged.dtype) == (models[0].shape, models[0].dtype)
    assert merged.isfinite().all()
    return merged


def _tensors(models: Sequence[Tensor], arguments: dict[str, Any]) -> list[Tensor]:
    bases = [arguments["base"]] if "base" in arguments else []
    return [*models, *bases, *(one.values for one in arguments.get("fishers", []))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_equal_models_merge_to_themselves(
    name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    model = random(*shape, seed=1, dtype=dtype)
    for count in (2, 3):
        for base in (None, model.clone()) if name in WITHOUT_BASE else (model.clone(),):
            merged = run(name, [model.clone() for _ in range(count)], [1 / count] * count, base)
            torch.testing.assert_close(merged, model)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_arguments_are_left_alone_and_the_result_is_finite(
    name: str, shape: tuple[int, ...]
) -> None:
    models = [random(*shape, seed=n) for n in range(3)]
    bases = [random(*shape, seed=9)] + ([None] if name in WITHOUT_BASE else [])
    for base in bases:
        run(name, models, [0.2, 0.3, 0.5], base)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", WITHOUT_BASE)
def test_all_the_weight_on_one_model_gives_that_model(name: str, shape: tuple[int, ...]) -> None:
    models = [random(*shape, seed=1), random(*shape, seed=2)]
    for number, weights in enumerate([(1.0, 0.0), (0.0, 1.0)]):
        merged = run(name, models, weights, None)
        torch.testing.assert_close(merged, models[number], rtol=1e-6, atol=0)


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
