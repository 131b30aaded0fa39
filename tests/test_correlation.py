"""Rank correlation."""

from math import isnan

import pytest
import torch

from fishertool.evaluation.correlation import spearman


def test_without_ties_it_is_the_formula_of_squared_rank_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (2, 3, 10, 64):
        first, second = (torch.randperm(n, generator=generator).double() for _ in range(2))
        apart = float((first - second).square().sum())
        wanted = 1 - 6 * apart / (n * (n**2 - 1))
        found = spearman((first**3).tolist(), (second * 1e-9 - 5).tolist())
        assert found == pytest.approx(wanted, abs=1e-12)


def test_equal_numbers_share_a_rank() -> None:
    # Ranks 1.5 1.5 3 and 1 2 3: covariance 1.5, spreads 1.5 and 2.
    assert spearman([0.0, 0.0, 1.0], [1.0, 2.0, 3.0]) == pytest.approx(1.5 / (1.5 * 2) ** 0.5)


def test_without_a_spread_there_is_no_correlation() -> None:
    assert spearman([1.0, 1.0], [1.0, 2.0]) is None
    assert spearman([1.0], [2.0]) is None


def test_with_a_nan_it_is_nan() -> None:
    found = spearman([1.0, float("nan"), 3.0], [1.0, 2.0, 3.0])
    assert found is not None and isnan(found)


def test_as_many_as_a_corpus_has() -> None:
    """Pairs are never compared with pairs: a million numbers take their sorting."""
    numbers = torch.randint(9, (10**6,), generator=torch.Generator().manual_seed(0)).tolist()
    assert spearman(numbers, [-number for number in numbers]) == pytest.approx(-1)
