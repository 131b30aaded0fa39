"""The signed estimator: its mean over all signs is the sum of the per-example squares."""

import itertools
from typing import Any

import pytest
import torch
from test_fisher_diagonal import COUNT, _collate, _estimate, _expected, _model, relative_error

from fishertool.fisher.estimate import estimate
from fishertool.fisher.kinds import Gathering


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama-tied"])
def test_mean_over_all_signs_is_exact(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _expected(kind, "empirical")
    totals = {name: torch.zeros_like(value) for name, value in expected.items()}
    combinations = list(itertools.product((-1, 1), repeat=3))  # more only flip all signs of a batch
    for signs in combinations:
        drawn = itertools.cycle(signs)
        monkeypatch.setattr(
            "fishertool.fisher.signed.random_signs",
            lambda shape, _: torch.tensor([next(drawn)], dtype=torch.int8),  # noqa: B023
        )
        found = _estimate(kind, "empirical", 3, estimator="signed")
        for name, value in found.diagonal.items():
            totals[name] += value / len(combinations)
    largest = max(float(value.max()) for value in expected.values())
    for name, value in expected.items():
        if float(value.max()) > 1e-12 * largest:
            assert relative_error(totals[name], value) < 1e-5, name


def test_signs_follow_from_seed_and_example() -> None:
    one = _estimate("gpt2", "empirical", 4, estimator="signed", seed=1).diagonal
    same = _estimate("gpt2", "empirical", 4, estimator="signed", seed=1).diagonal
    other = _estimate("gpt2", "empirical", 4, estimator="signed", seed=2).diagonal
    name = "transformer.h.0.mlp.c_fc.weight"
    assert torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name])


def test_one_example_a_batch_is_exact() -> None:
    exact = _estimate("bert", "expected", 1).diagonal
    signed = _estimate("bert", "expected", 1, estimator="signed").diagonal
    for name, value in exact.items():
        if float(value.max()) > 1e-12:
            assert relative_error(signed[name], value) < 1e-5, name


def test_factored_and_its_error_count_batches() -> None:
    """The standard error is that of the batches' estimates, and so tells the noise of the signs."""
    model = _model("gpt2")
    parameters = dict(model.named_parameters())
    batches: list[list[int]] = [[0, 1, 2], [3, 4, 5], [6, 7]]

    def run(which: list[list[int]]) -> Any:
        gathering = Gathering(["diagonal", "factored"], parameters)
        done = estimate(
            model, parameters, _collate("gpt2"), [which], gathering.statistics,
            probe=4, estimator="signed",
        )  # fmt: skip
        return gathering.stored(done.examples)

    whole, alone = run(batches), [run([batch])["diagonal"].statistics for batch in batches]
    for name, statistic in whole["diagonal"].statistics.items():
        traces = torch.tensor(
            [one[name].total * len(b) for one, b in zip(alone, batches, strict=True)]
        )
        assert statistic.total == pytest.approx(float(traces.sum()) / COUNT, rel=1e-4)
        error = float(traces.std()) * 3**0.5 / COUNT
        assert statistic.standard_error == pytest.approx(error, rel=1e-3, abs=1e-12)
        assert whole["factored"].statistics[name].total == pytest.approx(statistic.total, rel=1e-4)
    assert parameters["transformer.wte.weight"].requires_grad  # as it was
