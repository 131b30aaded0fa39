"""Which weights stay, by saliency: the patterns and budgets, with exact counts."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fishertool.pruning.parts.ranking import largest, largest_of_each_row

Budget = Literal["tensor", "row", "global"]
BUDGETS: tuple[Budget, ...] = ("tensor", "row", "global")

FEW = 1 << 16
"""So many numbers are sorted faster than their digits are counted."""


@dataclass(frozen=True)
class Pattern:
    """Which weights of a matrix [out, in] stand or fall together.

    unstructured  each by itself
    n:m           of every m consecutive inputs of an output, n stay
    r x c         blocks of r outputs and c inputs
    """

    n: int = 0
    m: int = 0
    """Both 0 unless the pattern is n:m."""
    rows: int = 1
    columns: int = 1

    def __str__(self) -> str:
        if self.m:
            return f"{self.n}:{self.m}"
        return f"{self.rows}x{self.columns}" if self.rows * self.columns > 1 else "unstructured"

    def divides(self, shape: tuple[int, ...]) -> bool:
        """Whether a matrix falls into whole groups or blocks."""
        return shape[0] % self.rows == 0 and shape[1] % (self.m or self.columns) == 0


def parse_pattern(text: str) -> Pattern:
    """Raises ValueError for what is no pattern.

    >>> parse_pattern("2:4"), str(parse_pattern("1x4")), str(parse_pattern("unstructured"))
    (Pattern(n=2, m=4, rows=1, columns=1), '1x4', 'unstructured')
    """
    if text == "unstructured":
        return Pattern()
    if found := re.fullmatch(r"(\d+):(\d+)", text):
        n, m = int(found[1]), int(found[2])
        if 0 < n < m:
            return Pattern(n, m)
    if found := re.fullmatch(r"(\d+)x(\d+)", text):
        rows, columns = int(found[1]), int(found[2])
        if rows and columns and rows * columns > 1:
            return Pattern(rows=rows, columns=columns)
    raise ValueError(f"{text!r}: write unstructured, n:m with n below m such as 2:4, or 1x4")


def kept_of(size: int, sparsity: float) -> int:
    """How many of `size` stay: all but the whole number nearest to sparsity times size.

    >>> [kept_of(size, 0.5) for size in (1, 2, 63, 64)]
    [0, 1, 31, 32]
    """
    return size - int(sparsity * size + 0.5)


def kept_of_all(
    shapes: Iterable[tuple[int, int]], pattern: Pattern, sparsity: float, budget: Budget
) -> int:
    """How many weights of matrices [out, in] stay, by `choose` or `choose_globally`.

    >>> [kept_of_all([(2, 5), (2, 5)], Pattern(), 0.3, budget) for budget in BUDGETS]
    [14, 12, 14]
    """
    shapes = list(shapes)
    if pattern.m:
        return sum(rows * width // pattern.m * pattern.n for rows, width in shapes)
    units = [(rows // pattern.rows, width // pattern.columns) for rows, width in shapes]
    if budget == "row":
        kept = sum(rows * kept_of(width, sparsity) for rows, width in units)
    elif budget == "tensor":
        kept = sum(kept_of(rows * width, sparsity) for rows, width in units)
    else:
        kept = kept_of(sum(rows * width for rows, width in units), sparsity)
    return kept * pattern.rows * pattern.columns


def choose(
    saliency: Tensor, pattern: Pattern, sparsity: float, budget: Budget = "tensor"
) -> Tensor:
    """The mask of one matrix, True where kept, with the budget `tensor` or `row`.

    A block's saliency is the sum over its weights. Of n:m, `sparsity` and `budget` are given.
    Shapes: [out, in] -> [out, in].
    """
    if pattern.m:
        groups = saliency.reshape(len(saliency), -1, pattern.m)
        return largest_of_each_row(groups, pattern.n).reshape(saliency.shape)
    units = _units(saliency, pattern)
    if budget == "row":
        mask = largest_of_each_row(units, kept_of(units.shape[1], sparsity))
    else:
        mask = _largest_of_all(units, kept_of(units.numel(), sparsity))
    return _spread(mask, pattern)


def choose_globally(
    saliencies: Callable[[], Iterable[Tensor]], pattern: Pattern, sparsity: float
) -> Iterator[Tensor]:
    """The masks of many matrices that share one budget; not for n:m, which leaves nothing to share."""

    def units() -> Iterator[Tensor]:
        return (_units(saliency, pattern) for saliency in saliencies())

    size = sum(one.numel() for one in units())
    for mask in largest(units, kept_of(size, sparsity)):
        yield _spread(mask, pattern)


class ColumnChooser:
    """The mask of a matrix, some columns after others, with exact counts in the end.

    `alive` is True where no earlier step pruned: no weight comes back, though the share of some
    columns in the budget may rise when it is rounded. For n:m, and for weights that stand by
    themselves.
    """

    def __init__(self, alive: Tensor, pattern: Pattern, sparsity: float, budget: Budget):
        self._pattern, self._sparsity, self._budget = pattern, sparsity, budget
        self._kept = alive.clone()
        """Of the columns to come, those that may be."""

    def __call__(self, saliency: Tensor, start: int) -> Tensor:
        """The mask of the columns from `start` on, which follow on those of the last call.

        Shapes: [out, columns] -> [out, columns].
        """
        columns = slice(start, start + saliency.shape[1])
        saliency = saliency.masked_fill(~self._kept[:, columns], float("-inf"))
        if self._pattern.m:
            mask = choose(saliency, self._pattern, self._sparsity)
        elif self._budget == "row":
            mask = largest_of_each_row(saliency, self._counts(self._kept, 1, columns))
        else:
            rows = len(saliency)
            together = self._kept.sum(0, keepdim=True)
            mask = _largest_of_all(saliency, int(self._counts(together, rows, columns)))
        self._kept[:, columns] = mask
        return mask

    def _counts(self, kept: Tensor, rows: int, columns: slice) -> Tensor:
        """How many stay of some columns of `rows` rows: [budget, column] -> [budget, 1]."""
        before, here, later = (
            part.sum(1, keepdim=True)
            for part in kept.tensor_split([columns.start, columns.stop], 1)
        )
        share = kept_of(rows * columns.stop, self._sparsity) - before
        least = kept_of(rows * kept.shape[1], self._sparsity) - before - later
        return share.maximum(least).clamp(min=0).minimum(here)


def overlap(mask: Tensor, other: Tensor) -> tuple[int, int]:
    """How many weights both masks keep, and how many the first one does."""
    return int((mask & other).sum()), int(mask.sum())


def pack(mask: Tensor) -> Tensor:
    """A mask in bits, eight in a byte, the first the lowest; [weight] -> [ceil(weight / 8)], uint8.

    >>> pack(torch.tensor([True, False, True, True, False, False, False, False, True]))
    tensor([13,  1], dtype=torch.uint8)
    """
    bits = mask.flatten().to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).reshape(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _largest_of_all(values: Tensor, count: int) -> Tensor:
    if values.numel() <= FEW:
        return largest_of_each_row(values.flatten(), count).reshape(values.shape)
    [mask] = largest(lambda: [values], count)
    return mask


def _units(saliency: Tensor, pattern: Pattern) -> Tensor:
    """What is chosen among: weights, or blocks."""
    rows, columns = pattern.rows, pattern.columns
    if rows * columns == 1:
        return saliency
    out, width = saliency.shape
    return saliency.reshape(out // rows, rows, width // columns, columns).sum((1, 3))


def _spread(mask: Tensor, pattern: Pattern) -> Tensor:
    rows, columns = pattern.rows, pattern.columns
    if rows * columns == 1:
        return mask
    return mask.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
