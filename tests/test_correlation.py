"""Rank correlation."""

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
