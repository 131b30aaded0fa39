"""Values by rank without a sort, against the sort."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fishertool.merging.method import make_passes, per_model
from fishertool.merging.parts.threshold import kth_largest


def in_blocks(scores: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    return list(zip(*(torch.split(score, 300) for score in scores), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("elements", [1, 2, 63, 64, 5000])
@pytest.mark.parametrize("kind", ["spread", "ties", "zeros", "huge and tiny"])
def test_kth_largest_is_what_sorting_finds(dtype: torch.dtype, elements: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(elements)
    scores = torch.randn(2, elements, generator=generator, dtype=dtype).abs()
    if kind == "ties":
        scores = scores.to(torch.bfloat16).to(dtype)
    elif kind == "zeros":
        scores[:, : (elements + 1) // 2] = 0
    elif kind == "huge and tiny":
        scores = scores.pow(40) * torch.finfo(dtype).tiny ** 0.5
    ranks = [sorted({1, (elements + 1) // 2, elements}), [max(1, elements // 3)]]

    def pieces() -> list[tuple[Sequence[Tensor], None]]:
        return [(part.unbind(), None) for part in torch.split(scores, 1000, dim=1)]

    found = make_passes(kth_largest(lambda models, base: in_blocks(models), ranks), pieces)
    for values, asked, score in zip(found, ranks, scores, strict=True):
        ordered = score.sort(descending=True).values
        assert values == [float(ordered[rank - 1]) for rank in asked]


def test_signs_do_not_count() -> None:
    scores = torch.tensor([-0.0, 0.0, -1.0])
    found = make_passes(
        kth_largest(lambda models, base: [models], [[1, 2, 3]]), lambda: [([scores], None)]
    )
    assert found == [[1.0, 0.0, 0.0]]


def test_a_pass_is_given_all_that_its_method_takes_of_a_piece() -> None:
    models, base, fishers = [torch.tensor([1.0, 4.0])], torch.zeros(2), [torch.tensor([9.0, 1.0])]
    scores = [(models, base, fishers)]
    found = make_passes(
        kth_largest(lambda models, base, fishers: [[models[0] * fishers[0] + base]], [[1]]),
        lambda: scores,
    )
    assert found == [[9.0]]


def test_a_setting_has_one_number_or_one_a_model() -> None:
    with pytest.raises(ValueError, match="2 numbers for 3 models"):
        per_model([0.1, 0.2], 3)
