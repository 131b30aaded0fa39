"""nearswap, arcee-fusion and passthrough against loops over numbers."""

import math

import pytest
import torch
from merge_driver import PACKAGE, merge, random

from fishertool.registry import find_method

FLOAT64 = torch.float64


@pytest.mark.parametrize("t", [0.0, 0.1, 5.0])
def test_nearswap_is_its_formula(t: float) -> None:
    first, second = (random(6, 7, seed=n, dtype=FLOAT64) for n in (1, 2))
    second[0] = first[0]
    exact = torch.empty_like(first)
    for row in range(6):
        for column in range(7):
            a, b = float(first[row, column]), float(second[row, column])
            share = min(1.0, t / abs(b - a)) if b != a else 1.0
            exact[row, column] = share * b + (1 - share) * a
    merged = merge("nearswap", [first, second], [0.5, 0.5], t=t)
    torch.testing.assert_close(merged, exact, rtol=1e-12, atol=1e-12)


def divergence(p_of: list[float], q_of: list[float]) -> float:
    """KL of two softmaxes."""
    p_sum, q_sum = (math.fsum(map(math.exp, values)) for values in (p_of, q_of))
    return math.fsum(
        math.exp(a) / p_sum * ((a - math.log(p_sum)) - (b - math.log(q_sum)))
        for a, b in zip(p_of, q_of, strict=True)
    )


@pytest.mark.parametrize("shape", [(9, 8), (30,), (3, 4, 5), (1, 1), (2,)], ids=str)
@pytest.mark.parametrize("rows", [None, 2])
def test_arcee_fusion_takes_what_is_above_the_threshold(
    shape: tuple[int, ...], rows: int | None
) -> None:
    first = random(*shape, seed=1, dtype=FLOAT64)
    second = first + random(*shape, seed=2, dtype=FLOAT64).pow(3)
    scores = []
    wide = shape[-1] if len(shape) > 1 else 1
    for a, b in zip(first.view(-1, wide).tolist(), second.view(-1, wide).tolist(), strict=True):
        factor = divergence(b, a) if len(shape) > 1 else 1.0
        scores += [abs(y - x) * factor for x, y in zip(a, b, strict=True)]
    ordered = sorted(scores)
    low, median, high = (ordered[int(share * (len(scores) - 1))] for share in (0.25, 0.5, 0.75))
    least = median + 1.5 * (high - low)
    taken = torch.tensor([score >= least for score in scores]).view(shape)
    merged = merge("arcee-fusion", [first, second], [0.5, 0.5], rows=rows)
    if shape != (1, 1):  # the divergence of one entry is 0, and rounding
        assert torch.equal(merged, torch.where(taken, second, first))
    if first.numel() > 20:
        assert 0 < int(taken.sum()) < first.numel() / 2


@pytest.mark.parametrize("spread", [1e-2, 1e-4])
def test_the_divergence_of_near_models_is_not_rounding(spread: float) -> None:
    """In float32 the same weights are taken as in float64, which the usual formula misses by far."""
    first = random(200, 300, seed=1)
    second = first + spread * random(200, 300, seed=2)
    merged = merge("arcee-fusion", [first, second], [0.5, 0.5])
    exact = merge("arcee-fusion", [first.double(), second.double()], [0.5, 0.5])
    assert float((merged != exact.float()).double().mean()) < 1e-3


def test_passthrough_scales() -> None:
    model = random(5, 6, seed=1)
    assert torch.equal(merge("passthrough", [model], [1.0]), model)
    assert torch.equal(merge("passthrough", [model], [1.0], scale=-0.5), -0.5 * model)


@pytest.mark.parametrize(
    ("name", "count"),
    [("slerp", 2), ("nuslerp", 2), ("nearswap", 2), ("arcee-fusion", 2), ("passthrough", 1),
     ("linear", None), ("ties", None)],
)  # fmt: skip
def test_the_number_of_models_is_in_the_signature(name: str, count: int | None) -> None:
    assert find_method(PACKAGE, name).models == count
