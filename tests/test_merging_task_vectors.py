"""Task-vector methods against loops over numbers, and what is particular to each."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from merge_driver import generators_for, merge, random
from torch import Tensor

from fishertool.registry import find_method

FLOAT64 = torch.float64
WEIGHTS = [(0.5, 0.3, 0.4), (1.0, -0.6, 0.8), (0.0, 1.0, 2.0)]
Lists = list[list[float]]


def three(*shape: int) -> tuple[list[Tensor], Tensor]:
    """Three models and their base; some entries are the base's, in all models or in one."""
    base = random(*shape, seed=9, dtype=FLOAT64)
    models = [base + random(*shape, seed=n, dtype=FLOAT64) for n in range(3)]
    for number, model in enumerate(models):
        model.view(-1)[: 2 + number] = base.view(-1)[: 2 + number]
    return models, base


def task_vectors(models: Sequence[Tensor], base: Tensor) -> Lists:
    return [[float(v) for v in (model - base).flatten()] for model in models]


def added(
    vectors: Lists, weights: Sequence[float], base: Tensor, normalize: bool, lambda_: float
) -> Tensor:
    total = sum(weights) if normalize else 1.0
    sums = [
        sum(c * v for c, v in zip(weights, entry, strict=True)) / total
        for entry in zip(*vectors, strict=True)
    ]
    return base + lambda_ * torch.tensor(sums, dtype=FLOAT64).reshape(base.shape)


def elected(
    vectors: Lists, weights: Sequence[float], base: Tensor, normalize: bool, lambda_: float
) -> Tensor:
    sums = []
    for entry in zip(*vectors, strict=True):
        votes = [c * v for c, v in zip(weights, entry, strict=True)]
        sign = 1.0 if sum(votes) >= 0 else -1.0
        agreeing = [(v, abs(c)) for v, c in zip(votes, weights, strict=True) if v * sign > 0]
        total = sum(size for _, size in agreeing) if normalize else 1.0
        sums.append(sum(v for v, _ in agreeing) / total if agreeing else 0.0)
    return base + lambda_ * torch.tensor(sums, dtype=FLOAT64).reshape(base.shape)


def kept_between(vectors: Lists, counts: Sequence[tuple[int, int]], rescale: bool) -> Lists:
    """Of each vector `count` entries below its `top` largest, and those that tie with the ends."""
    result = []
    for vector, (top, count) in zip(vectors, counts, strict=True):
        ordered = sorted((abs(v) for v in vector), reverse=True)
        most = ordered[top] if top and count else float("inf")
        least = ordered[top + count - 1] if count else float("inf")
        kept = [v if least <= abs(v) <= most else 0.0 for v in vector]
        after = sum(abs(v) for v in kept)
        scale = sum(abs(v) for v in vector) / after if rescale and after else 1.0
        result.append([v * scale for v in kept])
    return result


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("lambda_", [1.0, 0.4])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_task_arithmetic_is_its_formula(
    weights: Sequence[float], lambda_: float, normalize: bool
) -> None:
    models, base = three(4, 6)
    settings: dict[str, Any] = {"normalize": normalize, "lambda": lambda_}
    merged = merge("task-arithmetic", models, weights, base, **settings)
    exact = added(task_vectors(models, base), weights, base, normalize, lambda_)
    torch.testing.assert_close(merged, exact, rtol=1e-12, atol=1e-12)


def test_weights_that_sum_to_zero_are_not_normalized() -> None:
    models, base = three(4, 6)
    merged = merge("task-arithmetic", models, (1.0, 1.0, -2.0), base, normalize=True)
    exact = added(task_vectors(models, base), (1.0, 1.0, -2.0), base, False, 1.0)
    torch.testing.assert_close(merged, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("density", [[1.0] * 3, [0.5] * 3, [0.3, 1.0, 0.0], [0.01, 0.7, 0.4]])
@pytest.mark.parametrize(("normalize", "rescale"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_ties_is_trim_elect_merge(
    weights: Sequence[float], normalize: bool, rescale: bool, density: list[float]
) -> None:
    models, base = three(4, 6)
    settings: dict[str, Any] = {"normalize": normalize, "rescale": rescale, "density": density}
    counts = [(0, max(1, int(one * 24)) if one else 0) for one in density]
    vectors = kept_between(task_vectors(models, base), counts, rescale)
    exact = elected(vectors, weights, base, normalize, 0.4)
    for rows in (None, 3):
        merged = merge("ties", models, weights, base, rows, **settings | {"lambda": 0.4})
        torch.testing.assert_close(merged, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("density", [[0.5] * 3, [0.3, 1.0, 0.0], [0.95, 0.7, 0.4]])
@pytest.mark.parametrize("gamma", [[0.01] * 3, [0.2, 0.1, 0.5]])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_breadcrumbs_drop_both_ends(
    weights: Sequence[float], normalize: bool, gamma: list[float], density: list[float]
) -> None:
    models, base = three(4, 6)
    counts = []
    for share, outliers in zip(density, gamma, strict=True):
        count = int(share * 24)
        counts.append((min(int(outliers * 24), 24 - count), count))
    for rescale, rows in itertools.product((False, True), (None, 3)):
        settings: dict[str, Any] = {"density": density, "gamma": gamma, "rescale": rescale}
        settings |= {"normalize": normalize, "lambda": 0.7}
        vectors = kept_between(task_vectors(models, base), counts, rescale)
        plain = merge("breadcrumbs", models, weights, base, rows, **settings)
        exact = added(vectors, weights, base, normalize, 0.7)
        torch.testing.assert_close(plain, exact, rtol=1e-12, atol=1e-12)
        voted = merge("breadcrumbs-ties", models, weights, base, rows, **settings)
        exact = elected(vectors, weights, base, normalize, 0.7)
        torch.testing.assert_close(voted, exact, rtol=1e-12, atol=1e-12)


def test_entries_that_tie_with_the_last_one_kept_are_kept() -> None:
    base, model = torch.zeros(5), torch.tensor([1.0, -2.0, 2.0, 2.0, 3.0])
    assert merge("ties", [model], [1.0], base, density=0.4).tolist() == [0, -2, 2, 2, 3]
    merged = merge("breadcrumbs", [model], [1.0], base, density=0.2, gamma=0.2)
    assert merged.tolist() == [0, -2, 2, 2, 0]


def test_a_tie_of_votes_elects_the_positive_sign() -> None:
    models, base = [torch.tensor([1.0, -3.0]), torch.tensor([-1.0, 3.0])], torch.zeros(2)
    assert merge("ties", models, [0.5, 0.5], base).tolist() == [1, 3]


def draws(models: Sequence[Tensor], seed: int) -> list[Tensor]:
    generators = generators_for(models, seed)
    return [
        torch.empty_like(model).uniform_(generator=generator)
        for model, generator in zip(models, generators, strict=True)
    ]


@pytest.mark.parametrize("density", [[0.5] * 3, [0.3, 1.0, 0.0]])
@pytest.mark.parametrize(("normalize", "rescale"), [(False, True), (True, False)])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_dare_keeps_what_the_draws_say(
    weights: Sequence[float], normalize: bool, rescale: bool, density: list[float]
) -> None:
    models, base = three(8, 9)
    vectors = [
        [
            v / (p if rescale and p else 1) if u < p else 0.0
            for v, u in zip(vector, one, strict=True)
        ]
        for vector, one, p in zip(
            task_vectors(models, base),
            [one.flatten().tolist() for one in draws(models, 5)],
            density,
            strict=True,
        )
    ]
    settings: dict[str, Any] = {"density": density, "normalize": normalize, "rescale": rescale}
    for name, formula in (("dare-linear", added), ("dare-ties", elected)):
        merged = merge(name, models, weights, base, seed=5, **settings | {"lambda": 0.7})
        exact = formula(vectors, weights, base, normalize, 0.7)
        torch.testing.assert_close(merged, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("epsilon", [0.15, 0.29])
@pytest.mark.parametrize("density", [[0.5] * 3, [0.3, 1.0, 0.0]])
@pytest.mark.parametrize(("normalize", "rescale"), [(True, True), (False, False)])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_della_keeps_larger_entries_more_likely(
    weights: Sequence[float], normalize: bool, rescale: bool, density: list[float], epsilon: float
) -> None:
    """The n-th draw of a row is for its n-th smallest entry."""
    models, base = three(8, 9)
    vectors = []
    for model, one, p in zip(models, draws(models, 5), density, strict=True):
        vector = (model - base).tolist()
        for row, chances in zip(vector, one.tolist(), strict=True):
            order = sorted(range(9), key=lambda j: (abs(row[j]), j))
            for rank, (j, u) in enumerate(zip(order, chances, strict=True)):
                own = p if p in (0.0, 1.0) else p - epsilon + 2 * epsilon * rank / 8
                row[j] = row[j] / (own if rescale and own else 1) if u < own else 0.0
        vectors.append([v for row in vector for v in row])
    settings: dict[str, Any] = {"density": density, "normalize": normalize, "rescale": rescale}
    settings |= {"epsilon": epsilon, "lambda": 0.7}
    for name, formula in (("della-linear", added), ("della", elected)):
        merged = merge(name, models, weights, base, seed=5, **settings)
        exact = formula(vectors, weights, base, normalize, 0.7)
        torch.testing.assert_close(merged, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["dare-linear", "della-linear"])
@pytest.mark.parametrize("rows", [None, 7])
def test_random_methods_keep_the_mean_and_the_density(name: str, rows: int | None) -> None:
    model, base = random(30, 50, seed=1), torch.zeros(30, 50)
    runs = [merge(name, [model], [1.0], base, rows, seed=100 * n, density=0.4) for n in range(100)]
    kept = torch.stack([run != 0 for run in runs]).double()
    assert float(kept.mean()) == pytest.approx(0.4, abs=0.005)
    # The standard error of an entry's mean is at most |theta| (1 / (0.25 * 100)) ^ 0.5.
    error = (torch.stack(runs).mean(0) - model) / model.abs()
    assert float(error.abs().max()) < 5 * (1 / 25) ** 0.5
    assert float(error.mean()) == pytest.approx(0, abs=0.02)
    if name == "della-linear":
        ranks = model.abs().argsort(1).argsort(1)
        for rank, wanted in ((0, 0.25), (49, 0.55)):
            assert float(kept.mean(0)[ranks == rank].mean()) == pytest.approx(wanted, abs=0.03)


@pytest.mark.parametrize("name", ["della", "della-linear"])
@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.1), (0.9, 0.1), (0.5, 0.5)])
def test_della_needs_probabilities(name: str, density: float, epsilon: float) -> None:
    base = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=f"density {density}.*epsilon {epsilon} is not between"):
        merge(name, [base, base], [0.5, 0.5], base, density=density, epsilon=epsilon)


@pytest.mark.parametrize("select_topk", [1.0, 0.6, 0.2, 0.0])
@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_sce_is_select_calculate_erase(select_topk: float, scale: float) -> None:
    models, base = three(4, 6)
    models = [base + scale * (model - base) for model in models]
    vectors = task_vectors(models, base)
    spread = []
    for entry in zip(*vectors, strict=True):
        mean = sum(entry) / 3
        spread.append(sum((v - mean) ** 2 for v in entry) / 3)
    count = int(sum(s > 1e-30 for s in spread) * select_topk)
    least = sorted(spread, reverse=True)[count - 1] if count else float("inf")
    selected = [
        [v if s >= least * (1 - 1e-9) or select_topk == 1 else 0.0
         for v, s in zip(vector, spread, strict=True)]
        for vector in vectors
    ]  # fmt: skip
    sizes = [sum(v * v for v in vector) for vector in selected]
    change = []
    for entry in zip(*selected, strict=True):
        sign = 1.0 if sum(entry) >= 0 else -1.0
        agreeing = [(v, size) for v, size in zip(entry, sizes, strict=True) if v * sign > 0]
        total = sum(size for _, size in agreeing)
        change.append(sum(v * size for v, size in agreeing) / total if agreeing else 0.0)
    exact = base + torch.tensor(change, dtype=FLOAT64).reshape(base.shape)
    for rows in (None, 3):
        merged = merge("sce", models, [1.0] * 3, base, rows, select_topk=select_topk)
        torch.testing.assert_close(merged - base, exact - base, rtol=1e-7, atol=1e-9 * scale)


def test_defaults_are_mergekits() -> None:
    common: dict[str, Any] = {"normalize": False, "rescale": False, "density": 1.0, "lambda_": 1.0}
    own: dict[str, dict[str, Any]] = {
        "task-arithmetic": {},
        "ties": {"normalize": True},
        "dare-linear": {"rescale": True},
        "dare-ties": {"rescale": True},
        "breadcrumbs": {"gamma": 0.01},
        "breadcrumbs-ties": {"gamma": 0.01},
        "della": {"normalize": True, "rescale": True, "epsilon": 0.15},
        "della-linear": {"rescale": True, "epsilon": 0.15},
    }
    for name, changed in own.items():
        settings = find_method("fishertool.merging", name).settings
        wanted = {**common, **changed}
        assert settings == {key: wanted[key] for key in settings}
        assert set(changed) <= set(settings)
