"""The surrogate of a search: a Gaussian process for each objective.

Shapes: points [point, dimension] in the unit cube, values [point, objective], both float64.
"""

from math import log

import torch
from torch import Tensor

from fishertool.searching.quiet import quiet

with quiet():
    from botorch.exceptions.errors import ModelFittingError
    from botorch.fit import fit_gpytorch_mll
    from botorch.models.gp_regression import SingleTaskGP
    from botorch.models.model_list_gp_regression import ModelListGP
    from gpytorch.constraints import GreaterThan
    from gpytorch.kernels import MaternKernel
    from gpytorch.likelihoods import GaussianLikelihood
    from gpytorch.mlls.exact_marginal_log_likelihood import ExactMarginalLogLikelihood
    from gpytorch.priors import LogNormalPrior

NOISE = (-8.0, 2.0)
"""Mean and deviation of the logarithm of the noise variance, of standardized values."""
LEAST_NOISE, FIRST_NOISE = 1e-6, 1e-3
LENGTH_DEVIATION = 1.0
"""Of the logarithm of a length scale."""
LEAST_LENGTH = 0.025


def standardized(values: Tensor) -> Tensor:
    """Each objective with mean 0 and variance 1; 0 throughout where it is constant."""
    centred = values - values.mean(0)
    scale = centred.square().mean(0).sqrt()
    return centred / torch.where(scale > 1e-12 * values.abs().amax(0), scale, torch.inf)


def fit(points: Tensor, values: Tensor) -> ModelListGP:
    """Independent Gaussian processes of standardized values, one an objective.

    Matern 5/2 kernel with a length scale a dimension and inferred noise, at the most probable
    hyperparameters. The logarithm of a length scale has mean sqrt(2) + log(dimensions) / 2, as in
    Hvarfner, Hellsten and Nardi 2024 (arXiv 2402.02229), and deviation 1; with their sqrt(3) a
    scale is most likely a twentieth of its median, and every one of ten points would be its own
    hill. The noise has a wide prior: an objective may be exact or vary by a tenth of its range,
    and taking small effects for noise hides the coordinates that matter less. All are sought by
    their logarithms: beside the gradient of a small noise itself, length scales would stay where
    they begin. A constant objective, and one whose fit fails, keeps where the fit begins.
    """
    with quiet():
        return ModelListGP(*(_fit(points, column) for column in values.T[..., None]))


def _fit(points: Tensor, values: Tensor) -> SingleTaskGP:
    noise = GaussianLikelihood(
        noise_prior=LogNormalPrior(*NOISE),
        noise_constraint=GreaterThan(LEAST_NOISE, torch.exp, torch.log, FIRST_NOISE),
    )
    dimensions = points.shape[1]
    lengths = LogNormalPrior(2**0.5 + log(dimensions) / 2, LENGTH_DEVIATION)
    kernel = MaternKernel(
        2.5,
        ard_num_dims=dimensions,
        lengthscale_prior=lengths,
        lengthscale_constraint=GreaterThan(LEAST_LENGTH, torch.exp, torch.log, lengths.mode),
    )
    model = SingleTaskGP(points, values, None, noise, kernel, outcome_transform=None)
    if not bool((values != values[0]).any()):
        return model.eval()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    try:  # one attempt: a second would draw its start from torch's global generator
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model), max_attempts=1)
    except ModelFittingError:
        model.load_state_dict(start)
    return model.eval()
