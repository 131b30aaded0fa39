"""Merges by curvature, against dense float64 references: trimmed Fisher, RegMean, Kronecker."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fishertool.merging import fisher as fisher_method
from fishertool.merging.fisher import fisher
from fishertool.merging.method import Fisher, make_passes


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def diagonal(values: Tensor) -> Fisher:
    """One tensor that is the whole model."""
    mean = float(values.double().mean())
    return Fisher(values, mean, mean, float(values.double().square().sum().sqrt()))


def find_limits(
    models: Sequence[Tensor], base: Tensor | None, fishers: Sequence[Fisher], trim: float
) -> list[float] | None:
    """What `whole` finds of a tensor that comes in pieces of two rows."""

    def pieces() -> list[tuple[list[Tensor], Tensor | None, list[Fisher]]]:
        return [
            (
                [model[start : start + 2] for model in models],
                None if base is None else base[start : start + 2],
                [one._replace(values=one.values[start : start + 2]) for one in fishers],
            )
            for start in range(0, len(models[0]), 2)
        ]

    passes = fisher_method.whole([1.0] * len(models), models[0].numel(), trim=trim)
    return make_passes(passes, pieces)


def trimmed_by_sorting(
    models: Sequence[Tensor], base: Tensor, fishers: Sequence[Fisher], kept: int
) -> list[Tensor]:
    """Each model with the base's weights but for its `kept` most salient."""
    found = []
    for model, one in zip(models, fishers, strict=True):
        saliency = (one.values.double() * (model - base).double().square()).flatten()
        best = saliency.argsort(descending=True)[:kept]
        flat = base.clone().flatten()
        flat[best] = model.flatten()[best]
        found.append(flat.reshape(model.shape))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1,), (2,), (63,), (64,), (7, 9)], ids=str)
@pytest.mark.parametrize("trim", [0.0, 0.1, 0.5, 0.9])
def test_fisher_trims_all_but_the_most_salient(
    trim: float, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    # Of a size whose saliencies are below the least float32.
    models = [1e-10 * random(*shape, seed=n, dtype=dtype) for n in range(3)]
    base = 1e-10 * random(*shape, seed=9, dtype=dtype)
    fishers = [diagonal(1e-28 * random(*shape, seed=20 + n, dtype=dtype) ** 4) for n in range(3)]
    limits = find_limits(models, base, fishers, trim)
    weights = (0.2, 0.3, 0.5)
    found = fisher(models, weights, fishers, base, limits, trim=trim, anchor=0.1)
    changed = trimmed_by_sorting(models, base, fishers, round(trim * base.numel()))
    wanted = fisher(changed, weights, fishers, base, anchor=0.1)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-15)
    if trim == 0.0:
        torch.testing.assert_close(found, base, rtol=1e-5, atol=1e-15)


def test_fisher_keeps_all_weights_of_equal_saliency() -> None:
    model, base = torch.ones(6), torch.zeros(6)
    one = diagonal(torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 4.0]))
    limits = find_limits([model], base, [one], 0.5)
    assert limits == [1.0]
    found = fisher([model], [1.0], [one], base, limits, trim=0.5, anchor=0.0)
    assert found.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_fisher_that_keeps_all_makes_no_pass() -> None:
    passes = fisher_method.whole([0.5, 0.5], 10)
    with pytest.raises(StopIteration) as end:
        next(passes)
    assert end.value.value is None


@pytest.mark.parametrize("lambda_", [0.0, 0.4, 1.0, 1.7])
@pytest.mark.parametrize("anchor", [0.0, 0.3])
def test_fisher_lambda_scales_the_average_of_task_vectors(lambda_: float, anchor: float) -> None:
    models, base = [random(7, 9, seed=n) for n in range(2)], random(7, 9, seed=5)
    fishers = [diagonal(random(7, 9, seed=20 + n) ** 4) for n in range(2)]
    found = fisher(models, (0.3, 0.7), fishers, base, lambda_=lambda_, anchor=anchor)
    amounts = [c * one.values / one.mean for c, one in zip((0.3, 0.7), fishers, strict=True)]
    above = sum(amount * (model - base) for amount, model in zip(amounts, models, strict=True))
    torch.testing.assert_close(found, base + lambda_ * above / (sum(amounts) + anchor))


@pytest.mark.parametrize("changed", [{"trim": 0.5}, {"lambda_": 0.5}], ids=str)
def test_fisher_has_no_task_vectors_without_a_base(changed: dict[str, float]) -> None:
    models, fishers = [random(3, seed=n) for n in range(2)], [diagonal(torch.ones(3))] * 2
    with pytest.raises(ValueError, match="needs a base"):
        fisher(models, (0.5, 0.5), fishers, **changed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="trim needs a base"):
        find_limits(models, None, fishers, 0.5)


def test_fisher_trim_is_a_fraction() -> None:
    with pytest.raises(ValueError, match=r"trim: 1\.5 is not a fraction"):
        next(fisher_method.whole([1.0], 3, trim=1.5))
