"""How the weights that stay move to make up for those that go, by the rank-one Fisher.

Both minimize 1/2 d^T F d over moves d with d_Q = -w_Q; Q is pruned, K is kept.
"""

import torch
from torch import Tensor

from fishertool.fisher.columns import Gradients, MaskedGradients
from fishertool.fisher.rank_one import RankOneFisher


def summed(weight: Tensor, mask: Tensor, fisher: RankOneFisher) -> Tensor:
    """The optimal moves for each pruned weight by itself, added up.

        d = - sum over q in Q of (w_q / [F^-1]_qq) F^-1 e_q

    Weights that go together are moved for as if each went alone.

    Shapes: weight, mask (True where kept) [weight], of all that F is of -> the new weights, float64.
    Source: WoodFisher, Singh and Alistarh 2020, arXiv 2004.14340.
    """
    scaled = weight.double() / fisher.inverse_diagonal()
    moves = fisher.solve(torch.where(mask, 0.0, scaled))
    return torch.where(mask, weight.double() - moves, 0.0)


def joint(weight: Tensor, mask: Tensor, fisher: RankOneFisher, gradients: Gradients) -> Tensor:
    """The optimal move for all pruned weights at once: Optimal Brain Surgeon of a set.

        d_K = [F_KK]^-1 F_KQ w_Q

    which in gradients is d_K = G_K^T v with (damping I + G_K G_K^T / m) v = G_Q w_Q / m. F_KK is
    the Fisher of the gradients with their columns Q set to zero.

    Shapes: weight, mask (True where kept) [weight]; `gradients` are those of `fisher` -> the new
    weights, float64. Source: Hassibi and Stork 1993 (NIPS 5), for a set; see Kurtic et al. 2022,
    arXiv 2203.07259.
    """
    values = weight.double()
    masks = {name: mask[span] for name, span in fisher.spans.items()}
    of_kept = RankOneFisher(MaskedGradients(gradients, masks), fisher.damping, fisher.block)
    pull = torch.where(mask, fisher.product(torch.where(mask, 0.0, values)), 0.0)
    moves = of_kept.solve(pull)
    # Once more for what rounding left: F_KK may be nearly singular.
    moves += of_kept.solve(pull - of_kept.product(moves))
    return torch.where(mask, values + moves, 0.0)
