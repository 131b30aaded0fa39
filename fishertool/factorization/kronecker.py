import torch
from torch import Tensor

from fishertool.factorization.method import Decomposition
from fishertool.factorization.parts.gram import Weighting, decompose


def kronecker(
    weight: Tensor, inputs: Tensor, gradients: Tensor, *, damping: float = 1e-3
) -> Decomposition:
    """The least change of the loss to second order, by the Kronecker-factored Fisher.

        min norm(B^(1/2) (W - left @ right) A^(1/2))^2

    A and B with `damping` times their mean diagonal entry added to the diagonal.

    Shapes: weight [out, in], inputs A [in, in], gradients B [out, out]. Raises ValueError for a
    factor that is zero everywhere. Sources: Martens and Grosse 2015, arXiv 1503.05671; GFWSVD,
    arXiv 2505.17974.
    """
    return decompose(
        weight, Weighting(_damped(gradients, damping)), Weighting(_damped(inputs, damping))
    )


def _damped(moment: Tensor, damping: float) -> Tensor:
    wide = moment.double()
    added = damping * wide.diagonal().mean()
    return wide + added * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
