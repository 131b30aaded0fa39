"""How high an embedding model ranks the documents that belong to a query."""

import torch
from torch import Tensor

CUTOFF = 10


def ranks_of_relevant(scores: Tensor, relevant: Tensor) -> Tensor:
    """Where each relevant document stands, from 1 on, in order; [relevant document].

    Of equal scores the irrelevant one comes first, so that a model which cannot tell documents
    apart gains nothing. Shapes: `scores` and the boolean `relevant` [document].
    """
    wanted = scores[relevant].sort(descending=True).values
    others = scores[~relevant].sort().values
    ahead = len(others) - torch.searchsorted(others, wanted)
    return ahead + torch.arange(1, len(wanted) + 1, device=scores.device)


def ndcg(ranks: Tensor, cutoff: int = CUTOFF) -> float:
    """Normalised discounted cumulative gain of one query, every relevant document worth the same:

        sum over relevant ranks r <= cutoff of 1 / log2(r + 1), divided by the most it could be

    Source: Jarvelin and Kekalainen 2002.
    """
    gains = 1 / torch.log2(torch.arange(2, cutoff + 2, dtype=torch.float64))
    return float(gains[ranks[ranks <= cutoff].cpu() - 1].sum() / gains[: len(ranks)].sum())


def reciprocal_rank(ranks: Tensor) -> float:
    """Of the first relevant document, in the whole corpus."""
    return 1 / int(ranks[0])
