"""Every saliency against its formula, written out weight by weight in float64."""

import inspect
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fishertool.fisher.columns import HeldGradients
from fishertool.fisher.rank_one import RankOneFisher
from fishertool.pruning.fisher import fisher
from fishertool.pruning.gaprune import gaprune
from fishertool.pruning.magnitude import magnitude
from fishertool.pruning.method import Fisher
from fishertool.pruning.mfac import mfac
from fishertool.pruning.obs import obs
from fishertool.pruning.random import random
from fishertool.pruning.sparsegpt import sparsegpt
from fishertool.pruning.wanda import wanda
from fishertool.registry import find_method, method_names

METHODS = method_names("fishertool.pruning")
SHAPES = [(1, 1), (1, 2), (9, 7), (4, 16), (12, 25)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment(width: int, tokens: int = 40) -> Tensor:
    """Of inputs whose features depend on each other."""
    x = normal(tokens, width, seed=3) @ normal(width, width, seed=4)
    return x.T @ x / tokens


def everything(shape: tuple[int, int]) -> dict[str, Any]:
    """All that a method may ask for."""
    first, second = normal(*shape, seed=1).square(), normal(*shape, seed=2).square()
    return {
        "weight": normal(*shape),
        "fisher": Fisher(first, float(first.mean())),
        "general": Fisher(second, float(second.mean())),
        "gradient": normal(*shape, seed=5),
        "general_gradient": normal(*shape, seed=6),
        "inverse_diagonal": normal(*shape, seed=7).square().double() + 0.1,
        "inverse_blocks": normal(*shape, 1, 1, seed=9).square().double() + 0.1,
        "pruned": 1,
        "gone": normal(*shape, seed=10) > 1,
        "activations": moment(shape[1]),
        "generator": torch.Generator().manual_seed(8),
        "magnitude": 0.7,
    }


def test_the_methods_are_those_of_the_issue() -> None:
    assert METHODS == [
        "fisher", "gaprune", "magnitude", "mfac", "obs", "random", "sparsegpt", "wanda",
    ]  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_saliency_is_of_the_weights_shape_and_changes_nothing(
    name: str, shape: tuple[int, int]
) -> None:
    method = find_method("fishertool.pruning", name)
    inputs = {key: value for key, value in everything(shape).items() if key in method.inputs}
    kept = {key: value.clone() for key, value in inputs.items() if isinstance(value, Tensor)}
    saliency = method.function(**inputs)
    assert (saliency.shape, saliency.dtype) == (shape, torch.float32)
    assert saliency.isfinite().all()
    assert all(torch.equal(inputs[key], value) for key, value in kept.items())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_documents_itself(name: str) -> None:
    method = find_method("fishertool.pruning", name)
    text = inspect.getdoc(method.function) or ""
    assert method.summary.endswith(".") and text.isascii()
    assert "Source" in text and "Shapes:" in text
    for setting in method.settings:
        assert f"`{setting}`" in text, f"{name} does not document `{setting}`"
    assert method.inputs["weight"] and set(method.inputs) <= set(everything((2, 2)))


def test_magnitude_and_random() -> None:
    weight = normal(9, 7)
    assert torch.equal(magnitude(weight), weight.abs())
    drawn = [random(weight, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_wanda_is_magnitude_times_the_norm_of_the_input() -> None:
    x, weight = normal(40, 7, seed=3), normal(9, 7)
    expected = [
        [abs(w) * float(x[:, j].double().norm()) for j, w in enumerate(row)]
        for row in weight.tolist()
    ]
    found = wanda(weight, x.T @ x / 40) * 40**0.5
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=0)


def test_fisher_is_optimal_brain_damage() -> None:
    weight, values = normal(9, 7), normal(9, 7, seed=1).square() * 1e-30
    found = fisher(weight, Fisher(values, 2e-30))
    for w, f, one in zip(weight.flatten(), values.flatten(), found.flatten(), strict=True):
        assert float(one) == pytest.approx(0.5 * float(w) ** 2 * float(f) / 2e-30, rel=1e-6)
    with pytest.raises(ValueError, match="zero everywhere"):
        fisher(weight, Fisher(0 * values, 0.0))


@pytest.mark.parametrize("block", [4, 8, None])
def test_obs_is_the_rise_of_the_loss_at_the_constrained_minimum(block: int | None) -> None:
    """Each weight is set to zero and the quadratic model minimized over the others, by a solver."""
    weight, gradients = normal(4, 16), normal(11, 4, 16, seed=1)
    curvature = RankOneFisher(HeldGradients({"w": gradients}), 0.05, block)
    inverse = curvature.inverse_diagonal().reshape(weight.shape)
    found = mfac(weight, inverse) if block is None else obs(weight, inverse[..., None, None], 1)
    rows = gradients.reshape(11, -1).double()
    dense = rows.T @ rows / 11
    side = block or 64
    places = torch.arange(64) // side
    dense = dense * (places[:, None] == places) + 0.05 * torch.eye(64, dtype=torch.float64)
    for q, w in enumerate(weight.flatten().double()):
        others = torch.tensor([i for i in range(64) if i != q])
        moves = torch.linalg.solve(dense[others][:, others], dense[others, q] * w)
        change = torch.zeros(64, dtype=torch.float64)
        change[others], change[q] = moves, -w
        expected = float(change @ dense @ change) / 2
        assert float(found.flatten()[q]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("members", [3, 40])
@pytest.mark.parametrize(("size", "pruned"), [(2, 1), (4, 2), (4, 4), (8, 3)])
def test_obs_of_a_group_is_the_rise_for_its_best_set(members: int, size: int, pruned: int) -> None:
    """Every set of a group is set to zero and the quadratic model minimized over all others."""
    weight, gradients = normal(2, 16), normal(members, 2, 16, seed=1)
    curvature = RankOneFisher(HeldGradients({"w": gradients}), 0.05, 8)
    blocks = curvature.inverse_blocks(size).reshape(2, -1, size, size)
    found = obs(weight, blocks, pruned).flatten()
    rows = gradients.reshape(members, -1).double()
    places = torch.arange(32) // 8
    dense = rows.T @ rows / members * (places[:, None] == places)
    dense += 0.05 * torch.eye(32, dtype=torch.float64)
    w = weight.flatten().double()
    expected = torch.full_like(w, torch.inf)
    for start in range(0, 32, size):
        rises = {}
        for together in itertools.combinations(range(start, start + size), pruned):
            gone = torch.tensor(together)
            others = torch.tensor([i for i in range(32) if i not in together])
            change = torch.zeros_like(w)
            change[gone] = -w[gone]
            change[others] = torch.linalg.solve(
                dense[others][:, others], dense[others][:, gone] @ w[gone]
            )
            rises[together] = float(change @ dense @ change) / 2
            for one in together:
                expected[one] = min(float(expected[one]), rises[together] / pruned)
        order = found[start : start + size].argsort(stable=True)[:pruned]
        assert set((order + start).tolist()) == set(min(rises.items(), key=lambda item: item[1])[0])
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", ["paper", "normalized"])
def test_gaprune_is_domain_alignment_importance(form: Any) -> None:
    inputs = everything((9, 7))
    weight, magnitude = inputs["weight"], inputs["magnitude"]
    a, b = inputs["gradient"].double(), inputs["general_gradient"].double()
    cosine = float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())
    found = gaprune(**{name: inputs[name] for name in (
        "weight", "fisher", "general", "gradient", "general_gradient", "magnitude"
    )}, beta=0.9, alpha=0.3, gamma=0.4, dai_form=form)  # fmt: skip
    scales = (1, 1, 1) if form == "paper" else (
        inputs["fisher"].mean, inputs["general"].mean, magnitude
    )  # fmt: skip
    for place in range(63):
        domain = float(inputs["fisher"].values.flatten()[place]) / scales[0]
        general = float(inputs["general"].values.flatten()[place]) / scales[1]
        size = abs(float(weight.flatten()[place])) / scales[2]
        expected = ((domain - 0.9 * general) * size + 0.4 * size**0.5) * (1 + 0.3 * cosine)
        assert float(found.flatten()[place]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_gaprune_in_the_papers_form_is_magnitude_at_the_scale_of_real_fishers() -> None:
    inputs = everything((40, 50))
    domain, general = (Fisher(inputs[n].values * 1e-8, 1e-8) for n in ("fisher", "general"))
    weight, a, b = inputs["weight"], inputs["gradient"], inputs["general_gradient"]
    paper = gaprune(weight, domain, general, a, b, 0.7).flatten().argsort()
    terms = gaprune(weight, domain, general, a, b, 0.7, dai_form="normalized")
    normalized = terms.flatten().argsort()
    by_size = weight.abs().flatten().argsort()
    assert torch.equal(paper, by_size)
    assert not torch.equal(normalized, by_size)


@pytest.mark.parametrize("width", [1, 2, 16, 63])
def test_sparsegpt_is_by_the_inverse_hessian_of_later_columns(width: int) -> None:
    """1 / U_jj^2 is 1 / [H_j..^-1]_jj: the error if only columns from j on may move."""
    weight, activations = normal(5, width), moment(width)
    found = sparsegpt(weight, activations, damping=0.02)
    hessian = 2 * activations.double()
    hessian += 0.02 * hessian.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    for j in range(width):
        rest = torch.linalg.inv(hessian[j:, j:])
        expected = weight[:, j].double().square() / rest[0, 0]
        torch.testing.assert_close(found[:, j].double(), expected, rtol=1e-5, atol=0)


def test_sparsegpt_refuses_an_input_that_is_zero() -> None:
    with pytest.raises(ValueError, match="zero everywhere"):
        sparsegpt(normal(2, 3), torch.zeros(3, 3))
