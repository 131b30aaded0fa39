"""What an embedding gives where its ids have no example dimension, as relative position biases.

Autograd follows it, by itself, through whatever is done with it alone. Where it meets an activation
it is repeated, once for each row of the batch, so that the gradient there has examples in front;
from there, each example's goes back on its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as nested

from fishertool.errors import InputError
from fishertool.fisher.diagonal import wide
from fishertool.fisher.gradients import Gradient, ScatteredRows
from fishertool.fisher.outputs import Form
from fishertool.fisher.views import Part

Listen = Callable[[Tensor, Form], Tensor]
"""Waits for the gradient of the repeated tensor; what the model is to go on with."""


@dataclass(frozen=True)
class Lookup:
    """A call of an embedding with the same ids for all examples."""

    output: Tensor
    """A leaf, where a graph of its own begins."""
    form: Form
    rows: int
    listen: Listen

    def repeated(self, shared: Tensor, dimensions: int) -> Tensor:
        """Made of the output alone -> [row, ...], of so many dimensions at least."""
        shared = shared[(None,) * (dimensions - shared.dim())]
        if len(shared) != 1:
            raise InputError(
                "examples of one batch share what an embedding gives them, and cannot be told "
                "apart; --batch-size 1 takes one at a time"
            )

        def form(delta: Tensor, examples: int) -> Mapping[int, Part]:
            apart = delta.reshape(examples, -1, *shared.shape[1:]).sum(1, keepdim=True)
            ones = [
                self.form(torch.autograd.grad(shared, self.output, one, retain_graph=True)[0], 1)
                for one in apart
            ]
            return {
                key: replace(part, gradient=_together([one[key].gradient for one in ones]))
                for key, part in ones[0].items()
            }

        return self.listen(shared.detach().expand(self.rows, *shared.shape[1:]), form)


class Shared(Tensor):
    """A lookup's output, or what is made of that alone."""

    lookup: Lookup

    @staticmethod
    def of(tensor: Tensor, lookup: Lookup) -> "Shared":
        shared = tensor.as_subclass(Shared)
        shared.lookup = lookup
        return shared

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        inputs = (args, kwargs or {})
        tensors = [one for one in nested.tree_leaves(inputs) if isinstance(one, Tensor)]
        lookup = next(one.lookup for one in tensors if isinstance(one, Shared))
        with torch._C.DisableTorchFunctionSubclass():
            others = [
                one for one in tensors if one.dim() and getattr(one, "lookup", None) is not lookup
            ]
            if others or func is Tensor.expand:
                dimensions = max(one.dim() for one in tensors)
                args, kwargs = nested.tree_map_only(
                    Shared, lambda one: one.lookup.repeated(one, dimensions), inputs
                )
                return func(*args, **kwargs)
            made = func(*inputs[0], **inputs[1])
            return nested.tree_map_only(
                Tensor, lambda one: Shared.of(one, lookup) if one.requires_grad else one, made
            )


def _together(gradients: Sequence[Gradient]) -> Gradient:
    """Of one example each -> of all, with one row for each id: they are the same for all."""
    ids, values = [], []
    for one in gradients:
        if not isinstance(one, ScatteredRows):
            raise ValueError("no embedding")
        ids.append(one.ids)
        values.append(wide(one.values))
    unique, places = torch.unique(ids[0][0], return_inverse=True)
    scattered = torch.cat(values)
    summed = scattered.new_zeros(len(values), len(unique), scattered.shape[-1])
    return ScatteredRows(unique.expand(len(values), -1), summed.index_add_(1, places, scattered))
