"""The gradient bank: per-example gradients as they are, the rank-one terms of the Fisher."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fishertool.fisher.diagonal import summed_rows, tile_rows, wide
from fishertool.fisher.gradients import (
    Gradient,
    ScatteredRows,
    Whole,
    dtype_of,
    examples_in,
    rows_of,
)
from fishertool.fisher.sums import Groups

Write = Callable[[str, int, Tensor], None]
"""Take one member of the bank: a parameter's name, the member's number, its gradient [row, width],
which is overwritten afterwards."""

BLOCK_ELEMENTS = 1 << 17
"""What of a gradient is rounded at once: so few stay in a core's own cache."""


class GradientBank:
    """Hands each example's gradient on in `dtype`, or the mean gradient of each `group` examples.

    Of the bank, one member is in memory at a time. Member k has the examples k group, k group + 1,
    ...; with `group` > 1 a micro-batch has examples of one member only, and a member's
    micro-batches follow one another. One label an example: the bank has no place for several.

    traces    name -> sum over members of |g|^2, before rounding to `dtype`
    rounding  name -> sum over members of |g - rounded g|^2
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], write: Write, dtype: torch.dtype, group: int = 1
    ):
        def zeros() -> dict[str, Tensor]:
            return {
                name: torch.zeros((), dtype=torch.float64, device=value.device)
                for name, value in parameters.items()
            }

        self.traces, self.rounding = zeros(), zeros()
        self.groups: Groups = {"bank-traces": self.traces, "bank-rounding": self.rounding}
        self._parameters = dict(parameters)
        self._write = write
        self._dtype = dtype
        self._group = group
        self._members: list[int] = []
        self._examples = 0
        """How many the open member has so far."""
        self._open: dict[str, Tensor] = {}
        self._handed: set[str] = set()

    def begin(self, examples: Sequence[int]) -> None:
        members = [example // self._group for example in examples]
        if self._group > 1 and len(set(members)) > 1:
            raise ValueError("a micro-batch has examples of several groups")
        if self._group == 1 or members[:1] != self._members[:1]:
            self._close()
        self._members = members
        self._examples += len(examples)

    def add(self, name: str, gradients: Sequence[Gradient]) -> None:
        self._handed.add(name)
        if self._group == 1:
            self._hand_on_each(name, gradients)
            return
        parameter = self._parameters[name]
        for n in range(examples_in(gradients[0])):
            gradient = parameter.new_zeros(rows_of(parameter), dtype=dtype_of(gradients))
            for part in gradients:
                part.add_rows(gradient, n, 0)
            if name in self._open:
                self._open[name] += gradient
            else:
                self._open[name] = wide(gradient)

    def _hand_on_each(self, name: str, gradients: Sequence[Gradient]) -> None:
        """Every example's gradient is a member; formed and rounded in tiles that stay in cache."""
        parameter = self._parameters[name]
        rows, width = rows_of(parameter)
        if len(gradients) == 1:
            [part] = gradients
            if isinstance(part, Whole):
                rounded = self._rounded(name, part.values)
                for number, values in zip(self._members, rounded, strict=True):
                    self._write(name, number, values)
                return
            if isinstance(part, ScatteredRows):
                member = parameter.new_zeros(rows, width, dtype=self._dtype)
                for number, (touched, values) in zip(self._members, summed_rows(part), strict=True):
                    member.index_copy_(0, touched, self._rounded(name, values))
                    self._write(name, number, member)
                    member.index_fill_(0, touched, 0)
                return
        step = tile_rows(rows, width)
        exact = parameter.new_empty(step, width, dtype=dtype_of(gradients))
        member = parameter.new_empty(rows, width, dtype=self._dtype)
        for n, number in enumerate(self._members):
            for start in range(0, rows, step):
                tile = exact[: rows - start]
                for place, part in enumerate(gradients):
                    part.add_rows(tile, n, start, fresh=place == 0)
                self._round(name, tile, member[start : start + step])
            self._write(name, number, member)

    def _close(self) -> None:
        """Hand on what is open, and zeros for parameters that took no part."""
        for name, parameter in self._parameters.items() if self._members else ():
            if name in self._open:
                self._hand_on(name, self._members[0], self._open.pop(name) / self._examples)
            elif name not in self._handed:
                for member in self._members if self._group == 1 else self._members[:1]:
                    self._hand_on(name, member, torch.zeros(rows_of(parameter)))
        self._handed.clear()
        self._examples = 0

    def _hand_on(self, name: str, member: int, gradient: Tensor) -> None:
        self._write(name, member, self._rounded(name, gradient))

    def _rounded(self, name: str, gradient: Tensor) -> Tensor:
        rounded = gradient.new_empty(gradient.shape, dtype=self._dtype)
        self._round(name, gradient, rounded)
        return rounded

    def _round(self, name: str, gradient: Tensor, rounded: Tensor) -> None:
        """Into `rounded`, which is contiguous; adds up what the gradients are, and what is lost."""
        exact = wide(gradient).reshape(-1)
        into = rounded.view(-1)
        for start in range(0, len(exact), BLOCK_ELEMENTS):
            values = exact[start : start + BLOCK_ELEMENTS]
            block = into[start : start + BLOCK_ELEMENTS]
            block.copy_(values)
            self.traces[name] += torch.dot(values, values)
            if block.dtype != values.dtype:
                error = values - block
                self.rounding[name] += torch.dot(error, error)
