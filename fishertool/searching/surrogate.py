"""The surrogate of a search: a Gaussian process for each objective.

Shapes: points [point, dimension] in the unit cube, values [point, objective], both float64.
"""

import torch
from torch import Tensor

from fishertool.searching.quiet import quiet

with quiet():
    from botorch.exceptions.errors import ModelFittingError
    from botorch.fit import fit_gpytorch_mll
    from botorch.models.gp_regression import SingleTaskGP
    from botorch.models.model_list_gp_regression import ModelListGP
    from gpytorch.mlls.exact_marginal_log_likelihood import ExactMarginalLogLikelihood


def standardized(values: Tensor) -> Tensor:
    """Each objective with mean 0 and variance 1; 0 throughout where it is constant."""
    centred = values - values.mean(0)
    scale = centred.square().mean(0).sqrt()
    return centred / torch.where(scale > 1e-12 * values.abs().amax(0), scale, torch.inf)


def fit(points: Tensor, values: Tensor) -> ModelListGP:
    """Independent Gaussian processes of standardized values, one an objective.

    Squared-exponential kernel with a length scale a dimension and inferred noise, at the most
    probable hyperparameters under BoTorch's priors (Hvarfner, Hellsten and Nardi 2024, arXiv
    2402.02229). A constant objective, and one whose fit fails, keeps the prior's mode.
    """
    with quiet():
        return ModelListGP(*(_fit(points, column) for column in values.T[..., None]))


def _fit(points: Tensor, values: Tensor) -> SingleTaskGP:
    model = SingleTaskGP(points, values, outcome_transform=None)
    if not bool((values != values[0]).any()):
        return model.eval()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    try:  # one attempt: a second would draw its start from torch's global generator
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model), max_attempts=1)
    except ModelFittingError:
        model.load_state_dict(start)
    return model.eval()
