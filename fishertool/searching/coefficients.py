"""Candidate merge weights of the coefficient search in Matena and Raffel 2022 (arXiv 2111.09832)."""

import torch

from fishertool.errors import UsageError

GRID_POINTS = 51


def grid(models: int, points: int) -> list[list[float]]:
    """Evenly spaced weights of two models, from the first alone to the second alone.

    >>> grid(2, 3)
    [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
    """
    if models != 2:
        raise UsageError(f"--search-weights grid is for 2 models, not {models}; use dirichlet")
    if points < 2:
        raise UsageError("--search-points: a grid needs at least 2")
    return [[1 - i / (points - 1), i / (points - 1)] for i in range(points)]


def dirichlet(models: int, points: int, seed: int) -> list[list[float]]:
    """Weights drawn uniformly from the simplex: Dirichlet(1, ..., 1), seeded."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(points, models, dtype=torch.float64, generator=generator)
    draws = -torch.log1p(-uniform)  # exponentials divided by their sum are Dirichlet(1)
    rows: list[list[float]] = (draws / draws.sum(-1, keepdim=True)).tolist()
    return rows
