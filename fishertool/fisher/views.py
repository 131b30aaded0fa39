"""From a parameter's gradients to those of the named tensors that lie in it.

A named tensor is a parameter, or a view of part of one: an expert's matrix, whose parameter in
memory is a stack of all experts.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fishertool.fisher.function_calls import base_of, offset_in
from fishertool.fisher.gradients import (
    Gradient,
    OuterProducts,
    Placed,
    Whole,
    dtype_of,
    examples_in,
    rows_of,
)


@dataclass(frozen=True)
class View:
    """One named tensor."""

    name: str
    parameter: nn.Parameter
    tensor: Tensor
    start: int
    stop: int
    """The rows of the parameter it has; (0, 0) where it is no run of whole rows."""

    def of(self, tensor: Tensor) -> Tensor:
        """The same part of a tensor like the parameter."""
        shape, stride = self.tensor.shape, self.tensor.stride()
        flat = tensor.reshape(-1)
        return flat.as_strided(shape, stride, flat.storage_offset() + offset_in(self.tensor))


def views_by_parameter(parameters: Mapping[str, Tensor]) -> dict[int, list[View]]:
    """id of each parameter -> its views by name."""
    found: dict[int, list[View]] = defaultdict(list)
    for name, tensor in parameters.items():
        parameter = base_of(tensor)
        assert isinstance(parameter, nn.Parameter)
        width = rows_of(parameter)[1]
        first, rest = divmod(offset_in(tensor), width)
        whole = tensor.is_contiguous() and not rest and rows_of(tensor)[1] == width
        stop = first + tensor.numel() // width if whole else 0
        found[id(parameter)].append(View(name, parameter, tensor, first if whole else 0, stop))
    return found


@dataclass(frozen=True)
class Part:
    """A gradient of some rows of a parameter, for all examples of a batch or for one."""

    gradient: Gradient
    first: int
    rows: int
    example: int | None = None


def joined(parts: Sequence[Part], examples: int) -> list[Part]:
    """Parts that belong to single examples, put together by the rows they are of."""
    found = [part for part in parts if part.example is None]
    single: dict[tuple[int, int], list[tuple[int, Gradient]]] = defaultdict(list)
    for part in parts:
        if part.example is not None:
            single[part.first, part.rows].append((part.example, part.gradient))
    for (first, rows), ones in single.items():
        found.append(Part(_batched(ones, examples), first, rows))
    return found


def gradients_of(view: View, parts: Sequence[Part]) -> list[Gradient]:
    """The parts of a parameter's gradients that fall into a view; none where it took no part."""
    if not view.stop:
        return [_picked(view, parts)] if parts else []
    found: list[Gradient] = []
    for part in parts:
        start, stop = view.start - part.first, view.stop - part.first
        gradient = part.gradient
        if stop <= 0 or start >= part.rows:
            continue
        if (start, stop) == (0, part.rows):
            found.append(gradient)
        elif isinstance(gradient, OuterProducts) and start >= 0 and stop <= part.rows:
            left = gradient.left[..., start:stop]
            found.append(OuterProducts(left, gradient.right, gradient.transposed))
        else:
            found.append(Placed(gradient, -start, part.rows))
    return found


def _picked(view: View, parts: Sequence[Part]) -> Gradient:
    """Of a view that is no run of rows (a transposed stack): the whole formed, and picked from."""
    examples, shape = examples_in(parts[0].gradient), rows_of(view.parameter)
    formed = view.parameter.new_zeros(
        examples, *shape, dtype=dtype_of([part.gradient for part in parts])
    )
    for part in parts:
        rows = formed[:, part.first : part.first + part.rows]
        for n in range(examples):
            part.gradient.add_rows(rows[n], n, 0)
    picked = torch.stack([view.of(one) for one in formed])
    return Whole(picked.reshape(examples, *rows_of(view.tensor)))


def _batched(ones: Sequence[tuple[int, Gradient]], examples: int) -> Gradient:
    """One gradient for a batch; time is padded with zeros, which add nothing."""
    lefts: list[list[Tensor]] = [[] for _ in range(examples)]
    rights: list[list[Tensor]] = [[] for _ in range(examples)]
    transposed = False
    for n, one in ones:
        if not isinstance(one, OuterProducts):
            return _added(ones, one, examples)
        lefts[n].append(one.left[0])
        rights[n].append(one.right[0])
        transposed = one.transposed
    return OuterProducts(_padded(lefts), _padded(rights), transposed)


def _padded(sequences: Sequence[Sequence[Tensor]]) -> Tensor:
    """[time, feature] of each example, in pieces -> [example, time, feature]."""
    like = next(piece for pieces in sequences for piece in pieces)
    whole = [torch.cat([like[:0], *pieces]) for pieces in sequences]
    return nn.utils.rnn.pad_sequence(whole, batch_first=True)


def _added(ones: Sequence[tuple[int, Gradient]], like: Gradient, examples: int) -> Gradient:
    assert isinstance(like, Whole)
    values = like.values.new_zeros(examples, *like.values.shape[1:])
    for n, one in ones:
        one.add_rows(values[n], 0, 0)
    return Whole(values)
