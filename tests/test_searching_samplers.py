"""Points as vectors, grids, and screening by predicted losses."""

import itertools
import math
import warnings
from typing import Any

import pytest
import torch

from fishertool.errors import UsageError
from fishertool.recipe.space import Variable, inside
from fishertool.searching.encoding import decode, encode, snapped, width
from fishertool.searching.pareto import hypervolume, reference_of
from fishertool.searching.prediction import gauged, most_gained, predicted_gains
from fishertool.searching.sampling import grid
from fishertool.searching.study import distributions

VARIABLES = [
    Variable("a", -1.0, 3.0),
    Variable("b", 0.01, 100.0, log=True),
    Variable("c", 0.0, 1.0, step=0.25),
    Variable("d", 2, 9, step=3),
    Variable("e", choices=("x", "y", "z")),
]


def test_every_variable_has_its_place_in_the_cube() -> None:
    assert width(VARIABLES) == 7
    point = {"a": 0.0, "b": 1.0, "c": 0.5, "d": 5, "e": "y"}
    row = encode(VARIABLES, point)
    assert row == pytest.approx([0.25, 0.5, 0.5, 3 / 7, 0, 1, 0])
    assert decode(VARIABLES, torch.tensor(row, dtype=torch.float64)) == pytest.approx(point)


@pytest.mark.parametrize("corner", [0.0, 1.0])
def test_the_ends_of_the_cube_are_the_ends_of_the_ranges(corner: float) -> None:
    found = decode(VARIABLES, torch.full((7,), corner, dtype=torch.float64))
    ends: dict[str, Any] = {"a": 3.0, "b": 100.0, "c": 1.0, "d": 8, "e": "x"}
    if not corner:
        ends = {"a": -1.0, "b": 0.01, "c": 0.0, "d": 2, "e": "x"}
    assert found == pytest.approx(ends)
    assert isinstance(found["d"], int)


def test_a_value_at_the_end_of_a_range_is_told_as_a_storage_tells_it() -> None:
    variable = Variable("x", 1, 10, log=True)
    value = decode([variable], torch.ones(1, dtype=torch.float64))["x"]
    [[stored]] = [distributions([variable]).values()]
    assert repr(value) == repr(stored.to_external_repr(stored.to_internal_repr(value))) == "10.0"


def test_no_rounding_leads_out_of_a_range() -> None:
    ends = [n / 20 for n in range(-20, 41)]
    variables = [
        Variable(f"{low} {high}", low, high) for low in ends for high in ends if low < high
    ]
    variables += [
        Variable("tenths", 0, 0.3, step=0.1),
        Variable("fifths", 0.1, 0.7, step=0.2),
        Variable("fifths with a rest", 0.1, 0.8, step=0.2),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        allowed = distributions(variables)
    for part in (0.0, 1.0):
        point = decode(variables, torch.full((len(variables),), part, dtype=torch.float64))
        for variable in variables:
            for value in (point[variable.name], inside(variable)):
                assert variable.low <= value <= variable.high  # type: ignore[operator]
                assert allowed[variable.name]._contains(value)  # type: ignore[arg-type]
    assert [point[variable.name] for variable in variables[-3:]] == [0.3, 0.7, 0.7]


def test_snapped_vectors_are_those_of_points() -> None:
    rows = torch.rand(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    near = snapped(VARIABLES, rows)
    assert torch.equal(snapped(VARIABLES, near), near)
    assert torch.allclose(near[:, :2], rows[:, :2])
    assert (near[:, 2] * 4).frac().abs().max() == 0
    assert torch.equal(near[:, 4:].sum(-1), torch.ones(50, dtype=torch.float64))


def test_a_grid_has_as_many_values_as_the_evaluations_allow() -> None:
    numbers = [Variable("a", 0.0, 1.0), Variable("b", 0.0, 4.0), Variable("e", choices=("x", "y"))]
    points = grid(numbers, 35)
    assert len(points) == 32
    for name, high in (("a", 1), ("b", 4)):
        values = sorted({float(point[name]) for point in points})
        assert values == pytest.approx([0, high / 3, 2 * high / 3, high])
    assert len({tuple(point.values()) for point in points}) == 32
    stepped = [Variable("c", 0.0, 1.0, step=0.5), Variable("d", 1, 2, step=1)]
    assert len(grid(stepped, 1000)) == 6
    with pytest.raises(UsageError, match="are 8 merges; --evaluations allows 7"):
        grid(numbers, 7)
    with pytest.raises(UsageError, match="--evaluations allows 100"):
        grid([Variable(str(n), 0.0, 1.0) for n in range(200)], 100)


def test_gauged_losses_are_distances() -> None:
    assert gauged(torch.tensor([[2.0, 0.5], [-1e-9, 8.0]])).tolist() == [[-2, -1], [0, -4]]


def test_gains_are_of_hypervolume_and_dominated_points_are_ordered() -> None:
    known = torch.tensor([[0.0, 2.0], [2.0, 0.0]], dtype=torch.float64)
    candidates = torch.tensor(
        [[1.0, 1.0], [1.5, 1.5], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64
    )
    gains = predicted_gains(known, candidates)
    both = torch.cat([known, candidates])
    unit = both.amax(0) - both.amin(0)
    reference = reference_of(both / unit)
    for gain, candidate in zip(gains[:2].tolist(), candidates[:2], strict=True):
        grown = hypervolume(torch.cat([known, candidate[None]]) / unit, reference)
        assert gain == pytest.approx(grown - hypervolume(known / unit, reference))
    assert gains.argsort(descending=True).tolist() == [1, 0, 2, 3]
    assert gains[2:].tolist() == pytest.approx([-1 / 3, -1 / 3])  # 1 in ranges of 3


def test_what_is_taken_first_spreads_over_the_front() -> None:
    angles = torch.linspace(0, math.pi / 2, 21, dtype=torch.float64)
    front = torch.stack([angles.cos(), angles.sin()], -1)
    inside = 0.3 * front
    taken = most_gained(torch.cat([inside, front]), 5)
    assert all(index >= 21 for index in taken)
    assert len(set(taken)) == 5
    places = sorted(index - 21 for index in taken)
    assert max(b - a for a, b in itertools.pairwise(places)) <= 9
    assert most_gained(front[:2], 5) in ([0, 1], [1, 0])
