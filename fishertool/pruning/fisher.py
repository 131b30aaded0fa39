import torch
from torch import Tensor

from fishertool.pruning.method import Fisher


def fisher(weight: Tensor, fisher: Fisher) -> Tensor:
    """The rise of the loss to second order if a weight is zero: Optimal Brain Damage.

        1/2 w^2 F_ii / mean(F)

    The mean is over all pruned weights, and only keeps the numbers within float32.

    Shapes: weight and F [out, in]. Source: LeCun et al. 1990 (NIPS 2), with the Fisher for the
    Hessian.
    """
    if not fisher.mean > 0:
        raise ValueError("the Fisher is zero everywhere")
    squares = weight.double().square() / 2
    return (squares * fisher.values.double() / fisher.mean).to(torch.float32)
