"""The function rules: from a call that takes a parameter to per-example gradients of it.

For what a module does with its parameters itself, where no layer rule fits it: a matrix product
with one slice of a stack of experts, an embedding whose ids the module computes, a convolution, a
plain parameter added to an activation. A function that is not here has no rule.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fishertool.fisher.gradients import (
    Gradient,
    OuterProducts,
    ScatteredRows,
    Whole,
    as_sequences,
    rows_of,
    summed_over_time,
)

Form = Callable[[Tensor, int], Gradient]
"""(gradient of the function's output, examples) -> gradients of the parameter."""


@dataclass(frozen=True)
class Argument:
    """One tensor a function was called with, and how its gradient follows from the output's."""

    tensor: Tensor
    form: Form
    reads: Tensor | None = None
    """What `form` needs unchanged until then."""
    is_linear: bool = False
    """Whether `reads` is the input of a linear layer with this weight."""
    transposed: bool = False


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Argument]:
    """y = x W^T + b, W [out, in]."""

    def form(delta: Tensor, examples: int) -> Gradient:
        return OuterProducts(as_sequences(delta, examples), as_sequences(x.detach(), examples))

    found = [Argument(weight, form, x, is_linear=True)]
    return found if bias is None else [*found, Argument(bias, _summed)]


def product(x: Tensor, weight: Tensor) -> list[Argument]:
    """y = x W, W [in, out]."""
    if weight.dim() != 2:
        return []

    def form(delta: Tensor, examples: int) -> Gradient:
        delta, rows = as_sequences(delta, examples), as_sequences(x.detach(), examples)
        return OuterProducts(rows, delta, transposed=True)

    return [Argument(weight, form, x, is_linear=True, transposed=True)]


def embedding(
    ids: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> list[Argument]:
    """y = W[ids]; the padding id gets none."""
    if max_norm is not None or scale_grad_by_freq:
        return []

    def form(delta: Tensor, examples: int) -> Gradient:
        rows, values = ids.reshape(examples, -1), as_sequences(delta, examples)
        if padding_idx is not None:
            values = values * (rows != padding_idx % len(weight)).unsqueeze(-1)
        return ScatteredRows(rows, values)

    return [Argument(weight, form, ids)]


def convolution(function: Callable[..., Tensor]) -> Callable[..., list[Argument]]:
    """Any padding, stride and groups: its own backward, on one example's input after another's."""

    def rule(x: Tensor, weight: Tensor, bias: Tensor | None = None, *how: Any) -> list[Argument]:
        def form(delta: Tensor, examples: int) -> Gradient:
            with torch.enable_grad():
                leaf = weight.detach().requires_grad_()
                gradients = [
                    torch.autograd.grad(function(one.detach(), leaf, None, *how), leaf, gradient)
                    for one, gradient in zip(
                        _apart(x, examples), _apart(delta, examples), strict=True
                    )
                ]
            return Whole(torch.stack([one.reshape(rows_of(weight)) for (one,) in gradients]))

        found = [Argument(weight, form, x)]
        channels = x.dim() - 1 - (weight.dim() - 2)

        def form_bias(delta: Tensor, examples: int) -> Gradient:
            return _summed(delta.movedim(channels, -1), examples)

        return found if bias is None else [*found, Argument(bias, form_bias)]

    return rule


def addition(first: Any, second: Any) -> list[Argument]:
    """y = a + b, either repeated over the other's dimensions."""
    return [Argument(one, _summed_to(one)) for one in (first, second) if isinstance(one, Tensor)]


def expansion(tensor: Tensor, *sizes: Any) -> list[Argument]:
    """One and the same for all examples."""
    return [Argument(tensor, _summed_to(tensor))]


def _summed(delta: Tensor, examples: int) -> Gradient:
    return Whole(summed_over_time(as_sequences(delta, examples)))


def _summed_to(tensor: Tensor) -> Form:
    """What repeats a tensor over examples and time has the sum over time for its gradient."""

    def form(delta: Tensor, examples: int) -> Gradient:
        wide = delta.to(torch.promote_types(delta.dtype, torch.float32))
        single = [wide] if examples == 1 else _apart(wide, examples)
        summed = [one.sum_to_size(tensor.shape) for one in single]
        return Whole(torch.stack(summed).reshape(examples, *rows_of(tensor)))

    return form


def _apart(tensor: Tensor, examples: int) -> Sequence[Tensor]:
    """Each example's rows."""
    if len(tensor) % examples:
        raise ValueError("no example dimension in front")
    return tensor.chunk(examples)


RULES: Mapping[Any, Callable[..., list[Argument]]] = {
    functional.linear: linear,
    functional.embedding: embedding,
    torch.matmul: product,
    Tensor.matmul: product,
    torch.mm: product,
    Tensor.mm: product,
    torch.add: addition,
    Tensor.add: addition,
    Tensor.expand: expansion,
    **{one: convolution(one) for one in (functional.conv1d, functional.conv2d, functional.conv3d)},
}


def arguments(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Argument]:
    """The tensors whose gradients a rule forms; none where the call is written otherwise."""
    rule = RULES.get(function)
    if rule is None:
        return []
    try:
        return rule(*args, **kwargs)
    except TypeError:  # other arguments than the rule knows, as add's alpha
        return []
