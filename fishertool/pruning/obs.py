import itertools

import torch
from torch import Tensor


def obs(weight: Tensor, inverse_blocks: Tensor, pruned: int, gone: Tensor | None = None) -> Tensor:
    """The rise of the loss if a weight is zero and the others move to make up for it: OBS.

        w_i^2 / (2 [F^-1]_ii)

    F is block-diagonal, in runs of consecutive inputs of one output. Where a pattern takes
    `pruned` weights of a group at once, it is the rise for the best such set Q that i is in, a
    weight's share of it:

        min over Q with i in Q of  w_Q^T ([F^-1]_QQ)^-1 w_Q / (2 `pruned`)

    so that in each group the set of least rise has the least saliencies, and those of a block
    that goes whole add up to its rise. Weights that are `gone` already are in every such set.

    Shapes: weight, gone [out, in], inverse_blocks [out, in / group, group, group]. Sources: Hassibi and
    Stork 1993 (NIPS 5); WoodFisher, Singh and Alistarh 2020, arXiv 2004.14340; oBERT, Kurtic et
    al. 2022, arXiv 2203.07259, for groups.
    """
    size = inverse_blocks.shape[-1]
    groups, inverse = weight.double().reshape(-1, size), inverse_blocks.reshape(-1, size, size)
    held = torch.zeros_like(groups, dtype=torch.bool) if gone is None else gone.reshape(-1, size)
    in_each = held.sum(1)
    least = torch.full_like(groups, torch.inf)
    for together in map(list, itertools.combinations(range(size), pruned)):
        rise = _rise(groups[:, together], inverse[:, together][:, :, together]) / pruned
        rise[held[:, together].sum(1) < in_each] = torch.inf
        least[:, together] = torch.minimum(least[:, together], rise.unsqueeze(1))
    return least.reshape(weight.shape).to(torch.float32)


def _rise(weights: Tensor, inverse: Tensor) -> Tensor:
    """w^T B^-1 w / 2 of many small B, by elimination: [group, q], [group, q, q] -> [group]."""
    rest, left, total = inverse.clone(), weights.clone(), torch.zeros_like(weights[:, 0])
    for k in range(weights.shape[1]):
        pivot = rest[:, k, k]
        total += left[:, k].square() / (2 * pivot)
        factor = rest[:, k + 1 :, k] / pivot.unsqueeze(1)
        left[:, k + 1 :] -= factor * left[:, k, None]
        rest[:, k + 1 :, k + 1 :] -= factor.unsqueeze(2) * rest[:, k, None, k + 1 :]
    return total
