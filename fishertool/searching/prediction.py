"""Screening by the predicted losses of the models: what a point would add, before it is measured."""

import torch
from torch import Tensor

from fishertool.searching.pareto import hypervolume, reference_of


def gauged(losses: Tensor) -> Tensor:
    """Predicted increases of the losses [point, model] as values to be made large.

    -sqrt(2 L): the distance from each model in the metric of its Fisher, so that the whole of a
    front counts and not its far end alone.
    """
    return -(2 * losses.clamp(min=0)).sqrt()


def predicted_gains(known: Tensor, candidates: Tensor) -> Tensor:
    """What each candidate adds to the known points: [candidate], larger is better.

    The gain in hypervolume of a candidate that no known point dominates. One that is dominated has
    minus the least shift of all its values, in units of the ranges, by which it would not be.

    known       [point, objective], all to be made large
    candidates  [candidate, objective]
    """
    both = torch.cat([known, candidates])
    spread = both.amax(0) - both.amin(0)
    unit = torch.where(spread > 0, spread, 1.0)
    known, candidates, both = known / unit, candidates / unit, both / unit
    reference = reference_of(both)
    before = hypervolume(known, reference)
    gains = [hypervolume(torch.cat([known, one[None]]), reference) - before for one in candidates]
    found = torch.tensor(gains, dtype=torch.float64)
    if not len(known):
        return found
    short = (known[None] - candidates[:, None]).amin(-1).amax(-1).clamp(min=0)
    return torch.where(found > 0, found, -short)


def most_gained(candidates: Tensor, count: int) -> list[int]:
    """So many of the candidates [candidate, objective], each the one that adds most to those before."""
    taken: list[int] = []
    for _ in range(min(count, len(candidates))):
        gains = predicted_gains(candidates[taken], candidates)
        gains[taken] = -torch.inf
        taken.append(int(gains.argmax()))
    return taken
