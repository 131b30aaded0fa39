"""How the units that stay make up for the others: a factor each, or least squares to the output.

A layer y = W x loses the inputs of the units that are left out. With X = E[x x^T / |y|^2] over the
calibration tokens of the dense model, what it then outputs is as near as can be to what it did, in
the mean square over tokens of the error relative to y. Not weighted so, the few tokens whose outputs
are many times as long as the others' would decide, of which the norm behind them leaves no more than
of the others. A ridge pulls towards no change, of so many times the mean of the diagonal.
"""

import torch
from torch import Tensor

from fishertool.pruning.parts.units import complement, features_of

DAMPING = 0.02
"""By ten thousand tokens a MiniLM embedder kept more with it than with 0.001."""
MASK_DAMPING = 1.0
"""There are fewer examples than units: 70 of them at 0.1 fitted their noise in a MiniLM embedder."""


def mask_scales(moments: Tensor, kept: Tensor, damping: float = MASK_DAMPING) -> Tensor:
    """One factor a unit that stays: the mask, no longer of ones and zeros, that loses least.

        minimise 1/2 z^T F z over z_K, with z = m - 1 and z = -1 elsewhere:  m_K = 1 + F_KK^-1 F_KQ 1

    Shapes: moments F [unit, unit], the mean of u u^T, u an example's gradient of the mask; kept
    [count]; the result [count], float64. Source: mask tuning of Kwon et al. 2022, arXiv 2204.09656,
    section 4.4, by the loss to second order in place of the layer's output.
    """
    fisher = moments.double()
    lost = fisher[kept][:, complement(kept, len(fisher))].sum(1, keepdim=True)
    return 1 + _solved(fisher[kept][:, kept], lost, damping).squeeze(1)


def refitted(
    weight: Tensor, inputs: Tensor, kept: Tensor, features: int, damping: float = DAMPING
) -> Tensor:
    """The weight of the inputs that stay, all of it free: W_K + W_Q X_QK (X_KK + ridge)^-1.

    It minimises E |W' x_K - W x|^2 / |y|^2, the joint optimum of optimal brain surgery for the layer's
    output. Shapes: weight [out, in], inputs X [in, in]; the result [out, count * features].
    """
    weight, inputs = weight.double(), inputs.double()
    stay = features_of(kept, features)
    gone = complement(stay, len(inputs))
    lost = inputs[stay][:, gone] @ weight[:, gone].T
    return weight[:, stay] + _solved(inputs[stay][:, stay], lost, damping).T


def _solved(matrix: Tensor, right: Tensor, damping: float) -> Tensor:
    """(matrix + ridge)^-1 right; zero where there was never any input or gradient."""
    ridge = damping * float(matrix.diagonal().mean())
    if ridge == 0:
        return torch.zeros_like(right)
    damped = matrix + ridge * torch.eye(len(matrix), dtype=matrix.dtype)
    return torch.cholesky_solve(right, torch.linalg.cholesky(damped))
