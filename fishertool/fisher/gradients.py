"""One example's gradient of one parameter, in the form its layer gives it, without forming it.

Shape convention: [example, time, feature]; `time` gathers every dimension between the two. A
parameter counts as `rows` of `width` elements: the last dimension is the width of a matrix, and
a vector has rows of width 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OuterProducts:
    """G_n = sum over time of left_t right_t^T: a linear layer's weight.

    For y = x W^T, left is the output's gradient and right is x; for y = x W it is the other way.
    """

    left: Tensor
    """[example, time, row]"""
    right: Tensor
    """[example, time, width]"""
    transposed: bool = False
    """Whether the weight is [in, out], so that left is the input."""

    def add_rows(self, buffer: Tensor, example: int, start: int, fresh: bool = False) -> None:
        """Add rows [start, start + len(buffer)) of one example's gradient to the buffer, or
        overwrite the buffer with them if it is `fresh`."""
        left = self.left[example, :, start : start + len(buffer)]
        buffer.addmm_(left.T, self.right[example], beta=0 if fresh else 1)


@dataclass(frozen=True)
class ScatteredRows:
    """G_n has the summed rows of `values` at `ids`, zeros elsewhere: an embedding's weight."""

    ids: Tensor
    """[example, time]"""
    values: Tensor
    """[example, time, width]"""

    def add_rows(self, buffer: Tensor, example: int, start: int, fresh: bool = False) -> None:
        if fresh:
            buffer.zero_()
        ids = self.ids[example] - start
        here = (ids >= 0) & (ids < len(buffer))
        buffer.index_add_(0, ids[here], self.values[example][here].to(buffer.dtype))


@dataclass(frozen=True)
class Whole:
    """G_n as it is: biases, norms, and whatever plain autograd computed."""

    values: Tensor
    """[example, row, width]"""

    def add_rows(self, buffer: Tensor, example: int, start: int, fresh: bool = False) -> None:
        if fresh:
            buffer.zero_()
        buffer += self.values[example, start : start + len(buffer)]


@dataclass(frozen=True)
class Placed:
    """G_n is another gradient from row `first` on, zeros elsewhere: one expert's of a stack."""

    part: "Gradient"
    first: int
    rows: int
    """How many rows `part` has."""

    def add_rows(self, buffer: Tensor, example: int, start: int, fresh: bool = False) -> None:
        if fresh:
            buffer.zero_()
        begin = max(self.first, start)
        end = min(self.first + self.rows, start + len(buffer))
        if begin < end:
            rows = buffer[begin - start : end - start]
            self.part.add_rows(rows, example, begin - self.first)


Gradient = OuterProducts | ScatteredRows | Whole | Placed


def examples_in(gradient: Gradient) -> int:
    if isinstance(gradient, Placed):
        return examples_in(gradient.part)
    return len(gradient.left if isinstance(gradient, OuterProducts) else gradient.values)


def dtype_of(parts: Sequence[Gradient]) -> torch.dtype:
    """In which the sum of these parts is formed: that of the products, which addmm cannot change."""
    inner = (part.part if isinstance(part, Placed) else part for part in parts)
    products = (part.left.dtype for part in inner if isinstance(part, OuterProducts))
    return next(products, torch.float32)


def rows_of(parameter: Tensor) -> tuple[int, int]:
    """Rows and width of a parameter."""
    if parameter.dim() < 2:
        return parameter.numel(), 1
    return parameter.numel() // parameter.shape[-1], parameter.shape[-1]


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: its shard under FSDP, by rows; else all of it."""
    shard: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return shard


def as_sequences(tensor: Tensor, examples: int) -> Tensor:
    """[example, ..., feature] -> [example, time, feature]; with one example, all else is its time."""
    return tensor.reshape(examples, -1, tensor.shape[-1])


def summed_over_time(tensor: Tensor) -> Tensor:
    """[example, time, feature] -> the gradient of a vector, [example, row, 1], in float32 or wider."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.sum(1, dtype=dtype).unsqueeze(-1)
