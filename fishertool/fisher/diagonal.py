"""The diagonal: a running sum of squared per-example gradients, one number a weight."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fishertool.fisher.gradients import (
    Gradient,
    OuterProducts,
    ScatteredRows,
    Whole,
    examples_in,
    rows_of,
)

TILE_ELEMENTS = 1 << 20


class Diagonal:
    """Sums of squares by parameter name, in float64; `mean` divides by the number of examples."""

    def __init__(self, parameters: dict[str, Tensor]):
        self.sums = {
            name: torch.zeros(rows_of(parameter), dtype=torch.float64, device=parameter.device)
            for name, parameter in parameters.items()
        }
        self._shapes = {name: parameter.shape for name, parameter in parameters.items()}

    def add(self, name: str, gradients: Sequence[Gradient]) -> None:
        """Add every example's squared gradient: the square of the sum of its parts."""
        add_squares(self.sums[name], gradients)

    def mean(self, examples: int) -> dict[str, Tensor]:
        """float32, shaped as the parameters."""
        return {
            name: (total / examples).float().reshape(self._shapes[name])
            for name, total in self.sums.items()
        }


def add_squares(total: Tensor, parts: Sequence[Gradient]) -> None:
    """total += sum over examples of (sum of the parts of G_n) ** 2, elementwise.

    `total` is [row, width] in float64. Squares are formed and summed over the batch in float32
    (or the parts' own wider dtype), then added in float64.
    """
    if len(parts) == 1:
        [part] = parts
        if isinstance(part, Whole):
            total += _wide(part.values).square().sum(0)
            return
        if isinstance(part, ScatteredRows):
            _add_scattered(total, part)
            return
        if part.left.shape[1] == 1:
            left, right = _wide(part.left[:, 0]), _wide(part.right[:, 0])
            total += left.square().T @ right.square()
            return
    _add_tiles(total, parts)


def _add_tiles(total: Tensor, parts: Sequence[Gradient]) -> None:
    """One example's gradient at a time, in tiles of rows that stay in cache."""
    rows, width = total.shape
    step = min(rows, max(1, TILE_ELEMENTS // max(width, 1)))
    dtype = next((part.left.dtype for part in parts if isinstance(part, OuterProducts)), None)
    gradient = total.new_empty(step, width, dtype=dtype or torch.float32)
    squares = total.new_empty(step, width, dtype=torch.promote_types(gradient.dtype, torch.float32))
    for start in range(0, rows, step):
        count = min(step, rows - start)
        tile, sums = gradient[:count], squares[:count]
        for n in range(examples_in(parts[0])):
            for number, part in enumerate(parts):
                part.add_rows(tile, n, start, fresh=number == 0)
            wide = _wide(tile)
            if n == 0:
                torch.mul(wide, wide, out=sums)
            else:
                sums.addcmul_(wide, wide)
        total[start : start + count] += sums


def _add_scattered(total: Tensor, part: ScatteredRows) -> None:
    """Only the rows an example touches; equal ids are summed before squaring."""
    for ids, values in zip(part.ids, part.values, strict=True):
        touched, position = ids.unique(return_inverse=True)
        summed = values.new_zeros(len(touched), values.shape[-1], dtype=_wide(values[:0]).dtype)
        summed.index_add_(0, position, _wide(values))
        total.index_add_(0, touched, summed.square().double())


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
