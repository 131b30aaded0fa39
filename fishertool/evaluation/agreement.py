"""How far a model's predictions moved from another's."""

from math import nan

import torch
from torch import Tensor


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats for each prediction, p the original's; NaN where p or q has a NaN.

    Shapes: [..., class] -> [...].
    """
    p = log_p.exp()
    return torch.where((p == 0) & ~log_q.isnan(), 0.0, p * (log_p - log_q)).sum(-1)


def same_top(log_p: Tensor, log_q: Tensor) -> Tensor:
    """1 where both put the same class first, else 0; NaN where either has a NaN.

    Shapes: [..., class] -> [...].
    """
    (p, first), (q, second) = log_p.max(-1), log_q.max(-1)
    return (first == second).double().masked_fill((p + q).isnan(), nan)
