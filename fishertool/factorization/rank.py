"""Which rank each matrix gets: at a fixed share, by the energy kept, or under one budget for all.

A matrix [out, in] of rank r costs r (out + in) parameters, and dense out in: from `break_even` on
it stays dense, and has no rank (None). Ranks are multiples of `multiple`, and one at least.
Budgets are parameters of all matrices together.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Shape = tuple[int, int]
Shapes = Mapping[str, Shape]
Ranks = dict[str, int | None]
BISECTIONS = 60


def break_even(shape: Shape) -> int:
    """The least rank whose factors have no fewer parameters than the matrix.

    >>> break_even((384, 384)), break_even((4096, 4096)), break_even((1, 5))
    (192, 2048, 1)
    """
    return -(-shape[0] * shape[1] // sum(shape))


def largest_saving(shape: Shape, multiple: int = 1) -> int:
    """The largest rank below break-even; 0 if there is none."""
    return (break_even(shape) - 1) // multiple * multiple


def parameters(shape: Shape, rank: int | None) -> int:
    """Of the factors, or of the matrix where it stays dense."""
    return shape[0] * shape[1] if rank is None else rank * sum(shape)


def total(shapes: Shapes, ranks: Mapping[str, int | None]) -> int:
    return sum(parameters(shapes[name], rank) for name, rank in ranks.items())


def least(shapes: Shapes, multiple: int) -> int:
    """The smallest budget that can be met."""
    return total(shapes, {name: settle(0, shape, multiple) for name, shape in shapes.items()})


def settle(rank: int, shape: Shape, multiple: int) -> int | None:
    """A rank rounded down to a multiple, one at least; None where nothing would be saved.

    >>> settle(100, (384, 384), 8), settle(192, (384, 384), 1), settle(0, (384, 384), 8)
    (96, None, 8)
    """
    if rank >= break_even(shape) or not largest_saving(shape, multiple):
        return None
    return max(rank // multiple * multiple, multiple)


def fixed(shapes: Shapes, rank: int, multiple: int) -> Ranks:
    """One rank for all."""
    return {name: settle(rank, shape, multiple) for name, shape in shapes.items()}


def uniform(shapes: Shapes, keep: float, multiple: int = 1) -> Ranks:
    """The same share of every matrix's parameters; all of them dense where that is 1."""
    if keep >= 1:
        return dict.fromkeys(shapes)
    return {
        # rounded, as 0.58 * 200 is 115.99999999999999
        name: settle(int(round(keep * shape[0] * shape[1] / sum(shape), 6)), shape, multiple)
        for name, shape in shapes.items()
    }


def under_budget_uniformly(shapes: Shapes, budget: int, multiple: int = 1) -> Ranks:
    """As `uniform`, with the budget's share; with less, where least ranks and matrices that stay
    dense take more than theirs.

    Raises ValueError for a budget below `least`.
    """
    _check_budget(shapes, budget, multiple)
    share = budget / total(shapes, dict.fromkeys(shapes))
    return _largest(lambda keep: uniform(shapes, keep, multiple), share, shapes, budget)


def by_energy(
    spectra: Mapping[str, Tensor], shapes: Shapes, energy: float, multiple: int = 1
) -> Ranks:
    """The least rank that keeps this share of the squared singular values, in every matrix."""
    return _reaching(_kept(spectra), shapes, energy, multiple)


def under_budget_by_energy(
    spectra: Mapping[str, Tensor], shapes: Shapes, budget: int, multiple: int = 1
) -> Ranks:
    """As `by_energy`, with the largest share that the budget allows.

    Raises ValueError for a budget below `least`.
    """
    _check_budget(shapes, budget, multiple)
    kept = _kept(spectra)
    return _largest(lambda share: _reaching(kept, shapes, share, multiple), 1.0, shapes, budget)


def under_budget_globally(
    spectra: Mapping[str, Tensor], shapes: Shapes, budget: int, multiple: int = 1
) -> Ranks:
    """The least sum of all squared errors: terms by sigma^2 / (in + out), the largest first.

    Staying dense is a matrix's last step, which takes all that is left of its energy. Where a step
    gains more for a parameter than the one before, both are one step. Raises ValueError for a
    budget below `least`.
    """
    _check_budget(shapes, budget, multiple)
    ranks: Ranks = {name: settle(0, shape, multiple) for name, shape in shapes.items()}
    left = budget - total(shapes, ranks)
    steps = [
        (gain, name, cost, rank)
        for name, first in ranks.items()
        if first is not None
        for gain, cost, rank in _steps(spectra[name].square(), shapes[name], multiple)
    ]
    steps.sort(key=lambda step: -step[0])  # stable: a matrix's own steps stay in order
    full: set[str] = set()
    for _, name, cost, rank in steps:
        if name in full:
            continue
        if cost > left:  # of several steps in one, those that fit
            full.add(name)
            shape, now = shapes[name], ranks[name] or 0
            fitting = now + left // (multiple * sum(shape)) * multiple
            rank = min(fitting, largest_saving(shape, multiple))
            cost = (rank - now) * sum(shape)
        left -= cost
        ranks[name] = rank
    return ranks


def _steps(energies: Tensor, shape: Shape, multiple: int) -> list[tuple[float, int, int | None]]:
    """From rank `multiple` up to dense: energy gained a parameter, never rising; cost; new rank."""
    top = largest_saving(shape, multiple)
    kept = [0.0, *energies.double().cumsum(0).tolist()]
    stops: list[int | None] = [*range(2 * multiple, top + 1, multiple), None]
    merged: list[tuple[float, int, int | None]] = []  # energy, cost, new rank
    before = multiple
    for stop in stops:
        gain = (kept[-1] if stop is None else kept[stop]) - kept[before]
        step = (max(gain, 0.0), parameters(shape, stop) - before * sum(shape), stop)
        while merged and step[0] * merged[-1][1] > merged[-1][0] * step[1]:
            last = merged.pop()
            step = (last[0] + step[0], last[1] + step[1], stop)
        merged.append(step)
        before = stop or before
    return [(gain / cost, cost, stop) for gain, cost, stop in merged]


def _kept(spectra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Share of the energy that the first terms keep, [term]; all of a matrix of zeros."""
    kept = {}
    for name, values in spectra.items():
        energies = values.double().square().cumsum(0)
        kept[name] = energies / energies[-1] if bool(energies[-1] > 0) else energies + 1
    return kept


def _reaching(kept: Mapping[str, Tensor], shapes: Shapes, energy: float, multiple: int) -> Ranks:
    ranks: Ranks = {}
    for name, shares in kept.items():
        rank = int(torch.searchsorted(shares, energy)) + 1
        rank = -(-rank // multiple) * multiple
        ranks[name] = settle(rank, shapes[name], multiple)
    return ranks


def _largest(ranks_at: Callable[[float], Ranks], top: float, shapes: Shapes, budget: int) -> Ranks:
    """Ranks at the largest share, of 0 to `top`, that fits the budget; at 0 they do."""
    low, high = 0.0, top
    if total(shapes, ranks_at(top)) <= budget:
        return ranks_at(top)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        fits = total(shapes, ranks_at(middle)) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return ranks_at(low)


def _check_budget(shapes: Shapes, budget: int, multiple: int) -> None:
    if budget < (needed := least(shapes, multiple)):
        raise ValueError(
            f"a budget of {budget:,} parameters is below the {needed:,} of the least ranks"
        )
