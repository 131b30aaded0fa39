"""What a merge method is.

A pure function in a file of its own name, called once for every piece of every tensor:

    def name(models, weights, [fishers], [base], *, setting=default) -> Tensor

models    k tensors of one shape, float32 (float64 where stored so)
weights   k numbers
fishers   k `Fisher`s; a method that names this input needs `--fisher`
base      the common ancestor's tensor; a method that names this input takes `--base`

It returns a tensor of that shape and dtype, and writes into none of its arguments.
"""

from typing import NamedTuple

from torch import Tensor


class Fisher(NamedTuple):
    """One model's diagonal Fisher of one piece, with what of the whole a formula needs."""

    values: Tensor
    """As `models[i]`, non-negative."""
    tensor_mean: float
    """Mean over the whole tensor that the piece is cut from."""
    mean: float
    """Mean over all merged weights."""
    l2: float
    """L2 norm over all merged weights."""
