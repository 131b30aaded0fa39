"""Values by rank without a sort, against the sort."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fishertool.merging.method import make_passes, per_model
from fishertool.merging.parts import threshold
from fishertool.merging.parts.threshold import kth_largest


def in_blocks(scores: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    return list(zip(*(torch.split(score, 300) for score in scores), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("elements", [1, 2, 63, 64, 5000])
@pytest.mark.parametrize("kind", ["spread", "ties", "zeros", "huge and tiny", "periodic"])
@pytest.mark.parametrize("sample", [threshold.SAMPLE, 30])
def test_kth_largest_is_what_sorting_finds(
    dtype: torch.dtype, elements: int, kind: str, sample: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(elements)
    scores = torch.randn(2, elements, generator=generator, dtype=dtype).abs()
    if kind == "ties":
        scores = scores.to(torch.bfloat16).to(dtype)
    elif kind == "zeros":
        scores[:, : (elements + 1) // 2] = 0
    elif kind == "huge and tiny":
        scores = scores.pow(40) * torch.finfo(dtype).tiny ** 0.5
    elif kind == "periodic":  # what a sample of this stride sees is far from the rest
        scores[:, :: elements // 30 | 1] += 1000
    ranks = [sorted({1, (elements + 1) // 2, elements}), [max(1, elements // 3)]]

    def pieces() -> list[tuple[Sequence[Tensor], None]]:
        return [(part.unbind(), None) for part in torch.split(scores, 1000, dim=1)]

    monkeypatch.setattr(threshold, "SAMPLE", sample)
    found = make_passes(
        kth_largest(lambda models, base: in_blocks(models), ranks, elements), pieces
    )
    for values, asked, score in zip(found, ranks, scores, strict=True):
        ordered = score.sort(descending=True).values
        assert values == [float(ordered[rank - 1]) for rank in asked]


@pytest.mark.parametrize("shape", [(3000, 40), (40, 3000)])
def test_a_sample_is_enough_to_gather_little(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the sizes of rows and columns; the result is exact all the same."""
    monkeypatch.setattr(threshold, "SAMPLE", 4000)
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(shape, generator=generator)
    scores *= torch.rand(shape[0], 1, generator=generator) * torch.rand(
        shape[1], generator=generator
    )
    passes = kth_largest(lambda models, base: [models], [[60_000]], 120_000)
    sample = passes.send(next(passes)([scores], None))
    [near] = sample([scores], None)
    with pytest.raises(StopIteration) as end:
        passes.send([near])
    assert end.value.value == [[float(scores.abs().flatten().kthvalue(60_001).values)]]
    assert near[0].counts.sum() < 0.1 * 120_000


def test_signs_do_not_count() -> None:
    scores = torch.tensor([-0.0, 0.0, -1.0])
    found = make_passes(
        kth_largest(lambda models, base: [models], [[1, 2, 3]], 3), lambda: [([scores], None)]
    )
    assert found == [[1.0, 0.0, 0.0]]


def test_a_pass_is_given_all_that_its_method_takes_of_a_piece() -> None:
    models, base, fishers = [torch.tensor([1.0, 4.0])], torch.zeros(2), [torch.tensor([9.0, 1.0])]
    scores = [(models, base, fishers)]
    found = make_passes(
        kth_largest(lambda models, base, fishers: [[models[0] * fishers[0] + base]], [[1]], 2),
        lambda: scores,
    )
    assert found == [[9.0]]


def test_a_setting_has_one_number_or_one_a_model() -> None:
    with pytest.raises(ValueError, match="2 numbers for 3 models"):
        per_model([0.1, 0.2], 3)
