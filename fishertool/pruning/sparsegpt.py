import torch
from torch import Tensor

from fishertool.pruning.parts.columnwise import inverse_factor


def sparsegpt(weight: Tensor, activations: Tensor, *, damping: float = 0.01) -> Tensor:
    """The error of the layer's output if a weight is zero and later columns make up for it.

        w_ij^2 / U_jj^2        H^-1 = U^T U,  H = 2 A + `damping` mean(diag(2 A)) I,  A = E[x x^T]

    U is upper triangular. These are the saliencies of the weights as they are; with
    `--compensate columnwise`, the default, later columns are judged as they have become.

    Shapes: weight [out, in], activations A [in, in]. Source: Frantar and Alistarh 2023,
    arXiv 2301.00774.
    """
    scale = inverse_factor(activations, damping).diagonal()
    return (weight.double() / scale).square().to(torch.float32)
