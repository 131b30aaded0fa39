"""What a pruning method is.

A pure function in a file of its own name, called once for every matrix:

    def name(weight, [fisher], [general], [gradient], [general_gradient], [inverse_diagonal],
             [inverse_blocks], [pruned], [gone], [activations], [generator], [magnitude], *,
             setting=default) -> Tensor

weight            W of a linear layer, [out, in], float32 or, stored so, float64
fisher            its diagonal Fisher, with the mean over all pruned weights
general           the same on general data, where `fisher` is on the domain's
gradient          its mean gradient, [out, in]
general_gradient  the same on general data
inverse_diagonal  diag(F^-1) of the rank-one Fisher, times its mean over all pruned weights,
                  [out, in]; weights that are gone are held, and infinite where F is zero
inverse_blocks    its blocks of the weights that are judged together, [out, in / group, group, group]
pruned            how many of each such group go
gone              True where an earlier step pruned, [out, in]
activations       second moment of the layer's input, E[x x^T], [in, in]
generator         a `torch.Generator`, seeded by the matrix's place among those that are pruned
magnitude         mean of abs(w) over all pruned weights

It returns the saliency, [out, in], finite: the larger, the more reason to keep a weight. Nothing is
written into the arguments. Raises ValueError for a statistic that is zero everywhere.
"""

from typing import NamedTuple

from torch import Tensor


class Fisher(NamedTuple):
    """A diagonal Fisher of one matrix, with what of the others a formula needs."""

    values: Tensor
    """[out, in], not negative."""
    mean: float
    """Over all pruned weights."""
