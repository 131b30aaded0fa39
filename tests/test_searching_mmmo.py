"""The parts of MM-MO against their definitions, and what a proposal must be."""

import math
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from fishertool.searching.pareto import (
    contributions,
    hypervolume,
    non_dominated,
    reference_of,
    strongest,
)

pytest.importorskip("botorch", reason="needs fishertool[search]")

from fishertool.searching import acquisition, mmmo
from fishertool.searching.acquisition import expected_gain, worth
from fishertool.searching.mmmo import propose, search_reference
from fishertool.searching.quiet import quiet
from fishertool.searching.recombination import neighbours, recombine
from fishertool.searching.screening import fisher_information
from fishertool.searching.surrogate import fit, standardized

NONE = torch.zeros(0, 3, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here holds however thoroughly the acquisition is climbed."""
    monkeypatch.setattr(acquisition, "SAMPLES", 8)
    monkeypatch.setattr(acquisition, "STARTS", 1)
    monkeypatch.setattr(acquisition, "ITERATIONS", 5)
    monkeypatch.setattr(mmmo, "DRAWS", 16)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(count: int, dimensions: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(count, dimensions, dtype=torch.float64, generator=generator(seed))


def scores(x: Tensor) -> Tensor:
    """Two objectives in conflict along the first coordinate, both best at 0.5 in the others."""
    lost = (x[:, 1:] - 0.5).square().sum(-1)
    return torch.stack([-(x[:, 0] ** 2) - lost, -((1 - x[:, 0]) ** 2) - lost], -1)


def posterior_variance(model: Any, x: Tensor, candidate: Tensor) -> float:
    """k(c, c) - k(c, X) (K + noise)^-1 k(X, c), with the fitted kernel and noise."""
    kernel = model.covar_module
    noise = model.likelihood.noise.detach()
    with torch.no_grad():
        gram = kernel(x, x).to_dense() + noise * torch.eye(len(x), dtype=torch.float64)
        across = kernel(x, candidate[None]).to_dense()
        alone = kernel(candidate[None], candidate[None]).to_dense()
    return float(alone - across.T @ torch.linalg.solve(gram, across))


def test_fisher_information_is_the_sum_of_inverse_posterior_variances() -> None:
    x, candidates = points(8), points(3, seed=1)
    model = fit(x, standardized(scores(x)))
    expected = [
        sum(1 / posterior_variance(one, x, candidate) for one in model.models)
        for candidate in candidates
    ]
    found = fisher_information(model, candidates)
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-4, atol=0)
    assert found.min() < fisher_information(model, x).min()  # what was evaluated is known best


def test_standardized() -> None:
    values = torch.cat([points(9, 2) * 1e6 - 5, torch.full((9, 1), 3.3)], 1)
    found = standardized(values)
    torch.testing.assert_close(found.mean(0), torch.zeros(3).double())
    torch.testing.assert_close(found.std(0, unbiased=False), torch.tensor([1.0, 1, 0]).double())


def test_the_surrogate_learns_and_ignores_the_global_generator() -> None:
    x, unseen = points(25), points(50, seed=1)
    mean, scale = scores(x).mean(0), scores(x).std(0, unbiased=False)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    model = fit(x, standardized(scores(x)))
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        errors = model.posterior(unseen).mean * scale + mean - scores(unseen)
    assert errors.square().mean() < 0.05 * scores(unseen).var()


def test_the_surrogate_finds_out_what_does_not_matter() -> None:
    x = points(14, 4)
    [model] = fit(x, standardized(x[:, :1])).models
    matters, *others = model.covar_module.lengthscale.detach().flatten().tolist()
    assert matters < 3 and min(others) > 15


def test_strongest_ranks_by_front_and_then_by_contribution() -> None:
    values = torch.tensor([[0.0, 0.0], [1.0, 4.0], [4.0, 1.0], [3.5, 1.1], [2.0, 2.9], [0.5, 3.0]])
    first = values[non_dominated(values)]
    shares = contributions(first, reference_of(first))
    rows = non_dominated(values).nonzero().flatten()[shares.argsort(descending=True)]
    assert strongest(values, 4).tolist() == rows.tolist()
    assert strongest(values, 5).tolist() == [*rows.tolist(), 5]
    assert len(strongest(values[:2], 5)) == 2


def test_offspring_mix_a_candidate_with_a_mutant_of_the_strong() -> None:
    candidates, strong = points(40), 0.4 + 0.1 * points(4, seed=1)
    offspring = recombine(candidates, strong, generator())
    mutants = [
        strong[a] + 0.5 * (strong[b] - strong[c])
        for a in range(4)
        for b in range(4)
        for c in range(4)
        if len({a, b, c}) == 3
    ]
    changed = 0
    for child, parent in zip(offspring, candidates, strict=True):
        explained = [
            mutant
            for mutant in mutants
            if bool(torch.isclose(child, mutant)[child != parent].all())
            and bool((child != parent).any())
        ]
        assert explained, "neither the candidate's nor one mutant's"
        changed += int((child != parent).sum())
    assert 0.5 < changed / offspring.numel() < 0.8  # 1/2 + 1/2 * 1/3 expected


def test_a_neighbour_differs_in_one_coordinate() -> None:
    strong = points(3)
    found = neighbours(strong, 200, generator()).reshape(3, 200, 3)
    changed = found != strong[:, None]
    assert bool((changed.sum(2) == 1).all())
    for coordinate in range(3):
        drawn = found[..., coordinate][changed[..., coordinate]]
        assert drawn.min() < 0.1 and drawn.max() > 0.9 and drawn.max() < 1


def test_offspring_stay_in_the_cube_and_need_no_three_parents() -> None:
    corners = points(5).round()
    offspring = recombine(points(50, seed=1), corners, generator())
    assert bool(((offspring >= 0) & (offspring <= 1)).all())
    one = recombine(points(5), corners[:1], generator())
    assert bool(((one == corners[0]) | (one == points(5))).all())


def proposals(seed: int = 0, **settings: Any) -> Tensor:
    x = points(6)
    return propose(x, scores(x), NONE, 2, seed, **settings)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"recombine": False},
    {"screen": None},
    {"recombine": False, "screen": None},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_proposal_is_new_inside_and_repeatable(settings: dict[str, Any]) -> None:
    found = proposals(**settings)
    assert found.shape == (2, 3) and found.dtype == torch.float64
    assert bool(((found >= 0) & (found <= 1)).all())
    assert float(torch.cdist(found, torch.cat([points(6), found])).sort(1).values[:, 1].min()) > 0
    torch.rand(5)  # the global generator plays no part
    assert torch.equal(proposals(**settings), found)
    assert not torch.equal(proposals(seed=1, **settings), found)


def test_every_part_has_an_effect() -> None:
    found = [proposals(seed=1, **settings) for settings in SETTINGS]
    for i in range(4):
        for j in range(i):
            assert not torch.equal(found[i], found[j]), f"{SETTINGS[i]} is {SETTINGS[j]}"


def test_threads_do_not_matter() -> None:
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda seed: proposals(seed, screen=None), [3, 3]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], proposals(3, screen=None))


@pytest.mark.parametrize("seed", range(4))
def test_screening_keeps_what_is_known_least_of_what_gains_as_much(seed: int) -> None:
    x = points(6)
    values = standardized(scores(x))
    pool = propose(x, scores(x), NONE, 4, seed, screen=None)
    model = fit(x, values)
    gain = expected_gain(model, x, values, NONE, search_reference(values), seed)
    gains = worth(gain, pool, x)
    enough = gains > gains.sort().values[-2] + math.log(0.5)
    known = torch.where(enough, fisher_information(model, pool), torch.inf)
    kept = propose(x, scores(x), NONE, 2, seed)
    assert torch.equal(kept, pool[known.argsort()[:2].sort().values])


def test_screening_by_a_function_keeps_what_it_scores_highest() -> None:
    x = points(6)
    pool = propose(x, scores(x), NONE, 4, 0, screen=None)
    kept = propose(x, scores(x), NONE, 2, 0, screen=lambda candidates: candidates[:, 1])
    assert torch.equal(kept, pool[pool[:, 1].argsort(descending=True)[:2].sort().values])


@pytest.mark.parametrize("settings", SETTINGS)
def test_where_not_all_of_the_cube_is_there_a_proposal_is_new_too(settings: dict[str, Any]) -> None:
    def snap(rows: Tensor) -> Tensor:
        return rows.round()

    corners = torch.tensor([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)]).double()
    x = corners[[0, 3, 5, 6, 7]]
    found = propose(x, scores(x), corners[[1]], 2, 0, snap=snap, **settings)
    assert sorted(found.tolist()) == sorted(corners[[2, 4]].tolist())


def test_pending_points_are_counted_on() -> None:
    x = points(6)
    first = propose(x, scores(x), NONE, 1, 0, screen=None)
    second = propose(x, scores(x), first, 1, 0, screen=None)
    assert float((first - second).abs().max()) > 0.01


@pytest.mark.parametrize("constant", ["none", "one", "all"])
def test_two_evaluations_and_constant_objectives(constant: str) -> None:
    x = points(2)
    values = scores(x)
    if constant != "none":
        values[:, 0 if constant == "one" else slice(None)] = 0.7
    found = propose(x, values, NONE, 2, 0)
    assert len(torch.unique(found, dim=0)) == 2


def test_one_and_three_objectives() -> None:
    x = points(5)
    three = torch.cat([scores(x), -x.sum(1, keepdim=True)], 1)
    for values in (three[:, :1], three):
        assert propose(x, values, NONE, 1, 0, screen=None).shape == (1, 3)


def test_away_from_a_point_that_dominates_nearly_all_there_is_still_something_to_gain() -> None:
    spread = points(20, 2)
    values = torch.cat([spread, torch.tensor([[0.6, 2.0], [2.0, 0.6]]).double()])
    found = search_reference(values)
    torch.testing.assert_close(found, values.sort(0).values[2])  # of 22, the second is below 1/20
    assert bool((found < values[non_dominated(values)].amin(0)).all())
    for count in (2, 11, 20):  # one spoilt value never counts
        spoilt = torch.cat([values[-count:], torch.full((1, 2), -1e6).double()])
        assert bool((search_reference(spoilt) > -1).all())


def test_the_reference_is_not_above_the_fronts() -> None:
    values = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double().repeat(5, 1)
    torch.testing.assert_close(search_reference(values), reference_of(values))


def test_being_near_the_base_alone_is_no_reason() -> None:
    x = torch.cat([points(12), torch.zeros(1, 3)])
    one, other = x[:, 0], x[:, 1]  # both objectives are best far from the base, which is 0
    values = torch.stack(
        [
            -((one - 1) ** 2) - (other - 0.6) ** 2,
            -((other - 1) ** 2) - (one - 0.6) ** 2,
        ],
        -1,
    )
    settings: dict[str, Any] = {"screen": None, "recombine": False}
    for seed in range(2):
        found = propose(x, values, NONE, 2, seed, distances=one + other, **settings)
        assert float((found[:, 0] + found[:, 1]).min()) > 0.8
        assert not torch.equal(found, propose(x, values, NONE, 2, seed, **settings))


def test_gain_is_greater_where_the_front_can_grow() -> None:
    x = points(20)
    values = standardized(scores(x))
    model = fit(x, values)
    gain = expected_gain(model, x, values, NONE, reference_of(values), 0)
    good = torch.tensor([[[0.5, 0.5, 0.5]], [[0.5, 0.0, 1.0]]], dtype=torch.float64)
    with torch.no_grad():
        better, worse = gain(good).tolist()
    assert better > worse + 1


def test_a_search_beats_as_many_random_points() -> None:
    reference = torch.tensor([-1.0, -1.0])
    x = points(6)
    for seed in range(2):
        x = torch.cat([x, propose(x, scores(x), NONE, 3, seed, screen=None)])
    random = [hypervolume(scores(points(12, seed=seed)), reference) for seed in range(20)]
    assert hypervolume(scores(x), reference) > max(random)


def test_fronts_need_no_botorch() -> None:
    code = (
        "import sys; import fishertool.searching.pareto, fishertool.searching.recombination;"
        "sys.exit(str({'botorch', 'gpytorch'} & set(sys.modules) or '') or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_warnings_that_are_turned_on_again_are_not_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("ABNORMAL", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == ""
