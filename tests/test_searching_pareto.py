"""Fronts, hypervolumes and choices against the definitions, by enumeration and by counting."""

import time
from itertools import combinations

import pytest
import torch
from torch import Tensor

from fishertool.errors import UsageError
from fishertool.searching.pareto import (
    chosen,
    contributions,
    fronts,
    hypervolume,
    hypervolumes,
    knee,
    non_dominated,
    reference_of,
    strongest,
)


def draws(count: int, objectives: int, seed: int = 0, levels: int = 5) -> Tensor:
    """Whole numbers, so that there are ties and equal points."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(levels, (count, objectives), generator=generator).double()


def dominates(a: list[float], b: list[float]) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True)) and a != b


def volume_by_inclusion_and_exclusion(values: Tensor, reference: Tensor) -> float:
    """Of the boxes from the reference to each point, from the volumes of all intersections."""
    total = 0.0
    for size in range(1, len(values) + 1):
        for subset in combinations(range(len(values)), size):
            sides = (values[list(subset)].amin(0) - reference).clamp(min=0)
            total += (-1) ** (size + 1) * float(sides.prod())
    return total


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_non_dominated_is_its_definition(objectives: int, seed: int) -> None:
    values = draws(30, objectives, seed)
    rows = values.tolist()
    expected = [not any(dominates(other, row) for other in rows) for row in rows]
    assert non_dominated(values).tolist() == expected


def test_equal_points_are_all_on_the_front() -> None:
    assert non_dominated(torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 2.0]])).tolist() == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("objectives", [2, 3])
def test_fronts_peel_off_one_after_another(objectives: int) -> None:
    values = draws(25, objectives)
    ranks = fronts(values)
    for rank in range(int(ranks.max()) + 1):
        left = values[ranks >= rank]
        assert torch.equal(non_dominated(left), ranks[ranks >= rank] == rank)
        assert bool((ranks == rank).any())


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_hypervolume_is_the_volume_of_the_union_of_boxes(objectives: int, seed: int) -> None:
    values = draws(9, objectives, seed)
    reference = torch.ones(objectives, dtype=torch.float64)  # not below all of them
    expected = volume_by_inclusion_and_exclusion(values, reference)
    assert hypervolume(values, reference) == pytest.approx(expected, abs=1e-9)


def test_hypervolume_does_not_depend_on_the_order_and_scales_with_the_units() -> None:
    values, reference = draws(12, 3, levels=50), torch.zeros(3)
    volume = hypervolume(values, reference)
    assert hypervolume(values.flip(0), reference) == pytest.approx(volume)
    assert hypervolume(values.flip(1), reference) == pytest.approx(volume)
    scale = torch.tensor([2.0, 3.0, 0.5])
    assert hypervolume(values * scale + 7, reference + 7) == pytest.approx(3 * volume)


def test_hypervolume_of_nothing_above_the_reference_is_zero() -> None:
    assert hypervolume(torch.zeros(0, 2), torch.zeros(2)) == 0
    assert hypervolume(torch.tensor([[3.0, 0.0], [0.0, 3.0]]), torch.zeros(2)) == 0


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_hypervolumes_are_those_of_the_points_so_far(objectives: int) -> None:
    values, reference = draws(9, objectives), torch.ones(objectives, dtype=torch.float64)
    expected = [hypervolume(values[: count + 1], reference) for count in range(9)]
    found = hypervolumes(values, reference)
    assert found == pytest.approx(expected, abs=1e-9)
    assert found == sorted(found)


def test_a_front_of_sixty_points_in_five_objectives_takes_seconds() -> None:
    generator = torch.Generator().manual_seed(0)
    sphere = torch.randn(60, 5, dtype=torch.float64, generator=generator).abs()
    sphere /= sphere.norm(dim=1, keepdim=True)
    begun = time.process_time()
    assert len(strongest(sphere, 12)) == 12
    assert time.process_time() - begun < 20  # by slabs of slabs two minutes


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_contributions_are_what_goes_with_each_point(objectives: int) -> None:
    values, reference = draws(8, objectives), torch.ones(objectives, dtype=torch.float64)
    whole = volume_by_inclusion_and_exclusion(values, reference)
    for i, share in enumerate(contributions(values, reference).tolist()):
        rest = values[[j for j in range(8) if j != i]]
        expected = whole - volume_by_inclusion_and_exclusion(rest, reference)
        assert share == pytest.approx(expected, abs=1e-9)


def test_reference_lies_a_tenth_of_the_range_beyond_the_nadir_of_the_front() -> None:
    values = torch.tensor([[0.0, 10.0], [4.0, 5.0], [1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(reference_of(values), torch.tensor([-0.4, 4.5]).double())


def test_reference_of_a_front_of_one_value_uses_the_range_of_all() -> None:
    values = torch.tensor([[4.0, 2.0], [1.0, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(reference_of(values), torch.tensor([3.7, 1.9]).double())


CURVE = torch.tensor([[0.0, 10.0], [0.8, 9.0], [0.9, 2.0], [1.0, 0.0], [0.5, 0.5]])


def test_knee_is_farthest_above_the_line_through_the_ends() -> None:
    assert knee(CURVE) == 1
    start, end = CURVE[0] / torch.tensor([1.0, 10.0]), CURVE[3]
    normal = torch.tensor([1.0, 1.0]) / 2**0.5
    heights = [float((row / torch.tensor([1.0, 10.0]) - start) @ normal) for row in CURVE[:4]]
    assert heights.index(max(heights)) == 1 and float((end - start) @ normal) == pytest.approx(0)


def test_knee_ignores_units_and_points_off_the_front() -> None:
    scaled = CURVE * torch.tensor([1e3, 1e-4]) - 5
    assert knee(scaled) == 1
    assert knee(torch.tensor([[1.0, 1.0], [0.9, 0.9]])) == 0


def test_weights_choose_from_the_front() -> None:
    assert chosen(CURVE, [1, 0]) == 3
    assert chosen(CURVE, [0, 1]) == 0
    assert chosen(CURVE, [1, 1]) == 1


def test_weights_reach_a_hollow_where_no_weighted_sum_does() -> None:
    hollow = torch.tensor([[0.0, 1.0], [0.4, 0.4], [1.0, 0.0]])
    assert chosen(hollow, [1, 1]) == 1


def test_weights_prefer_the_better_of_points_with_one_worst_objective() -> None:
    values = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.1], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    assert chosen(values, [1, 1, 0]) in (0, 1)
    assert chosen(values, [1, 1, 0.1]) == 1


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ([1.0], "1 weights for 2 objectives; give one for each"),
        ([1.0, -1.0], "at least 0 and not all 0, not [1.0, -1.0]"),
        ([0.0, 0.0], "at least 0 and not all 0, not [0.0, 0.0]"),
        ([float("nan"), 1.0], "at least 0 and not all 0, not [nan, 1.0]"),
    ],
)
def test_bad_weights(weights: list[float], text: str) -> None:
    with pytest.raises(UsageError) as caught:
        chosen(CURVE, weights)
    assert text in str(caught.value)
