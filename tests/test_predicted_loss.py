"""Predicted loss and the weights that make it least, against quadratic forms written out."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fishertool.fisher.predicted_loss import (
    CHUNK,
    PieceSums,
    loss_increases_of,
    quadratic_forms,
)
from fishertool.searching.best_weights import best_weights


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def problem(
    models: int, size: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """A base, models near it, Fishers of a language model's size."""
    base = random(size, seed=seed, dtype=dtype)
    fine_tunes = [base + 1e-2 * random(size, seed=seed + 1 + n, dtype=dtype) for n in range(models)]
    fishers = [1e-12 * random(size, seed=seed + 50 + n, dtype=dtype) ** 4 for n in range(models)]
    return base, fine_tunes, fishers


def increase(merged: Tensor, model: Tensor, fisher: Tensor) -> float:
    return sum(
        float(f) * (float(m) - float(t)) ** 2 / 2
        for f, m, t in zip(fisher.flatten(), merged.flatten(), model.flatten(), strict=True)
    )


def combined(base: Tensor, models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return base + sum(
        (c * (model - base) for c, model in zip(weights, models, strict=True)),
        torch.zeros_like(base),
    )


def loss_increases(forms: Tensor, weights: Tensor) -> Tensor:
    """1/2 (c - e_t)^T Q_t (c - e_t): [..., model] -> [..., task]."""
    apart = weights.unsqueeze(-2) - torch.eye(len(forms), dtype=torch.float64)
    return torch.einsum("...ti,tij,...tj->...t", apart, forms, apart) / 2


@pytest.mark.parametrize("size", [1, 2, 63, 64])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_forms_are_their_definition(count: int, size: int) -> None:
    base, models, fishers = problem(count, size)
    forms = quadratic_forms(models, fishers, base)
    assert forms.shape == (count, count, count)
    for t, i, j in itertools.product(range(count), repeat=3):
        wanted = (models[i] - base) @ fishers[t].diag() @ (models[j] - base)
        assert float(forms[t, i, j]) == pytest.approx(float(wanted), rel=1e-12, abs=1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_long_piece_is_summed_in_float64(dtype: torch.dtype) -> None:
    base, models, fishers = problem(3, 2 * CHUNK + 7, dtype=dtype)
    shape = (2 * CHUNK + 7, 1)
    forms = quadratic_forms([model.view(shape) for model in models], fishers, base.view(shape))
    vectors = torch.stack([model.double() - base.double() for model in models])
    wanted = torch.stack([(vectors * fisher.double()) @ vectors.T for fisher in fishers])
    torch.testing.assert_close(forms, wanted, rtol=1e-11, atol=0)
    found = loss_increases_of(base, models, fishers)
    torch.testing.assert_close(found, wanted.diagonal(dim1=1, dim2=2).diagonal() / 2)


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.2, 0.3, 0.5), (0.9, -0.4, 1.3)])
def test_the_loss_of_a_merge_is_predicted_by_forms_and_by_its_weights(
    weights: tuple[float, ...],
) -> None:
    base, models, fishers = problem(3, 40)
    merged = combined(base, models, weights)
    wanted = [increase(merged, m, f) for m, f in zip(models, fishers, strict=True)]
    forms = quadratic_forms(models, fishers, base)
    found = loss_increases(forms, torch.tensor(weights, dtype=torch.float64)).tolist()
    assert found == pytest.approx(wanted, rel=1e-9, abs=1e-27)
    assert loss_increases_of(merged, models, fishers).tolist() == pytest.approx(
        wanted, rel=1e-9, abs=1e-27
    )
    if weights[0] == 1.0:
        assert found[0] == 0 < min(found[1:])


def test_it_is_the_rise_of_a_cross_entropy_in_nats_an_example() -> None:
    """One logit for each of many kinds of examples: the diagonal is all of the Fisher."""
    own = random(30, seed=1)
    p = own.sigmoid()
    fisher = p * (1 - p) / len(own)  # each kind is 1 / 30 of the examples

    def loss(logits: Tensor) -> float:
        return float(torch.nn.functional.binary_cross_entropy_with_logits(logits, p))

    merged = own + 1e-3 * random(30, seed=2)
    [found] = loss_increases_of(merged, [own], [fisher]).tolist()
    assert found == pytest.approx(loss(merged) - loss(own), rel=1e-2)


def test_without_a_base_weights_that_sum_to_one_have_the_same_loss() -> None:
    base, models, fishers = problem(3, 40)
    weights = torch.tensor([[0.2, 0.3, 0.5], [1.5, -0.2, -0.3]], dtype=torch.float64)
    with_base = loss_increases(quadratic_forms(models, fishers, base), weights)
    without = loss_increases(quadratic_forms(models, fishers), weights)
    torch.testing.assert_close(without, with_base, rtol=1e-9, atol=0)


def test_pieces_add_up_to_the_same_bits_in_any_order() -> None:
    base, models, fishers = problem(2, 90)
    found = {}
    for name, start in itertools.product("ab", range(0, 90, 20)):
        part = slice(start, start + 20)
        cut = [model[part] for model in models], [fisher[part] for fisher in fishers], base[part]
        found[name, start] = quadratic_forms(*cut)
    forward, backward = PieceSums(), PieceSums()
    for (name, start), value in found.items():
        forward.add(name, start, value)
    for (name, start), value in reversed(found.items()):
        backward.add(name, start, value)
    assert torch.equal(forward.total(), backward.total())
    whole = quadratic_forms(models, fishers, base)
    by_tensor = backward.by_tensor()
    assert list(by_tensor) == ["a", "b"]
    torch.testing.assert_close(by_tensor["b"], whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(forward.total(), 2 * whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("priorities", [(1.0, 1.0, 1.0), (5.0, 0.1, 1.0), (0.0, 0.0, 2.0)])
@pytest.mark.parametrize("seed", range(5))
def test_no_point_of_a_grid_on_the_simplex_is_better(
    seed: int, priorities: tuple[float, ...]
) -> None:
    base, models, fishers = problem(3, 25, seed=100 * seed)
    models[1] = base + 3 * (models[0] - base) + 0.3 * (models[1] - base)  # near a line
    forms = quadratic_forms(models, fishers, base) * torch.tensor(priorities)[:, None, None]
    best = best_weights(forms, on_simplex=True)
    assert min(best) >= 0 and sum(best) == pytest.approx(1, abs=1e-9)
    grid = torch.tensor(
        [(i, j, 100 - i - j) for i in range(101) for j in range(101 - i)], dtype=torch.float64
    )
    values = loss_increases(forms, grid / 100).sum(-1)
    mine = float(loss_increases(forms, torch.tensor(best, dtype=torch.float64)).sum())
    scale = float(values.max())
    assert mine <= float(values.min()) + 1e-9 * scale
    assert mine >= float(values.min()) - 1e-2 * scale  # the grid is fine enough to come near


@pytest.mark.parametrize("models", [1, 2, 5, 9])
@pytest.mark.parametrize("seed", range(6))
def test_on_the_simplex_it_is_the_best_of_all_faces(models: int, seed: int) -> None:
    """Every set of models that might have weight, its minimum found with a multiplier."""
    base, tuned, fishers = problem(models, 12, seed=1000 * seed)
    common = random(12, seed=7)
    tuned = [model + 0.02 * common * (n % 3) for n, model in enumerate(tuned)]
    forms = quadratic_forms(tuned, fishers, base) * 1e12
    total = forms.sum(0)
    right = torch.stack([form[:, t] for t, form in enumerate(forms)]).sum(0)
    least = torch.inf
    for size in range(1, models + 1):
        for face in map(list, itertools.combinations(range(models), size)):
            system = torch.ones(size + 1, size + 1, dtype=torch.float64)
            system[:size, :size], system[size, size] = total[face][:, face], 0
            c = torch.linalg.lstsq(
                system, torch.cat([right[face], torch.ones(1, dtype=torch.float64)])
            ).solution[:size]
            if bool((c >= -1e-12).all()):
                weights = torch.zeros(models, dtype=torch.float64)
                weights[face] = c
                least = min(least, float(loss_increases(forms, weights).sum()))
    best = torch.tensor(best_weights(forms, on_simplex=True), dtype=torch.float64)
    assert float(best.min()) >= 0 and float(best.sum()) == pytest.approx(1, abs=1e-9)
    assert float(loss_increases(forms, best).sum()) == pytest.approx(least, rel=1e-7, abs=1e-12)


def test_free_weights_are_where_the_slope_is_zero() -> None:
    base, models, fishers = problem(4, 50)
    forms = quadratic_forms(models, fishers, base)
    forms *= torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None]
    best = torch.tensor(
        best_weights(forms, on_simplex=False), dtype=torch.float64, requires_grad=True
    )
    (slope,) = torch.autograd.grad(loss_increases(forms, best).sum(), best)
    assert slope.abs().max() < 1e-8 * forms.max()
    assert abs(float(best.detach().sum()) - 1) > 1e-3
    nearby = best.detach() + 1e-3 * random(1000, 4, seed=2)
    values = loss_increases(forms, nearby).sum(-1)
    assert bool((values > loss_increases(forms, best.detach()).sum()).all())


@pytest.mark.parametrize("on_simplex", [True, False])
def test_one_task_alone_has_its_own_model(on_simplex: bool) -> None:
    base, models, fishers = problem(3, 50)
    nothing = torch.zeros_like(base)
    forms = quadratic_forms(models, [nothing, nothing, fishers[2]], base)
    best = best_weights(forms, on_simplex=on_simplex)
    assert best == pytest.approx([0, 0, 1], abs=1e-6)


@pytest.mark.parametrize("on_simplex", [True, False])
def test_where_nothing_makes_a_difference_weights_are_equal(on_simplex: bool) -> None:
    base, models, fishers = problem(3, 50)
    same = quadratic_forms([models[0]] * 3, fishers, base)
    assert best_weights(same, on_simplex=on_simplex) == pytest.approx([1 / 3] * 3, abs=1e-4)
    nothing = torch.zeros(3, 3, 3, dtype=torch.float64)
    assert best_weights(nothing, on_simplex=on_simplex) == pytest.approx([1 / 3] * 3)
