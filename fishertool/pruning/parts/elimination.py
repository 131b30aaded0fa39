"""Which units of a layer to leave out when the weights of those that stay make up for them."""

import torch
from torch import Tensor

from fishertool.pruning.parts.reconstruction import DAMPING
from fishertool.pruning.parts.units import complement, features_of

STEP = 32
"""Inputs that go at a time, chosen one by one among twice as many that cost least."""


def left_by_elimination(
    weight: Tensor,
    inputs: Tensor,
    outputs: Tensor,
    count: int,
    features: int,
    damping: float = DAMPING,
) -> Tensor:
    """The `count` units that stay when again and again the one that costs least goes.

    With the Fisher of W as B kron X and all other weights of the layer free, leaving out a unit,
    whose inputs are Q, costs

        1/2 tr(B W_Q ([X^-1]_QQ)^-1 W_Q^T)

    and W changes by -W_Q ([X^-1]_QQ)^-1 [X^-1]_Q:, as X^-1 does: of two units that can stand in
    for each other one goes, not both. W then is what `refitted` makes of it, with as large a ridge
    on X. B tells only which outputs matter.

    Shapes: weight [out, in], inputs X [in, in] and outputs B [out, out] symmetric, in = unit *
    features; the result [count], in order. Raises ValueError where X or B is zero. Source: Hassibi
    and Stork 1993; of structures, Kurtic, Frantar and Alistarh 2023, arXiv 2302.04089, section 3.
    """
    inputs = inputs.double()
    ridge = damping * inputs.diagonal().mean()
    if not ridge > 0 or not outputs.diagonal().sum() > 0:
        raise ValueError("zero everywhere")
    eye = torch.eye(len(inputs), dtype=inputs.dtype, device=inputs.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(inputs + ridge * eye))
    values, vectors = torch.linalg.eigh(outputs.double())
    weighted = (vectors * values.clamp(min=0).sqrt()).T @ weight.double()
    both = torch.cat([inverse, weighted])  # what elimination does to them is the same
    units = torch.arange(len(inputs) // features)
    while len(units) > count:
        several = min(max(1, STEP // features), len(units) - count)
        cheapest = _costs(both, features).argsort(stable=True)[: 2 * several].sort().values
        gone = cheapest[_one_by_one(_columns(both, cheapest, features), several, features)]
        stay = complement(gone, len(units))
        both = _without(both, gone, stay, features)
        units = units[stay]
    return units


def _costs(both: Tensor, features: int) -> Tensor:
    """Of each unit's loss, but for the factor: [unit]."""
    side = both.shape[1]
    units = side // features
    weight = both[side:].reshape(-1, units, features).movedim(1, 0)  # [unit, out, feature]
    blocks = both[:side].reshape(units, features, units, features)
    own = blocks.diagonal(dim1=0, dim2=2).movedim(2, 0)  # [unit, feature, feature]
    if features == 1:
        return weight.square().sum((1, 2)) / own.flatten()
    made_up: Tensor = torch.linalg.solve(own, weight, left=False)
    return (weight * made_up).sum((1, 2))


def _one_by_one(both: Tensor, several: int, features: int) -> Tensor:
    """So many of these units, each the cheapest once those before it are gone."""
    units, gone = torch.arange(both.shape[1] // features), []
    for _ in range(several):
        one = _costs(both, features).argmin(0, keepdim=True).cpu()
        gone.append(units[one])
        stay = complement(one, len(units))
        both, units = _without(both, one, stay, features), units[stay]
    return torch.cat(gone)


def _without(both: Tensor, gone: Tensor, stay: Tensor, features: int) -> Tensor:
    """The inverse and the weight of the units that stay, those that are gone eliminated."""
    lines = features_of(gone, features).to(both.device)
    factor = torch.linalg.solve(both[lines][:, lines], both[:, lines], left=False)
    left = _columns(both, stay, features)
    keep = features_of(stay, features).to(both.device)
    rows = torch.cat([keep, torch.arange(both.shape[1], len(both), device=both.device)])
    return left.addmm_(factor[rows], both[lines][:, keep], alpha=-1)


def _columns(both: Tensor, units: Tensor, features: int) -> Tensor:
    """Of the inverse, the rows and columns of these units; of the weight their columns."""
    lines, side = features_of(units, features).to(both.device), both.shape[1]
    return torch.cat([both[:side][lines], both[side:]])[:, lines]
