"""Merges by curvature, against dense float64 references: trimmed Fisher, RegMean, Kronecker."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fishertool.merging import fisher as fisher_method
from fishertool.merging.fisher import fisher
from fishertool.merging.kronecker import kronecker
from fishertool.merging.linear import linear
from fishertool.merging.method import Fisher, Kronecker, make_passes
from fishertool.merging.regmean import regmean


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def diagonal(values: Tensor) -> Fisher:
    """One tensor that is the whole model."""
    mean = float(values.double().mean())
    return Fisher(values, mean, mean, float(values.double().square().sum().sqrt()))


def find_limits(
    models: Sequence[Tensor], base: Tensor | None, fishers: Sequence[Fisher], trim: float
) -> list[float] | None:
    """What `whole` finds of a tensor that comes in pieces of two rows."""

    def pieces() -> list[tuple[list[Tensor], Tensor | None, list[Fisher]]]:
        return [
            (
                [model[start : start + 2] for model in models],
                None if base is None else base[start : start + 2],
                [one._replace(values=one.values[start : start + 2]) for one in fishers],
            )
            for start in range(0, len(models[0]), 2)
        ]

    passes = fisher_method.whole([1.0] * len(models), models[0].numel(), trim=trim)
    return make_passes(passes, pieces)


def trimmed_by_sorting(
    models: Sequence[Tensor], base: Tensor, fishers: Sequence[Fisher], kept: int
) -> list[Tensor]:
    """Each model with the base's weights but for its `kept` most salient."""
    found = []
    for model, one in zip(models, fishers, strict=True):
        saliency = (one.values.double() * (model - base).double().square()).flatten()
        best = saliency.argsort(descending=True)[:kept]
        flat = base.clone().flatten()
        flat[best] = model.flatten()[best]
        found.append(flat.reshape(model.shape))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1,), (2,), (63,), (64,), (7, 9)], ids=str)
@pytest.mark.parametrize("trim", [0.0, 0.1, 0.5, 0.9])
def test_fisher_trims_all_but_the_most_salient(
    trim: float, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    # Of a size whose saliencies are below the least float32.
    models = [1e-10 * random(*shape, seed=n, dtype=dtype) for n in range(3)]
    base = 1e-10 * random(*shape, seed=9, dtype=dtype)
    fishers = [diagonal(1e-28 * random(*shape, seed=20 + n, dtype=dtype) ** 4) for n in range(3)]
    limits = find_limits(models, base, fishers, trim)
    weights = (0.2, 0.3, 0.5)
    found = fisher(models, weights, fishers, base, limits, trim=trim, anchor=0.1)
    changed = trimmed_by_sorting(models, base, fishers, round(trim * base.numel()))
    wanted = fisher(changed, weights, fishers, base, anchor=0.1)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-15)
    if trim == 0.0:
        torch.testing.assert_close(found, base, rtol=1e-5, atol=1e-15)


def test_fisher_keeps_all_weights_of_equal_saliency() -> None:
    model, base = torch.ones(6), torch.zeros(6)
    one = diagonal(torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 4.0]))
    limits = find_limits([model], base, [one], 0.5)
    assert limits == [1.0]
    found = fisher([model], [1.0], [one], base, limits, trim=0.5, anchor=0.0)
    assert found.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_fisher_that_keeps_all_makes_no_pass() -> None:
    passes = fisher_method.whole([0.5, 0.5], 10)
    with pytest.raises(StopIteration) as end:
        next(passes)
    assert end.value.value is None


@pytest.mark.parametrize("lambda_", [0.0, 0.4, 1.0, 1.7])
@pytest.mark.parametrize("anchor", [0.0, 0.3])
def test_fisher_lambda_scales_the_average_of_task_vectors(lambda_: float, anchor: float) -> None:
    models, base = [random(7, 9, seed=n) for n in range(2)], random(7, 9, seed=5)
    fishers = [diagonal(random(7, 9, seed=20 + n) ** 4) for n in range(2)]
    found = fisher(models, (0.3, 0.7), fishers, base, lambda_=lambda_, anchor=anchor)
    amounts = [c * one.values / one.mean for c, one in zip((0.3, 0.7), fishers, strict=True)]
    above = sum(amount * (model - base) for amount, model in zip(amounts, models, strict=True))
    torch.testing.assert_close(found, base + lambda_ * above / (sum(amounts) + anchor))


@pytest.mark.parametrize("changed", [{"trim": 0.5}, {"lambda_": 0.5}], ids=str)
def test_fisher_has_no_task_vectors_without_a_base(changed: dict[str, float]) -> None:
    models, fishers = [random(3, seed=n) for n in range(2)], [diagonal(torch.ones(3))] * 2
    with pytest.raises(ValueError, match="needs a base"):
        fisher(models, (0.5, 0.5), fishers, **changed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="trim needs a base"):
        find_limits(models, None, fishers, 0.5)


def test_fisher_trim_is_a_fraction() -> None:
    with pytest.raises(ValueError, match=r"trim: 1\.5 is not a fraction"):
        next(fisher_method.whole([1.0], 3, trim=1.5))


SHAPES = [(1, 1), (2, 1), (1, 2), (63, 64), (64, 63)]
METHODS: dict[str, Callable[..., Tensor]] = {"regmean": regmean, "kronecker": kronecker}


def moment(side: int, seed: int, rank: int | None = None) -> Tensor:
    """E[x x^T] of `rank` tokens whose entries have spread scales."""
    tokens = rank or 4 * side
    spread = torch.logspace(0, -2, side, dtype=torch.float64)
    x = random(tokens, side, seed=seed) * spread
    return x.T @ x / tokens


def factors(out: int, inputs: int, seed: int, size: float = 1.0) -> Kronecker:
    a, b = moment(inputs, seed), size * moment(out, seed + 100)
    diagonal = b.diagonal()[:, None] * a.diagonal()
    return Kronecker(a, b, float(diagonal.mean()), float(diagonal.square().sum().sqrt()))


def merge(
    name: str,
    models: Sequence[Tensor],
    weights: Sequence[float],
    statistics: Sequence[Any],
    **settings: Any,
) -> Tensor:
    """Checks what holds of any method as well."""
    tensors = [*models, *(x for one in statistics for x in one if isinstance(one, Kronecker))]
    tensors = [x for x in [*tensors, *statistics] if isinstance(x, Tensor)]
    before = [tensor.clone() for tensor in tensors]
    merged = METHODS[name](models, weights, statistics, **settings)
    assert all(map(torch.equal, tensors, before))
    assert (merged.shape, merged.dtype) == (models[0].shape, models[0].dtype)
    assert merged.isfinite().all()
    return merged


def statistics_for(name: str, shape: tuple[int, int], models: int) -> list[Any]:
    if name == "regmean":
        return [moment(shape[1], seed=10 * n) for n in range(models)]
    return [factors(*shape, seed=10 * n, size=1e-9 * 10.0**n) for n in range(models)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_equal_models_and_lone_ones_are_themselves(
    name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    models = [random(*shape, seed=n, dtype=dtype) for n in range(3)]
    statistics = statistics_for(name, shape, 3)
    close: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-7}
    merged = merge(name, [models[0].clone() for _ in models], (0.2, 0.3, 0.5), statistics)
    torch.testing.assert_close(merged, models[0], **close)
    for number, model in enumerate(models):
        weights = [0.7 * (n == number) for n in range(3)]
        torch.testing.assert_close(merge(name, models, weights, statistics), model, **close)


@pytest.mark.parametrize("name", METHODS)
def test_only_the_proportion_of_the_weights_matters(name: str) -> None:
    models, statistics = [random(8, 6, seed=n) for n in range(2)], statistics_for(name, (8, 6), 2)
    merged = merge(name, models, (0.3, 0.7), statistics)
    torch.testing.assert_close(merge(name, models, (3, 7), statistics), merged)


@pytest.mark.parametrize("name", METHODS)
def test_without_information_the_average_stays(name: str) -> None:
    models = [random(8, 6, seed=n) for n in range(2)]
    nothing: Any = torch.zeros(6, 6, dtype=torch.float64)
    if name == "kronecker":
        nothing = Kronecker(nothing, torch.zeros(8, 8, dtype=torch.float64), 1.0, 1.0)
    for settings in ({}, {"damping": 0.0}, {"normalization": "mean"}):
        merged = merge(name, models, (0.3, 0.7), [nothing, nothing], **settings)
        torch.testing.assert_close(merged, linear(models, (0.3, 0.7)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("alpha", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("normalization", ["none", "mean"])
def test_regmean_solves_the_normal_equations(
    normalization: str, alpha: float, shape: tuple[int, int]
) -> None:
    models = [random(*shape, seed=n) for n in range(3)]
    moments = [3.0**n * moment(shape[1], seed=10 * n) for n in range(3)]
    weights = (0.2, 1.3, 0.5)
    merged = merge(
        "regmean", models, weights, moments, alpha=alpha, damping=0.0, normalization=normalization
    )
    # As in the paper: W is [in, out].
    left, right = torch.zeros_like(moments[0]), torch.zeros_like(models[0].T)
    for model, a, c in zip(models, moments, weights, strict=True):
        g = torch.where(torch.eye(len(a), dtype=torch.bool), a, alpha * a)
        if normalization == "mean":
            g = g / a.diagonal().mean()
        left, right = left + c * g, right + c * g @ model.T
    wanted = torch.linalg.solve(left, right).T
    torch.testing.assert_close(merged, wanted, rtol=1e-8, atol=1e-9)


def test_regmean_gives_the_outputs_nearest_to_every_models() -> None:
    models = [random(3, 5, seed=n) for n in range(2)]
    inputs = [random(20, 5, seed=10 + n) for n in range(2)]
    moments = [x.T @ x / len(x) for x in inputs]
    merged = merge("regmean", models, (0.5, 0.5), moments, alpha=1.0, damping=0.0)
    stacked = torch.cat(inputs)
    targets = torch.cat([x @ model.T for x, model in zip(inputs, models, strict=True)])
    wanted = torch.linalg.lstsq(stacked, targets).solution.T
    torch.testing.assert_close(merged, wanted)


@pytest.mark.parametrize("damping", [0.0, 1e-6])
def test_regmean_leaves_unseen_directions_to_the_average(damping: float) -> None:
    """Moments of three tokens each in twelve dimensions, and an input that is always zero."""
    models = [random(4, 12, seed=n) for n in range(2)]
    inputs = [random(3, 12, seed=10 + n) for n in range(2)]
    for x in inputs:
        x[:, 5] = 0.0
    moments = [x.T @ x / 3 for x in inputs]
    merged = merge("regmean", models, (0.5, 0.5), moments, alpha=1.0, damping=damping)
    close: dict[str, Any] = {"rtol": 0, "atol": 1e-4 if damping else 1e-8}
    for x, model in zip(inputs, models, strict=True):  # fewer tokens than inputs: all is matched
        torch.testing.assert_close(x @ merged.T, x @ model.T, **close)
    average = linear(models, (0.5, 0.5))
    unseen = torch.linalg.svd(torch.cat(inputs)).Vh[6:]
    torch.testing.assert_close(merged @ unseen.T, average @ unseen.T, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(merged[:, 5], average[:, 5], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 2), (9, 7)], ids=str)
@pytest.mark.parametrize("normalization", ["mean", "l2", "none"])
@pytest.mark.parametrize("damping", [1e-2, 1e-6])
def test_kronecker_solves_its_equations(
    damping: float, normalization: str, shape: tuple[int, int]
) -> None:
    models = [random(*shape, seed=n) for n in range(3)]
    statistics = statistics_for("kronecker", shape, 3)
    weights = (0.2, 1.3, 0.5)
    merged = merge(
        "kronecker", models, weights, statistics,
        normalization=normalization, damping=damping, iterations=500, tolerance=1e-12,
    )  # fmt: skip
    scales = {
        "mean": [one.mean for one in statistics],
        "l2": [one.l2 for one in statistics],
        "none": [1.0] * 3,
    }[normalization]
    curvatures = [
        c / scale * torch.kron(one.gradient, one.activation)
        for c, scale, one in zip(weights, scales, statistics, strict=True)
    ]
    total = torch.stack(curvatures).sum(0)
    pull = damping * total.diagonal().mean() * torch.eye(len(total), dtype=torch.float64)
    average = linear(models, weights).flatten()
    right = sum(
        (f @ model.flatten() for f, model in zip(curvatures, models, strict=True)), pull @ average
    )
    wanted = torch.linalg.solve(total + pull, right).reshape(shape)
    torch.testing.assert_close(merged, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kronecker_is_all_but_solved_in_the_default_iterations(dtype: torch.dtype) -> None:
    """What is left of the objective's fall after the default iterations, and at the end."""
    out, inputs = 48, 40
    models = [random(out, inputs, seed=n, dtype=dtype) for n in range(3)]
    statistics = statistics_for("kronecker", (out, inputs), 3)

    def objective(merged: Tensor) -> float:
        terms = 0.0
        for model, one in zip(models, statistics, strict=True):
            apart = merged.double() - model.double()
            terms += float((apart * (one.gradient @ apart @ one.activation)).sum()) / one.mean
        return terms

    start = objective(linear(models, (1.0, 1.0, 1.0)))
    best = objective(
        kronecker([m.double() for m in models], (1.0, 1.0, 1.0), statistics, damping=0.0,
                  iterations=2000, tolerance=1e-12)
    )  # fmt: skip
    found = objective(merge("kronecker", models, (1.0, 1.0, 1.0), statistics, damping=1e-3))
    assert (found - best) / (start - best) < 5e-2
    far = merge("kronecker", models, (1.0, 1.0, 1.0), statistics, damping=0.0, iterations=300,
                tolerance=1e-7)  # fmt: skip
    assert (objective(far) - best) / (start - best) < 1e-6


def test_kronecker_without_iterations_is_the_average() -> None:
    models, statistics = (
        [random(8, 6, seed=n) for n in range(2)],
        statistics_for("kronecker", (8, 6), 2),
    )
    merged = merge("kronecker", models, (0.3, 0.7), statistics, iterations=0)
    torch.testing.assert_close(merged, linear(models, (0.3, 0.7)))
    merged = merge("kronecker", models, (0.3, 0.7), statistics, tolerance=1.0)
    torch.testing.assert_close(merged, linear(models, (0.3, 0.7)))


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 2e-3), (torch.float64, 1e-8)])
def test_kronecker_leaves_directions_without_curvature_to_the_average(
    dtype: torch.dtype, off: float
) -> None:
    models = [random(6, 8, seed=n, dtype=dtype) for n in range(2)]
    statistics = [
        Kronecker(moment(8, seed=n, rank=2), moment(6, seed=50 + n, rank=2), 1.0, 1.0)
        for n in range(2)
    ]
    moved = merge("kronecker", models, (0.5, 0.5), statistics) - linear(models, (0.5, 0.5))
    unseen = torch.linalg.svd(torch.cat([one.activation for one in statistics])).Vh[4:].to(dtype)
    assert (moved @ unseen.T).abs().max() < off
    assert moved.abs().max() > 0.1


def test_kronecker_is_fisher_where_the_factors_are_diagonal() -> None:
    models = [random(5, 4, seed=n) for n in range(2)]
    sides = [(random(5, seed=20 + n) ** 2, random(4, seed=30 + n) ** 2) for n in range(2)]
    fishers = [diagonal(b[:, None] * a) for b, a in sides]
    statistics = [
        Kronecker(a.diag(), b.diag(), one.mean, one.l2)
        for (b, a), one in zip(sides, fishers, strict=True)
    ]
    merged = merge("kronecker", models, (0.4, 0.6), statistics, damping=0.0, iterations=200,
                   tolerance=1e-13)  # fmt: skip
    wanted = fisher(models, (0.4, 0.6), fishers, floor=0.0)
    torch.testing.assert_close(merged, wanted, rtol=1e-6, atol=1e-7)


def test_a_factor_that_is_not_finite_is_refused() -> None:
    models, statistics = [random(2, 2, seed=n) for n in range(2)], [factors(2, 2, seed=1)] * 2
    statistics[0] = statistics[0]._replace(activation=torch.tensor([[1.0, float("nan")]] * 2))
    with pytest.raises(ValueError, match="not finite"):
        kronecker(models, (0.5, 0.5), statistics)
