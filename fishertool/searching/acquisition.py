"""The worth of a candidate: the expected gain in hypervolume, and where it is greatest."""

import torch
from torch import Tensor

from fishertool.searching.pareto import reference_of
from fishertool.searching.quiet import quiet

with quiet():
    from botorch.acquisition.acquisition import AcquisitionFunction
    from botorch.acquisition.logei import qLogNoisyExpectedImprovement
    from botorch.acquisition.multi_objective import logei
    from botorch.generation.gen import gen_candidates_scipy
    from botorch.models.model_list_gp_regression import ModelListGP
    from botorch.sampling.normal import SobolQMCNormalSampler

# BoTorch would compile a C++ kernel for this machine on first use: slow, and other last digits.
logei._load_attempted = True

SAMPLES = 64
STARTS = 4
ITERATIONS = 50
NEAR = 1e-6
"""Points no farther apart than this in every coordinate are the same point."""


def expected_gain(
    model: ModelListGP, points: Tensor, values: Tensor, pending: Tensor, seed: int
) -> AcquisitionFunction:
    """qLogNEHVI, given that the pending points will be evaluated too (Daulton, Balandat and Bakshy
    2021, arXiv 2105.08195; Ament et al. 2023, arXiv 2310.20708); qLogNEI for one objective.

    The reference point is `pareto.reference_of` the values.
    """
    sampler = SobolQMCNormalSampler(torch.Size([SAMPLES]), seed=seed)
    waiting = pending if len(pending) else None
    with quiet():
        if values.shape[1] == 1:
            return qLogNoisyExpectedImprovement(
                model, points, sampler, X_pending=waiting, prune_baseline=False
            )
        return logei.qLogNoisyExpectedHypervolumeImprovement(
            model, reference_of(values), points, sampler, X_pending=waiting
        )


def maximum(acquisition: AcquisitionFunction, drawn: Tensor, taken: Tensor) -> Tensor:
    """The best point found from the best of those drawn, other than those taken: [1, dimension]."""
    with quiet(), torch.no_grad():
        scores = acquisition(drawn[:, None])
    starts = drawn[scores.argsort(descending=True, stable=True)[:STARTS]]
    with quiet():
        ends, reached = gen_candidates_scipy(
            starts[:, None], acquisition, 0.0, 1.0, options={"maxiter": ITERATIONS}
        )
    offered = torch.cat([ends[:, 0].detach(), drawn])
    worth = torch.cat([reached.detach(), scores])
    new = ((offered[:, None] - taken).abs() > NEAR).any(-1).all(-1)
    return offered[torch.where(new, worth, -torch.inf).argmax()][None]
