import functools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fishertool.merging.linear import linear
from fishertool.merging.method import Kronecker, refuse_negative
from fishertool.merging.parts.solve import conjugate_gradients, inverse_of_damped

LEAST_DAMPING = 1e-12
"""Of the preconditioner, which must be invertible where the equations need not be."""


def kronecker(
    models: Sequence[Tensor],
    weights: Sequence[float],
    kroneckers: Sequence[Kronecker],
    *,
    normalization: Literal["mean", "l2", "none"] = "mean",
    damping: float = 1.0,
    iterations: int = 30,
    tolerance: float = 1e-4,
) -> Tensor:
    """Average weighted by every model's Kronecker-factored Fisher, by conjugate gradients.

        sum_i c_i B_i W A_i + d W = sum_i c_i B_i W_i A_i + d M,   M = sum_i c_i W_i / sum_i c_i

    A_i, B_i  second moments of a layer's inputs and of its outputs' gradients
    c_i       the weights, over the model's whole Fisher in one number: its mean, its L2 norm, or
              1 (`normalization`)
    d         `damping` times the mean diagonal of sum_i c_i B_i kron A_i. Directions in which no
              model has curvature are those of the weighted average M. Factors from a few hundred
              examples say little of most directions: with `damping` 0.001 a small language model
              came out worse than the average, with 1 better.

    Begins at M and ends after `iterations`, or where the residual is `tolerance` of what it was.
    Steps are preconditioned by the Kronecker product of the average factors: ten do more than
    a hundred plain ones where the factors' eigenvalues fall as powers of their rank. Products are in
    the models' dtype, sums in float64.

    Shapes: models and result [out, in]. Raises ZeroDivisionError where the weights sum to zero,
    ValueError for a weight, damping, iterations or tolerance below zero. Source: Tam, Bansal and
    Raffel 2023, arXiv 2312.04339 (MaTS).
    """
    refuse_negative(weight=weights, damping=damping, iterations=iterations, tolerance=tolerance)
    average = linear([model.double() for model in models], weights)
    scales = [{"mean": one.mean, "l2": one.l2, "none": 1.0}[normalization] for one in kroneckers]
    units = [_mean_diagonals(one) for one in kroneckers]
    shares = [c / s * a * b for c, s, (a, b) in zip(weights, scales, units, strict=True)]
    if sum(shares) <= 0:
        return average.to(models[0].dtype)
    # Scaled so that neither factors nor products leave the range of float32.
    terms = []
    inputs = average.new_zeros(average.shape[1], average.shape[1])
    outputs = average.new_zeros(average.shape[0], average.shape[0])
    right = torch.zeros_like(models[0])
    for model, one, (a, b), share in zip(models, kroneckers, units, shares, strict=True):
        if not share:
            continue
        activation = one.activation.double() / a
        gradient = one.gradient.double() * (share / sum(shares) / b)
        inputs.add_(activation, alpha=share / sum(shares))
        outputs.add_(gradient)
        term = gradient.to(model.dtype), activation.to(model.dtype)
        right.add_(_between(*term, (model.double() - average).to(model.dtype)))
        terms.append(term)
    root = max(damping, LEAST_DAMPING) ** 0.5
    inverses = [inverse_of_damped(one, root).to(right.dtype) for one in (outputs, inputs)]

    def multiply(values: Tensor) -> Tensor:
        result = values * damping
        for term in terms:
            result.add_(_between(*term, values))
        return result

    found = conjugate_gradients(
        multiply, functools.partial(_between, *inverses), right, iterations, tolerance
    )
    return average.add_(found).to(models[0].dtype)


def _between(outputs: Tensor, inputs: Tensor, values: Tensor) -> Tensor:
    return outputs @ values @ inputs


def _mean_diagonals(one: Kronecker) -> tuple[float, float]:
    activation, gradient = (factor.diagonal().double().mean() for factor in one[:2])
    return float(activation), float(gradient)
