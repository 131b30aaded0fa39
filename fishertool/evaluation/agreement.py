"""How far a model's predictions moved from another's."""

import torch
from torch import Tensor


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats for each prediction, p the original's. Shapes: [..., class] -> [...]."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def same_top(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Whether both put the same class first. Shapes: [..., class] -> [...]."""
    return log_p.argmax(-1) == log_q.argmax(-1)
