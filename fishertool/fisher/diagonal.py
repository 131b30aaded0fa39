"""The diagonal: a running sum of squared per-example gradients, one number a weight."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fishertool.fisher.gradients import (
    Gradient,
    OuterProducts,
    ScatteredRows,
    Whole,
    dtype_of,
    examples_in,
    local,
    rows_of,
)
from fishertool.fisher.moments import TraceMoments
from fishertool.fisher.sums import Complete, Computed, Groups, all_here

TILE_ELEMENTS = 1 << 20


class Diagonal:
    """Sums of squares by parameter name, in float64; `mean` divides by the number of examples.

    `traces` knows how much each tensor's sum varies from example to example. The sums lie where
    their parameter does, or on `device`; of a sharded parameter, they are those of its shard.
    """

    def __init__(self, parameters: Mapping[str, Tensor], device: str | None = None):
        here = {name: local(parameter) for name, parameter in parameters.items()}
        self.sums = {
            name: torch.zeros(rows_of(part), dtype=torch.float64, device=device or part.device)
            for name, part in here.items()
        }
        self.traces = TraceMoments(here)
        self.groups: Groups = {"diagonal": self.sums, **self.traces.groups}
        self._shapes = {name: parameter.shape for name, parameter in parameters.items()}

    def begin(self, examples: Sequence[int]) -> None:
        self.traces.begin(len(examples))

    def add(self, name: str, gradients: Sequence[Gradient]) -> None:
        """Add every example's squared gradient: the square of the sum of its parts."""
        add_squares(self.sums[name], gradients, self.traces.of_batch(name))

    def mean(self, examples: int, complete: Complete = all_here) -> Mapping[str, Tensor]:
        """float32, shaped as the parameters; each is computed when it is asked for."""

        def of(name: str) -> Tensor:
            total = complete(name, self.sums[name])
            mean = torch.empty_like(total, dtype=torch.float32)
            step = tile_rows(*total.shape)
            for start in range(0, len(total), step):  # no float64 copy of an embedding
                mean[start : start + step] = total[start : start + step] / examples
            return mean.reshape(self._shapes[name])

        return Computed(self.sums, of)


def add_squares(total: Tensor, parts: Sequence[Gradient], norms: Tensor) -> None:
    """total += sum over examples of (sum of the parts of G_n) ** 2, elementwise; norms_n += |G_n|^2.

    `total` is [row, width] and `norms` [example], both in float64. Squares are formed and summed
    over the batch in float32 (or the parts' own wider dtype), then added in float64, on the device
    of `total`.
    """
    if len(parts) == 1:
        [part] = parts
        if isinstance(part, Whole):
            squares = wide(part.values).square()
            norms += squares.sum((1, 2))
            total += squares.sum(0).to(total.device)
            return
        if isinstance(part, ScatteredRows):
            for n, (touched, summed) in enumerate(summed_rows(part)):
                squares = summed.square_()
                norms[n] += squares.sum()
                total.index_add_(0, touched.to(total.device), squares.to(total))
            return
        if isinstance(part, OuterProducts) and part.left.shape[1] == 1:
            left, right = wide(part.left[:, 0]).square(), wide(part.right[:, 0]).square()
            norms += left.sum(1) * right.sum(1)
            total += (left.T @ right).to(total.device)
            return
    for start, squares in tiles_of_squares(parts, total.shape, norms):
        total[start : start + len(squares)] += squares.to(total.device)


def tiles_of_squares(
    parts: Sequence[Gradient], shape: Sequence[int], norms: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """Runs of rows of sum over examples of G_n ** 2, each with its first row; norms_n += |G_n|^2.

    One example's gradient is formed at a time, in tiles that stay in cache. What is yielded is
    overwritten by the next.
    """
    rows, width = shape
    step = tile_rows(rows, width)
    gradient = norms.new_empty(step, width, dtype=dtype_of(parts))
    squares = norms.new_empty(step, width, dtype=torch.promote_types(gradient.dtype, torch.float32))
    for start in range(0, rows, step):
        count = min(step, rows - start)
        tile, sums = gradient[:count], squares[:count]
        for n in range(examples_in(parts[0])):
            for number, part in enumerate(parts):
                part.add_rows(tile, n, start, fresh=number == 0)
            values = wide(tile)
            norms[n] += torch.dot(values.view(-1), values.view(-1))
            if n == 0:
                torch.mul(values, values, out=sums)
            else:
                sums.addcmul_(values, values)
        yield start, sums


def tile_rows(rows: int, width: int) -> int:
    """So many rows of a gradient stay in cache; at least one, though a shard may have none."""
    return max(1, min(rows, TILE_ELEMENTS // max(width, 1)))


def summed_rows(part: ScatteredRows) -> Iterator[tuple[Tensor, Tensor]]:
    """For each example the rows it touches, and the sums of the values at equal ids."""
    for ids, values in zip(part.ids, part.values, strict=True):
        touched, position = ids.unique(return_inverse=True)
        summed = wide(values).new_zeros(len(touched), values.shape[-1])
        yield touched, summed.index_add_(0, position, wide(values))


def wide(tensor: Tensor) -> Tensor:
    """In float32 or wider, in which squares are formed."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
