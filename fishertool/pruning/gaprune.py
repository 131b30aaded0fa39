from typing import Literal

import torch
from torch import Tensor

from fishertool.pruning.method import Fisher


def gaprune(
    weight: Tensor,
    fisher: Fisher,
    general: Fisher,
    gradient: Tensor,
    general_gradient: Tensor,
    magnitude: float,
    *,
    beta: float = 1.0,
    alpha: float = 0.2,
    gamma: float = 0.5,
    dai_form: Literal["paper", "normalized"] = "paper",
) -> Tensor:
    """Domain Alignment Importance: what a domain needs beyond what general data need.

        [(F_dom - `beta` F_gen) abs(w) + `gamma` sqrt(abs(w))] (1 + `alpha` s)

    s is the cosine of the matrix's mean gradients on the two sets. `dai_form` `paper` takes the
    terms as they are, where the Fishers, many orders of magnitude smaller than weights, hardly
    count; `normalized` divides each Fisher and abs(w) by its mean over all pruned weights. Then
    what general data need more than the domain goes first, whatever the domain loses by it: of a
    domain that is near to the general data `beta` must be near zero.

    Shapes: all [out, in] but `magnitude`. Source: GAPrune, Tang and Yang 2025, arXiv 2509.10844.
    """
    size = weight.double().abs()
    domain, other = fisher.values.double(), general.values.double()
    if dai_form == "normalized":
        if not (fisher.mean > 0 and general.mean > 0 and magnitude > 0):
            raise ValueError("a Fisher, or every weight, is zero everywhere")
        size, domain, other = size / magnitude, domain / fisher.mean, other / general.mean
    a, b = gradient.double().flatten(), general_gradient.double().flatten()
    norms = float(a.norm() * b.norm())
    cosine = float(a @ b) / norms if norms else 0.0
    saliency = ((domain - beta * other) * size + gamma * size.sqrt()) * (1 + alpha * cosine)
    return saliency.to(torch.float32)
