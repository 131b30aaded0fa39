"""What must be true of every merge method, and of every one that is yet to come."""

from typing import Any

import pytest
import torch
from merge_driver import METHODS, PACKAGE, merge, random
from torch import Tensor

from fishertool.registry import find_method

SHAPES = [(1,), (2,), (63,), (64,), (7, 9), (3, 4, 5)]
NEEDS_BASE = {name for name in METHODS if find_method(PACKAGE, name).inputs.get("base")}
TAKES_BASE = {name for name in METHODS if "base" in find_method(PACKAGE, name).inputs}
RANDOM = [name for name in METHODS if "generators" in find_method(PACKAGE, name).inputs]
WITHOUT_WEIGHTS = {"arcee-fusion", "model-stock", "nearswap", "passthrough", "sce"}
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "arcee-fusion": [{}],
    "breadcrumbs": [{"density": [0.5, 0.9], "gamma": 0.1}, {"density": 0.3, "rescale": True}],
    "breadcrumbs-ties": [{"density": 0.6, "gamma": [0.0, 0.2]}, {"normalize": True}],
    "dare-linear": [{"density": [0.5, 1.0]}, {"density": 0.0}],
    "dare-ties": [{"density": 0.5, "normalize": True}, {"density": [0.0, 0.7]}],
    "della": [{"density": 0.5, "epsilon": 0.3}, {"density": [0.2, 1.0], "rescale": False}],
    "della-linear": [{"density": 0.5}, {"density": [0.0, 0.4], "lambda": 2.0}],
    "karcher": [{"max_iter": 3}],
    "linear": [{"normalize": False}],
    "model-stock": [{"filter_wise": True}, {}],
    "multislerp": [{"normalize_weights": False}, {}],
    "nearswap": [{"t": 0.5}],
    "nuslerp": [{"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}],
    "passthrough": [{"scale": 2.0}],
    "sce": [{"select_topk": 0.4}, {"select_topk": 0.0}],
    "slerp": [{"t": 0.3}],
    "task-arithmetic": [{"normalize": True, "lambda": 0.5}],
    "ties": [{"density": [0.5, 0.2]}, {"density": 0.3, "rescale": True}, {"density": 0.0}],
}
CASES = [(name, case) for name in METHODS for case in [{}, *SETTINGS.get(name, [])]]


def counts(name: str) -> list[int]:
    return [find_method(PACKAGE, name).models or 2, find_method(PACKAGE, name).models or 3]


def bases(name: str, base: Tensor) -> list[Tensor | None]:
    return [*([base] if name in TAKES_BASE else []), *([] if name in NEEDS_BASE else [None])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_equal_models_merge_to_themselves(
    name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Methods that draw at random as well: a task vector that is zero stays so."""
    model = random(*shape, seed=1, dtype=dtype)
    for count in counts(name):
        for base in bases(name, model.clone()):
            copies = [model.clone() for _ in range(count)]
            merged = merge(name, copies, [1 / count] * count, base)
            torch.testing.assert_close(merged, model)


@pytest.mark.parametrize("shape", [(63,), (7, 9), (3, 4, 5)], ids=str)
@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_pieces_give_what_the_whole_gives(
    name: str, settings: dict[str, Any], shape: tuple[int, ...]
) -> None:
    """Bit by bit where sums over the tensor do not enter; the driver checks the arguments."""
    if name in RANDOM:
        settings = {**settings, "density": 1.0}
    if len(shape) == 1 and ((name == "nuslerp" and settings) or settings.get("filter_wise")):
        return  # one row, which is not cut
    models = [random(*shape, seed=n) for n in range(counts(name)[0])]
    weights = [0.5, 0.5] if "t" in settings else [0.3, 0.7][: len(models)]
    for base in bases(name, random(*shape, seed=9)):
        at_once = merge(name, models, weights, base, **settings)
        for rows in (1, 2, 5):
            merged = merge(name, models, weights, base, rows, **settings)
            torch.testing.assert_close(merged, at_once, rtol=1e-6, atol=1e-6)
        assert at_once.isfinite().all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", sorted(set(METHODS) - NEEDS_BASE - WITHOUT_WEIGHTS))
def test_all_the_weight_on_one_model_gives_that_model(name: str, shape: tuple[int, ...]) -> None:
    models = [random(*shape, seed=1), random(*shape, seed=2)]
    for number, weights in enumerate([(1.0, 0.0), (0.0, 1.0)]):
        merged = merge(name, models, weights)
        torch.testing.assert_close(merged, models[number], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", sorted(WITHOUT_WEIGHTS))
def test_weights_have_no_part_in_these(name: str) -> None:
    models = [random(9, 7, seed=n) for n in range(counts(name)[0])]
    base = random(9, 7, seed=9) if name in NEEDS_BASE else None
    merged = [merge(name, models, weights[: len(models)], base) for weights in ((1, 3), (2, 1))]
    assert torch.equal(*merged)


@pytest.mark.parametrize("setting", ["density", "gamma", "select_topk"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_a_fraction_is_between_0_and_1(setting: str, value: float) -> None:
    base = random(3, 4, seed=1)
    named = [name for name in METHODS if setting in find_method(PACKAGE, name).settings]
    assert named
    settings: dict[str, Any] = {setting: value}
    for name in named:
        with pytest.raises(ValueError, match=f"^{setting} {value} is not from 0 to 1"):
            merge(name, [base, base], [0.5, 0.5], base, **settings)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("breadcrumbs", {}),
        ("breadcrumbs-ties", {"density": [0.0, 1.0], "rescale": True}),
        ("model-stock", {"filter_wise": True}),
        ("nuslerp", {"nuslerp_flatten": False}),
        ("ties", {}),
        ("ties", {"density": [0.0, 1.0], "rescale": True}),
    ],
)
def test_what_is_not_needed_is_not_looked_for(name: str, settings: dict[str, Any]) -> None:
    passes = find_method(PACKAGE, name).passes([0.5, 0.5], 100, settings)
    with pytest.raises(StopIteration):
        next(passes)


@pytest.mark.parametrize("name", sorted(NEEDS_BASE))
def test_models_that_are_the_base_leave_it(name: str) -> None:
    base = random(9, 7, seed=9)
    for settings in [{}, *SETTINGS.get(name, [])]:
        assert torch.equal(merge(name, [base, base], [0.5, 0.5], base, **settings), base)


@pytest.mark.parametrize("name", RANDOM)
def test_draws_depend_on_the_generators_alone(name: str) -> None:
    models, base = [random(40, 50, seed=n) for n in range(2)], random(40, 50, seed=9)
    torch.manual_seed(1)
    once = merge(name, models, [0.5, 0.5], base, density=0.5, seed=3)
    state = torch.get_rng_state()
    assert torch.equal(merge(name, models, [0.5, 0.5], base, density=0.5, seed=3), once)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(merge(name, models, [0.5, 0.5], base, density=0.5, seed=4), once)
