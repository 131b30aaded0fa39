"""Methods that interpolate directions, against their formulas on long vectors of numbers."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from merge_driver import merge, random
from torch import Tensor

FLOAT64 = torch.float64
ANGLES = {"wide": 1.0, "near": 0.05, "fine-tunes": 1e-5}
WEIGHTS = [(0.5, 0.5, 0.5), (0.2, 0.3, 0.5), (2.0, 1.0, 0.5)]


def near(spread: float, *shape: int, models: int = 2) -> tuple[list[Tensor], Tensor]:
    base = random(*shape, seed=9, dtype=FLOAT64)
    return [base + spread * random(*shape, seed=n, dtype=FLOAT64) for n in range(models)], base


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def norm(a: Sequence[float]) -> float:
    return math.sqrt(dot(a, a))


def arc(a: list[float], b: list[float], t: float, straight: float) -> list[float]:
    cosine = max(-1.0, min(1.0, dot(a, b) / (norm(a) * norm(b))))
    phi = math.acos(cosine)
    if abs(cosine) > straight:
        return [(1 - t) * x + t * y for x, y in zip(a, b, strict=True)]
    first, second = (math.sin(s * phi) / math.sin(phi) for s in (1 - t, t))
    return [first * x + second * y for x, y in zip(a, b, strict=True)]


def numbers(tensor: Tensor) -> list[float]:
    flat: list[float] = tensor.flatten().tolist()
    return flat


def close(found: Tensor, exact: Sequence[float] | Tensor, bound: float = 1e-11) -> None:
    wanted = torch.as_tensor(exact, dtype=FLOAT64).reshape(found.shape)
    torch.testing.assert_close(found.double(), wanted, rtol=bound, atol=bound)


@pytest.mark.parametrize("spread", ANGLES.values(), ids=list(ANGLES))
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 1.5])
@pytest.mark.parametrize("rows", [None, 3])
def test_slerp_is_the_arc(t: float, spread: float, rows: int | None) -> None:
    models, _ = near(spread, 7, 5)
    merged = merge("slerp", models, [1.0, 1.0], rows=rows, t=t)
    close(merged, arc(numbers(models[0]), numbers(models[1]), t, 0.9995))
    from_weights = merge("slerp", models, [1 - t, t], rows=rows)
    close(from_weights, merged)


def test_slerp_keeps_the_length_where_linear_does_not() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    half = math.sqrt(0.5)
    close(merge("slerp", [a, b], [1.0, 1.0]), [half, half], 1e-6)


@pytest.mark.parametrize("name", ["slerp", "nuslerp"])
def test_what_has_no_angle_is_interpolated_linearly(name: str) -> None:
    model = random(3, 4, seed=1)
    for other in (torch.zeros(3, 4), -model, 2 * model):
        close(merge(name, [model, other], [0.75, 0.25]), 0.75 * model + 0.25 * other, 1e-6)


@pytest.mark.parametrize("spread", ANGLES.values(), ids=list(ANGLES))
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("weights", [(0.3, 0.7), (2.0, 1.0), (1.0, -1.0)])
def test_nuslerp_is_the_arc_of_a_tensor_its_rows_or_its_columns(
    weights: Sequence[float], rows: int | None, anchored: bool, spread: float
) -> None:
    models, base = near(spread, 7, 5)
    origin = base if anchored else torch.zeros_like(base)
    first, second = (model - origin for model in models)
    t = weights[1] / sum(weights) if sum(weights) else 0.5

    def exact(a: Tensor, b: Tensor) -> Tensor:
        return torch.tensor(arc(numbers(a), numbers(b), t, 1.0), dtype=FLOAT64)

    def columns(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([exact(*pair) for pair in zip(a.T, b.T, strict=True)]).T

    def each_row(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([exact(*pair) for pair in zip(a, b, strict=True)])

    formulas: list[tuple[dict[str, bool], Callable[[Tensor, Tensor], Tensor]]] = [
        ({}, lambda a, b: exact(a, b).reshape(7, 5)),
        ({"nuslerp_flatten": True, "nuslerp_row_wise": True}, lambda a, b: exact(a, b).view(7, 5)),
        ({"nuslerp_flatten": False}, each_row),
        ({"nuslerp_flatten": False, "nuslerp_row_wise": True}, columns),
    ]
    for settings, formula in formulas:
        merged = merge("nuslerp", models, weights, base if anchored else None, rows, **settings)
        close(merged, origin + formula(first, second), 1e-10)


def multislerp_by_tangents(vectors: list[list[float]], weights: Sequence[float]) -> list[float]:
    """Project to the tangent at the mean direction, average there, project back."""
    units = [[x / norm(v) for x in v] for v in vectors]
    mean = [dot(weights, entry) for entry in zip(*units, strict=True)]
    mean = [x / norm(mean) for x in mean]
    tangents = [[x - dot(u, mean) * m for x, m in zip(u, mean, strict=True)] for u in units]
    step = [dot(weights, entry) for entry in zip(*tangents, strict=True)]
    length = norm(step)
    assert length < 1e-12  # as the docstring says
    size = dot(weights, [norm(v) for v in vectors])
    return [size * (math.cos(length) * m + s) for m, s in zip(mean, step, strict=True)]


@pytest.mark.parametrize("spread", ANGLES.values(), ids=list(ANGLES))
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_multislerp_is_the_mean_direction(
    weights: Sequence[float], normalize: bool, anchored: bool, spread: float
) -> None:
    models, base = near(spread, 7, 5, models=3)
    origin = base if anchored else torch.zeros_like(base)
    shares = [weight / sum(weights) if normalize else weight for weight in weights]
    exact = multislerp_by_tangents([numbers(model - origin) for model in models], shares)
    for rows in (None, 3):
        merged = merge(
            "multislerp", models, weights, base if anchored else None, rows,
            normalize_weights=normalize,
        )  # fmt: skip
        close(merged, origin + torch.tensor(exact, dtype=FLOAT64).view(7, 5))


def test_directions_that_cancel_are_added() -> None:
    model = random(3, 4, seed=1)
    third = torch.zeros(3, 4)
    merged = merge("multislerp", [model, -3 * model, third], [1.0, 1.0, 1.0])
    close(merged, -2 / 3 * model, 1e-6)
    # The direction's length is 0.2: below eps the sum, above it the direction at the mean length.
    for eps, exact in ((0.3, -0.6), (0.1, 1.8)):
        merged = merge("multislerp", [model, -3 * model], [0.6, 0.4], eps=eps)
        close(merged, exact * model, 1e-6)


def karcher_by_steps(
    vectors: list[list[float]], weights: Sequence[float], steps: int
) -> tuple[list[float], float]:
    """The mean length times the point reached, and how long the last step was."""
    shares = [weight / sum(weights) for weight in weights]
    units = [[x / norm(v) for x in v] for v in vectors]
    mean = [dot(shares, entry) for entry in zip(*units, strict=True)]
    mean = [x / norm(mean) for x in mean]
    length = math.inf
    for _ in range(steps):
        seen = []
        for u in units:
            cosine = max(-1.0, min(1.0, dot(u, mean)))
            phi = math.acos(cosine)
            stretch = phi / math.sin(phi) if phi else 1.0
            seen.append([stretch * (x - cosine * m) for x, m in zip(u, mean, strict=True)])
        step = [dot(shares, entry) for entry in zip(*seen, strict=True)]
        length = norm(step)
        if length < 1e-14:
            break
        moved = [
            math.cos(length) * m + math.sin(length) / length * s
            for m, s in zip(mean, step, strict=True)
        ]
        mean = [x / norm(moved) for x in moved]
    size = dot(shares, [norm(v) for v in vectors])
    return [size * m for m in mean], length


@pytest.mark.parametrize("spread", ANGLES.values(), ids=list(ANGLES))
@pytest.mark.parametrize("weights", WEIGHTS)
def test_karcher_is_the_nearest_direction(weights: Sequence[float], spread: float) -> None:
    models, _ = near(spread, 7, 5, models=3)
    vectors = [numbers(model) for model in models]
    for steps in (0, 1, 2):
        exact, _ = karcher_by_steps(vectors, weights, steps)
        for rows in (None, 3):
            merged = merge("karcher", models, weights, rows=rows, max_iter=steps, tol=1e-14)
            close(merged, exact)
    exact, length = karcher_by_steps(vectors, weights, 100)
    assert length < 1e-12
    close(merge("karcher", models, weights), exact, 1e-4)
    close(merge("karcher", models, weights, max_iter=100, tol=1e-13), exact)


def test_karcher_leaves_out_what_has_no_direction() -> None:
    model = random(3, 4, seed=1)
    close(merge("karcher", [model, torch.zeros(3, 4)], [0.5, 0.5]), 0.5 * model, 1e-6)
    assert merge("karcher", [torch.zeros(3)] * 2, [0.5, 0.5]).tolist() == [0, 0, 0]
    opposite = merge("karcher", [model, -model], [0.5, 0.5])
    assert float(opposite.norm()) == pytest.approx(float(model.norm()), rel=1e-6)


def stock(models: Sequence[Tensor], base: Tensor) -> Tensor:
    """One filter by the paper's formula."""
    vectors = [numbers(model - base) for model in models]
    k = len(vectors)
    cosines = [
        dot(a, b) / (norm(a) * norm(b)) if norm(a) and norm(b) else 0.0
        for number, a in enumerate(vectors)
        for b in vectors[number + 1 :]
    ]
    cosine = sum(cosines) / len(cosines)
    t = k * cosine / (1 + (k - 1) * cosine)
    return base + t * (sum(models[1:], models[0]) / k - base)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("scale", [1.0, 1e-7])
@pytest.mark.parametrize("rows", [None, 3])
def test_model_stock_is_its_formula(count: int, scale: float, rows: int | None) -> None:
    models, base = near(1.0, 7, 5, models=count)
    common = random(7, 5, seed=20, dtype=FLOAT64)
    models = [base + scale * (model - base + common) for model in models]
    models[0][2] = base[2]  # has no direction in one row
    merged = merge("model-stock", models, [1.0] * count, base, rows)
    close((merged - base) / scale, (stock(models, base) - base) / scale, 1e-7)
    merged = merge("model-stock", models, [1.0] * count, base, rows, filter_wise=True)
    each = [stock([model[row] for model in models], base[row]) for row in range(7)]
    close((merged - base) / scale, (torch.stack(each) - base) / scale, 1e-7)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_keeps_the_base_where_updates_are_opposed(filter_wise: bool) -> None:
    base, change = random(1, 6, seed=1), random(1, 6, seed=2)
    models = [base + change, base - change]
    merged = merge("model-stock", models, [0.5, 0.5], base, filter_wise=filter_wise)
    close(merged, base, 1e-6)
