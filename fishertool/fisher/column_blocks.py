"""The Fisher of a linear layer's columns, one block for all of them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fishertool.fisher.diagonal import wide
from fishertool.fisher.gradients import Gradient, OuterProducts, Whole
from fishertool.fisher.sums import Groups, Sums


class ColumnBlocks:
    """Sums over examples of G G^T, G [out, in] the gradient of log p by a linear layer's weight.

    G G^T is the sum over inputs i of g_i g_i^T, so its mean over examples is that of the Fisher's
    diagonal blocks of the columns of W, times their number: exact, cross terms of tokens and all.

    sums  weight name -> [out, out], float64

    weights  by name, [out, in], or [in, out] if they are `turned`
    """

    def __init__(self, weights: Mapping[str, Tensor], turned: bool = False):
        self._turned = turned
        self.sums: Sums = {}
        for name, weight in weights.items():
            side = weight.shape[1 if turned else 0]
            self.sums[name] = torch.zeros(side, side, dtype=torch.float64, device=weight.device)
        self.groups: Groups = {"column blocks": self.sums}

    def begin(self, examples: Sequence[int]) -> None:
        """Nothing is kept from batch to batch."""

    def add(self, name: str, gradients: Sequence[Gradient]) -> None:
        self.sums[name] += column_blocks(gradients, self._turned)


def column_blocks(gradients: Sequence[Gradient], turned: bool) -> Tensor:
    """The sum over examples of G G^T, [out, out]: through the tokens, as D^T (X X^T D), where
    gradients are sums of outer products."""
    outer = [part for part in gradients if isinstance(part, OuterProducts)]
    if len(outer) == len(gradients):
        x = torch.cat([wide(one.left if one.transposed else one.right) for one in outer], 1)
        delta = torch.cat([wide(one.right if one.transposed else one.left) for one in outer], 1)
        return delta.flatten(0, 1).T @ (x @ x.mT @ delta).flatten(0, 1)
    whole = torch.stack([_gradients(part) for part in gradients]).sum(0)
    upright = whole.mT if turned else whole
    return (upright @ upright.mT).sum(0)


def _gradients(part: Gradient) -> Tensor:
    """[example, row, width]"""
    if isinstance(part, OuterProducts):
        return wide(part.left).mT @ wide(part.right)
    if isinstance(part, Whole):
        return wide(part.values)
    raise TypeError(f"{type(part).__name__} is no gradient of a linear layer's weight")
