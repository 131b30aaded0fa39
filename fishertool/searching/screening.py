"""Screening: of a pool of candidates, those the surrogate knows least about."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from botorch.models.model_list_gp_regression import ModelListGP


def fisher_information(model: "ModelListGP", candidates: Tensor) -> Tensor:
    """What the surrogate already knows about each candidate: FI(x) = sum_k 1 / sigma_k^2(x).

    sigma_k^2 is the posterior variance of objective k, without the noise of an evaluation: a
    Gaussian of that variance has this Fisher information of its mean. It says nothing about the
    Fisher information of a model's weights.

    candidates [candidate, dimension] -> [candidate]. MM-MO (Li et al. 2024, arXiv 2407.00487).
    """
    with torch.no_grad():
        variance: Tensor = model.posterior(candidates).variance
    return variance.reciprocal().sum(-1)
