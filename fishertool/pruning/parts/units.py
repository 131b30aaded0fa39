"""Which units of a layer stay: heads in whole groups, or neurons, so many in every layer.

A unit is a run of so many `features` among the inputs of the layer that joins all units.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

PASSES = 10
TOLERANCE = 1e-12
"""A swap must lower the predicted loss by more than this, relative to the sum of all saliencies."""


def features_of(kept: Tensor, features: int) -> Tensor:
    """The inputs that these units are, in order.

    >>> features_of(torch.tensor([0, 2]), 3).tolist()
    [0, 1, 2, 6, 7, 8]
    """
    return (kept.unsqueeze(1) * features + torch.arange(features)).flatten()


def most_salient(saliency: Tensor, count: int) -> Tensor:
    """The `count` units of largest saliency, in order; of equal ones the first."""
    return saliency.argsort(descending=True, stable=True)[:count].sort().values


def weight_norms(tensors: Sequence[Tensor], units: int) -> Tensor:
    """Of each unit, the norm of all its weights: the magnitude of structured pruning.

    Shapes: tensors each [unit * rows of one, ...]; the result [unit], float64.
    """
    squares = [tensor.double().square().reshape(units, -1).sum(1) for tensor in tensors]
    return torch.stack(squares).sum(0).sqrt()


def predicted_loss(moments: Tensor, kept: Tensor) -> float:
    """The loss that leaving out the other units adds, to second order: 1/2 z^T F z, z one at each
    unit left out. F [unit, unit] is the mean of u u^T, u an example's gradient of the mask."""
    dropped = complement(kept, len(moments))
    return float(moments[dropped][:, dropped].double().sum()) / 2


def complement(kept: Tensor, units: int) -> Tensor:
    mask = torch.ones(units, dtype=torch.bool)
    mask[kept] = False
    return mask.nonzero().squeeze(1)


def rearranged(moments: Tensor, kept: Tensor, passes: int = PASSES) -> Tensor:
    """As many units, swapped one by one for others while that lowers the predicted loss.

    The saliency of each unit alone leaves out how two of them act together; the block of F within
    a layer has it. Each unit left out is swapped for the one that stays which lowers 1/2 z^T F z
    most, in passes until none does. Shapes: moments F [unit, unit] symmetric, kept [count] in
    order. Source: Kwon et al. 2022, arXiv 2204.09656, section 4.3.
    """
    fisher = moments.double()
    diagonal = fisher.diagonal()
    least = -TOLERANCE * float(diagonal.sum())
    left_out = torch.ones(len(fisher), dtype=torch.bool)
    left_out[kept] = False
    together = fisher @ left_out.double()
    for _ in range(passes):
        swapped = False
        for unit in left_out.nonzero().squeeze(1).tolist():
            change = diagonal[unit] - 2 * together[unit] + diagonal + 2 * (together - fisher[unit])
            change[left_out] = torch.inf
            other = int(change.argmin())
            if float(change[other]) < least:
                left_out[unit], left_out[other] = False, True
                together += fisher[other] - fisher[unit]
                swapped = True
        if not swapped:
            break
    return (~left_out).nonzero().squeeze(1)
