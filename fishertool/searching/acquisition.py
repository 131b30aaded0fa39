"""The worth of a candidate: the expected gain in hypervolume, and where it is greatest."""

from collections.abc import Callable

import torch
from torch import Tensor

from fishertool.searching.pareto import strongest
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

SAMPLES = 32
BASELINE = 12
"""Evaluated points that may be on the front: the others are too far from it to matter."""
STARTS = 3
ITERATIONS = 30
NEAR = 1e-6
"""Points no farther apart than this in every coordinate are the same point."""


def expected_gain(
    model: ModelListGP,
    points: Tensor,
    values: Tensor,
    pending: Tensor,
    reference: Tensor,
    seed: int,
) -> AcquisitionFunction:
    """qLogNEHVI, given that the pending points will be evaluated too; qLogNEI for one objective.

    Daulton, Balandat and Bakshy 2021 (arXiv 2105.08195); Ament et al. 2023 (arXiv 2310.20708).
    """
    sampler = SobolQMCNormalSampler(torch.Size([SAMPLES]), seed=seed)
    waiting = pending if len(pending) else None
    best = points[strongest(values, BASELINE)]
    with quiet():
        if values.shape[1] == 1:
            return qLogNoisyExpectedImprovement(
                model, best, sampler, X_pending=waiting, prune_baseline=False
            )
        return logei.qLogNoisyExpectedHypervolumeImprovement(
            model, reference, best, sampler, X_pending=waiting
        )


def worth(acquisition: AcquisitionFunction, candidates: Tensor, taken: Tensor) -> Tensor:
    """The acquisition's value of each candidate by itself; minus infinity if taken already."""
    with quiet(), torch.no_grad():
        values: Tensor = acquisition(candidates[:, None])
    return torch.where(are_new(candidates, taken), values, -torch.inf)


def are_new(candidates: Tensor, taken: Tensor) -> Tensor:
    """Which of the candidates are none of those taken: [candidate]."""
    return ((candidates[:, None] - taken).abs() > NEAR).any(-1).all(-1)


def maximum(
    acquisition: AcquisitionFunction,
    drawn: Tensor,
    taken: Tensor,
    snap: Callable[[Tensor], Tensor] = lambda points: points,
) -> Tensor:
    """The best new point that climbing from the best of those drawn finds: [1, dimension].

    `snap` moves points [point, dimension] to those nearest to them that there are.
    """
    starts = drawn[worth(acquisition, drawn, taken).argsort(descending=True, stable=True)[:STARTS]]
    with quiet():
        ends, _ = gen_candidates_scipy(
            starts[:, None], acquisition, 0.0, 1.0, options={"maxiter": ITERATIONS}
        )
    offered = torch.cat([snap(ends[:, 0].detach()), starts])
    return offered[worth(acquisition, offered, taken).argmax()][None]
