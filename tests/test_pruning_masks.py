"""Exact counts for every pattern and budget, against sorting."""

import pytest
import torch
from torch import Tensor

from fishertool.pruning.parts.masks import (
    Budget,
    ColumnChooser,
    choose,
    choose_globally,
    kept_of,
    overlap,
    pack,
    parse_pattern,
)
from fishertool.pruning.parts.ranking import largest, largest_of_each_row

SHAPES = [(1, 1), (1, 2), (2, 1), (9, 7), (4, 16), (8, 8)]
SPARSITIES = [0.0, 0.1, 0.5, 0.7, 0.999, 1.0]
UNSTRUCTURED = parse_pattern("unstructured")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_sorting(values: Tensor, count: int) -> Tensor:
    """Python's sort is stable: of equal numbers, the first come first."""
    numbers = values.flatten().tolist()
    first = sorted(range(len(numbers)), key=lambda place: -numbers[place])[:count]
    mask = torch.zeros(len(numbers), dtype=torch.bool)
    mask[first] = True
    return mask.reshape(values.shape)


@pytest.mark.parametrize(
    "values",
    [
        draw(1000),
        draw(1000).round(),  # many are equal
        -draw(1000).abs() * 1e-30,
        torch.zeros(1000),
        torch.tensor([0.0, -0.0, 1.0, -1.0, 3e38, -3e38, 1e-45, -1e-45] * 125),
    ],
    ids=["normal", "ties", "negative", "zeros", "extremes"],
)
@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 500, 999, 1000])
def test_largest_agrees_with_sorting(values: Tensor, count: int) -> None:
    expected = by_sorting(values, count)
    for sizes in ([1000], [1, 62, 0, 437, 500]):
        parts = list(torch.split(values, sizes))
        masks = list(largest(parts.__iter__, count))
        assert [mask.shape for mask in masks] == [part.shape for part in parts]
        assert torch.equal(torch.cat(masks), expected)
    assert torch.equal(largest_of_each_row(values[None], count)[0], expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_counts_are_exact(shape: tuple[int, int], sparsity: float) -> None:
    saliency = draw(*shape)
    size = saliency.numel()
    mask = choose(saliency, UNSTRUCTURED, sparsity)
    assert int((~mask).sum()) == int(sparsity * size + 0.5)
    assert torch.equal(mask, by_sorting(saliency, kept_of(size, sparsity)))
    rows = choose(saliency, UNSTRUCTURED, sparsity, "row")
    assert set((~rows).sum(1).tolist()) == {int(sparsity * shape[1] + 0.5)}
    assert all(
        torch.equal(row, by_sorting(one, kept_of(shape[1], sparsity)))
        for row, one in zip(rows, saliency, strict=True)
    )


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_a_global_budget_is_of_all_matrices_together(sparsity: float) -> None:
    several = [draw(*shape, seed=n).round(decimals=1) for n, shape in enumerate(SHAPES)]
    masks = list(choose_globally(lambda: several, UNSTRUCTURED, sparsity))
    whole = torch.cat([one.flatten() for one in several])
    expected = by_sorting(whole, kept_of(len(whole), sparsity))
    assert torch.equal(torch.cat([mask.flatten() for mask in masks]), expected)


@pytest.mark.parametrize("text", ["1:2", "2:4", "1:4", "3:4", "4:8"])
@pytest.mark.parametrize("rows", [1, 2, 63])
@pytest.mark.parametrize("budget", ["tensor", "row"])
def test_every_group_of_m_keeps_its_n_largest(text: str, rows: int, budget: Budget) -> None:
    pattern = parse_pattern(text)
    saliency = draw(rows, 64).round(decimals=1)
    mask = choose(saliency, pattern, 1 - pattern.n / pattern.m, budget)
    for row in range(rows):
        for start in range(0, 64, pattern.m):
            here = saliency[row, start : start + pattern.m]
            expected = by_sorting(here, pattern.n)
            assert torch.equal(mask[row, start : start + pattern.m], expected)


@pytest.mark.parametrize("budget", ["tensor", "row"])
@pytest.mark.parametrize("mixed", [False, True])
def test_columns_after_one_another_keep_counts_and_bring_nothing_back(
    budget: Budget, mixed: bool
) -> None:
    """`mixed`: every other mask is chosen of all columns at once, as where an update is gated."""
    alive = torch.ones(5, 21, dtype=torch.bool)
    for step in range(1, 41):
        sparsity = 0.9 * step / 40
        saliency = draw(5, 21, seed=step).masked_fill(~alive, float("-inf"))
        if mixed and step % 2:
            mask = choose(saliency, UNSTRUCTURED, sparsity, budget)
        else:
            chooser = ColumnChooser(alive, UNSTRUCTURED, sparsity, budget)
            mask = torch.cat([chooser(saliency[:, s : s + 8], s) for s in range(0, 21, 8)], 1)
        assert not (mask & ~alive).any()
        if budget == "row":
            assert set(mask.sum(1).tolist()) == {kept_of(21, sparsity)}
        assert budget == "row" or int(mask.sum()) == kept_of(105, sparsity)
        alive = mask


def test_columns_choose_the_largest_of_each_chunk() -> None:
    alive, saliency = torch.ones(4, 16, dtype=torch.bool), draw(4, 16)
    for budget, rows in (("tensor", 1), ("row", 4)):
        chooser = ColumnChooser(alive, UNSTRUCTURED, 0.5, budget)  # type: ignore[arg-type]
        for start in (0, 8):
            here = saliency[:, start : start + 8]
            kept = [by_sorting(one, one.numel() // 2) for one in here.chunk(rows)]
            assert torch.equal(chooser(here, start), torch.cat(kept))


@pytest.mark.parametrize("text", ["1x4", "4x1", "2x8", "8x8"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7, 1.0])
def test_blocks_go_whole(text: str, sparsity: float) -> None:
    pattern = parse_pattern(text)
    saliency = draw(8, 64)
    sums = torch.stack([
        torch.stack([block.sum() for block in torch.split(strip, pattern.columns, 1)])
        for strip in torch.split(saliency, pattern.rows, 0)
    ])  # fmt: skip
    for budget, expected in (
        ("tensor", by_sorting(sums, kept_of(sums.numel(), sparsity))),
        ("row", largest_of_each_row(sums, kept_of(sums.shape[1], sparsity))),
    ):
        mask = choose(saliency, pattern, sparsity, budget)  # type: ignore[arg-type]
        for r, strip in enumerate(torch.split(mask, pattern.rows, 0)):
            for c, block in enumerate(torch.split(strip, pattern.columns, 1)):
                assert set(block.flatten().tolist()) == {bool(expected[r, c])}
    [whole] = choose_globally(lambda: [saliency], pattern, sparsity)
    assert torch.equal(whole, choose(saliency, pattern, sparsity))


@pytest.mark.parametrize("text", ["", "dense", "4:2", "0:4", "2:2", "0x4", "1x1", "2:4:8", "-1:4"])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write unstructured"):
        parse_pattern(text)


@pytest.mark.parametrize(
    ("text", "shape", "divides"),
    [
        ("unstructured", (7, 5), True),
        ("2:4", (7, 8), True),
        ("2:4", (8, 6), False),
        ("4x2", (8, 6), True),
        ("4x2", (6, 8), False),
    ],
)
def test_a_pattern_knows_what_it_divides(text: str, shape: tuple[int, int], divides: bool) -> None:
    assert parse_pattern(text).divides(shape) is divides


def test_overlap_and_bits() -> None:
    first, second = draw(9, 7) > 0, draw(9, 7, seed=1) > 0
    assert overlap(first, second) == (int((first & second).sum()), int(first.sum()))
    packed = pack(first)
    assert packed.shape == (8,)
    bits = [bool(byte >> place & 1) for byte in packed.tolist() for place in range(8)]
    assert bits == [*first.flatten().tolist(), False]
