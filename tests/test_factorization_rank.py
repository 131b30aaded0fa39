"""Which ranks matrices get: shares, energies, and one budget against the best of all choices."""

import pytest
import torch
from torch import Tensor

from fishertool.factorization import rank as ranks
from fishertool.surgery.factorize_ranks import Budget

SIDES = {"wide": (8, 24), "tall": (20, 10), "square": (16, 16), "vector": (1, 9)}


def spectra() -> dict[str, Tensor]:
    """Of very different sizes and decays."""
    found = {}
    for number, (name, shape) in enumerate(SIDES.items()):
        decay = torch.linspace(0, -2 * number - 1, min(shape), dtype=torch.float64).exp()
        found[name] = 10.0 ** (-number) * decay
    return found


def error_of(chosen: ranks.Ranks) -> float:
    """Sum of the squared singular values that are cut off."""
    return sum(
        float(values[chosen[name] or len(values) :].square().sum())
        if chosen[name] is not None
        else 0.0
        for name, values in spectra().items()
    )


def test_break_even_is_where_factors_stop_saving() -> None:
    for shape in [*SIDES.values(), (384, 384), (1, 1), (1, 2), (63, 64)]:
        point = ranks.break_even(shape)
        assert point * sum(shape) >= shape[0] * shape[1] > (point - 1) * sum(shape)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("multiple", [1, 4])
def test_uniform_ranks_keep_the_share(keep: float, multiple: int) -> None:
    for name, chosen in ranks.uniform(SIDES, keep, multiple).items():
        shape = SIDES[name]
        if chosen is None:
            saved = ranks.largest_saving(shape, multiple)
            assert not saved or keep == 1.0
            continue
        assert chosen % multiple == 0
        assert chosen * sum(shape) <= keep * shape[0] * shape[1] or chosen == multiple
        assert (chosen + multiple) * sum(shape) > keep * shape[0] * shape[1]
    assert ranks.uniform(SIDES, 1.0) == dict.fromkeys(SIDES)


@pytest.mark.parametrize("percent", range(1, 100))
def test_a_share_that_is_a_rank_gives_it(percent: int) -> None:
    shapes = {"square": (1600, 1600), "wide": (1600, 6400)}
    chosen = Budget(keep=percent / 100, multiple=8).known(shapes, 0)
    assert chosen["square"] == 8 * percent  # of 800 at break-even


@pytest.mark.parametrize("seed", range(20))
def test_no_allocation_exceeds_its_budget(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sides = torch.randint(1, 40, (6, 2), generator=generator).tolist()
    shapes = {str(number): (a, b) for number, (a, b) in enumerate(sides)}
    values = {name: torch.rand(min(shape), generator=generator).sort(descending=True).values
              for name, shape in shapes.items()}  # fmt: skip
    multiple = 1 + seed % 3
    least, whole = ranks.least(shapes, multiple), ranks.total(shapes, dict.fromkeys(shapes))
    for budget in {*range(least, whole, max((whole - least) // 7, 1)), whole}:
        for chosen in (
            ranks.under_budget_uniformly(shapes, budget, multiple),
            ranks.under_budget_by_energy(values, shapes, budget, multiple),
            ranks.under_budget_globally(values, shapes, budget, multiple),
        ):
            assert set(chosen) == set(shapes)
            assert least <= ranks.total(shapes, chosen) <= budget


def test_under_a_budget_all_share_what_small_matrices_take_too_much_of() -> None:
    shapes = {"small": (1, 9), "large": (40, 40), "other": (40, 40)}  # 9 stays dense
    assert ranks.uniform(shapes, 0.5) == {"small": None, "large": 10, "other": 10}
    assert ranks.under_budget_uniformly(shapes, 1609) == {"small": None, "large": 10, "other": 10}
    assert ranks.under_budget_uniformly(shapes, 1608) == {"small": None, "large": 9, "other": 9}
    assert ranks.under_budget_uniformly(shapes, 3209) == dict.fromkeys(shapes)


def test_ranks_by_energy_keep_it_with_no_term_too_many() -> None:
    chosen = ranks.by_energy(spectra(), SIDES, 0.9)
    for name, values in spectra().items():
        energies = values.square()
        rank = chosen[name]
        if rank is None:
            needed = int((energies.cumsum(0) < 0.9 * energies.sum()).sum()) + 1
            assert needed >= ranks.break_even(SIDES[name])
            continue
        assert float(energies[:rank].sum()) >= 0.9 * float(energies.sum())
        assert float(energies[: rank - 1].sum()) < 0.9 * float(energies.sum())
    assert ranks.by_energy(spectra(), SIDES, 0.9, 4)["square"] in (4, None)


@pytest.mark.parametrize("multiple", [1, 2])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 1.0])
def test_one_budget_for_all(share: float, multiple: int) -> None:
    whole = sum(a * b for a, b in SIDES.values())
    budget = int(share * whole)
    for allocate in (ranks.under_budget_by_energy, ranks.under_budget_globally):
        chosen = allocate(spectra(), SIDES, budget, multiple)
        assert set(chosen) == set(SIDES)
        assert ranks.total(SIDES, chosen) <= budget
        for name, rank in chosen.items():
            assert rank is None or (rank % multiple == 0 and rank < ranks.break_even(SIDES[name]))
    if share == 1.0:
        assert chosen == dict.fromkeys(SIDES)


@pytest.mark.parametrize("share", [0.25, 0.4, 0.5, 0.6, 0.8])
def test_the_global_allocation_is_near_the_best_of_all(share: float) -> None:
    shapes = {name: SIDES[name] for name in ("wide", "tall", "square")}
    budget = int(share * sum(a * b for a, b in shapes.values()))
    options = {
        name: [*range(1, ranks.largest_saving(shape) + 1), None] for name, shape in shapes.items()
    }
    best = min(
        error_of({"wide": a, "tall": b, "square": c, "vector": None})
        for a in options["wide"]
        for b in options["tall"]
        for c in options["square"]
        if ranks.total(shapes, {"wide": a, "tall": b, "square": c}) <= budget
    )
    chosen = ranks.under_budget_globally(spectra(), shapes, budget)
    slack = budget - ranks.total(shapes, chosen)
    found = error_of({**chosen, "vector": None})
    # What the budget has left over is less than a step; with that step it would be the best.
    assert found <= best * 1.3 + 1e-12 or slack < 44
    even = ranks.uniform(shapes, share)
    assert found <= error_of({**even, "vector": None}) + 1e-12


def test_a_budget_below_the_least_ranks_is_refused() -> None:
    match = "a budget of 10 parameters is below the 103"
    for allocate in (ranks.under_budget_by_energy, ranks.under_budget_globally):
        with pytest.raises(ValueError, match=match):
            allocate(spectra(), SIDES, 10)
    with pytest.raises(ValueError, match=match):
        ranks.under_budget_uniformly(SIDES, 10)


def test_a_matrix_of_zeros_takes_the_least() -> None:
    zeros = {"a": torch.zeros(16).double(), "b": torch.ones(16).double()}
    shapes = {"a": (16, 16), "b": (16, 16)}
    assert ranks.by_energy(zeros, shapes, 0.5) == {"a": 1, "b": None}
    chosen = ranks.under_budget_globally(zeros, shapes, 256)
    assert chosen["a"] == 1
    assert ranks.total(shapes, chosen) <= 256
