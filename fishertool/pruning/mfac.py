import torch
from torch import Tensor


def mfac(weight: Tensor, inverse_diagonal: Tensor) -> Tensor:
    """The saliency of OBS with F whole, over all pruned weights at once.

        w_i^2 / (2 [F^-1]_ii)        F = damping I + G^T G / m

    With far fewer gradients than weights, F^-1 is nearly I / damping and the mask nearly
    magnitude's; blocks of no more than m weights tell more.

    Shapes: weight, inverse_diagonal [out, in]. Source: Frantar et al. 2021, arXiv 2107.03356.
    """
    return (weight.double().square() / (2 * inverse_diagonal)).to(torch.float32)
