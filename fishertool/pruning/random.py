import torch
from torch import Tensor


def random(weight: Tensor, generator: torch.Generator) -> Tensor:
    """A number between 0 and 1 by lot: what a method must beat to be one.

    Shapes: weight [out, in]. Source: none.
    """
    return torch.rand(weight.shape, generator=generator).to(weight)
