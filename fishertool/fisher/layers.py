"""The layer rules: from a module's input and its output's gradient to per-example gradients.

A rule is chosen by what the module computes, tried on random input, not by its class or the
model's architecture. A module that fits none has no rule; plain autograd serves it.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from fishertool.fisher.gradients import (
    Gradient,
    OuterProducts,
    ScatteredRows,
    Whole,
    as_sequences,
    summed_over_time,
)

Rule = Callable[[nn.Module, Tensor, Tensor, int], Mapping[str, Gradient]]
"""(module, input, gradient of the output, examples) -> gradients by the module's parameter names."""


def rule_for(module: nn.Module) -> Rule | None:
    """The first rule whose formula the module's own forward agrees with."""
    if next(module.children(), None) is not None:
        return None
    shapes = {name: parameter.dim() for name, parameter in module.named_parameters()}
    matrix = shapes in ({"weight": 2}, {"weight": 2, "bias": 1})
    if isinstance(module, nn.Embedding):
        return embedding if matrix and _is_embedding(module) else None
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        return layer_norm
    if matrix and _is_linear(module, transposed=False):
        return linear
    if matrix and _is_linear(module, transposed=True):
        return transposed_linear
    if shapes in ({"weight": 1}, {"weight": 1, "bias": 1}) and _is_scale(module):
        return scale
    return None


def linear(module: nn.Module, x: Tensor, delta: Tensor, examples: int) -> dict[str, Gradient]:
    """y = x W^T + b, W [out, in]: G_n = delta_n^T x_n, and the sum of delta over time for b."""
    x, delta = _where_it_counts(as_sequences(x, examples), as_sequences(delta, examples))
    return {"weight": OuterProducts(delta, x), "bias": Whole(summed_over_time(delta))}


def transposed_linear(
    module: nn.Module, x: Tensor, delta: Tensor, examples: int
) -> dict[str, Gradient]:
    """y = x W + b, W [in, out], as GPT-2's Conv1D: G_n = x_n^T delta_n."""
    x, delta = _where_it_counts(as_sequences(x, examples), as_sequences(delta, examples))
    return {
        "weight": OuterProducts(x, delta, transposed=True),
        "bias": Whole(summed_over_time(delta)),
    }


def _where_it_counts(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Without the times at which delta is zero in every example: most of them in the last layer of
    a classifier, which reads one token. To ask a GPU would be to wait for it."""
    # One feature says at little cost that most times count, as nearly always; to leave out the few
    # others (the last of every text, in a language model) would cost more than it saves.
    if delta.device.type != "cpu" or (delta[..., 0] != 0).any(0).float().mean() > 0.5:
        return x, delta
    times = (delta != 0).any(2).any(0).nonzero().squeeze(1)
    if len(times) == delta.shape[1]:
        return x, delta
    return x[:, times], delta[:, times]


def embedding(module: nn.Module, x: Tensor, delta: Tensor, examples: int) -> dict[str, Gradient]:
    """y = W[ids]: delta's rows added up at their ids; the padding id gets none."""
    assert isinstance(module, nn.Embedding)
    ids, values = x.reshape(examples, -1), as_sequences(delta, examples)
    if module.padding_idx is not None:
        values = values * (ids != module.padding_idx).unsqueeze(-1)
    return {"weight": ScatteredRows(ids, values)}


def layer_norm(module: nn.Module, x: Tensor, delta: Tensor, examples: int) -> dict[str, Gradient]:
    """y = w * normalized(x) + b: the sum over time of delta * normalized(x), and of delta for b."""
    assert isinstance(module, nn.LayerNorm)
    normalized = functional.layer_norm(x, module.normalized_shape, eps=module.eps)
    return {
        "weight": Whole(summed_over_time(as_sequences(delta * normalized, examples))),
        "bias": Whole(summed_over_time(as_sequences(delta, examples))),
    }


def scale(module: nn.Module, x: Tensor, delta: Tensor, examples: int) -> dict[str, Gradient]:
    """y = w * h(x) + const (+ b), elementwise, as every RMSNorm and DeBERTa's LayerNorm: h is the
    module at w = 1 less at w = 0."""
    return {
        "weight": Whole(summed_over_time(as_sequences(delta * _slope(module, x), examples))),
        "bias": Whole(summed_over_time(as_sequences(delta, examples))),
    }


def _slope(module: nn.Module, x: Tensor) -> Tensor:
    return _at(module, x, 1) - _at(module, x, 0)


def _at(module: nn.Module, x: Tensor, weight: Tensor | float, bias: Tensor | float = 0) -> Tensor:
    """The module's output if these were its parameters."""
    given = {"weight": weight, "bias": bias}
    own = {
        name: torch.zeros_like(parameter) + given[name]
        for name, parameter in module.named_parameters()
    }
    y: Tensor = functional_call(module, own, (x,))
    return y


def _is_linear(module: nn.Module, transposed: bool) -> bool:
    weight = module.get_parameter("weight")
    x = _random(2, 3, weight.shape[0 if transposed else 1], like=weight)
    bias = dict(module.named_parameters()).get("bias")
    if bias is not None and len(bias) != weight.shape[1 if transposed else 0]:
        return False
    y = x @ weight if transposed else x @ weight.T
    return _computes(module, x, y if bias is None else y + bias)


def _is_embedding(module: nn.Embedding) -> bool:
    ids = torch.arange(min(6, module.num_embeddings), device=module.weight.device)[None]
    return module.max_norm is None and _computes(module, ids, module.weight[ids])


def _is_scale(module: nn.Module) -> bool:
    weight = module.get_parameter("weight")
    x = _random(2, 3, len(weight), like=weight)
    probe, shift = _random(2, len(weight), like=weight)
    own = dict(module.named_parameters()).get("bias")
    if own is not None and own.shape != weight.shape:
        return False
    bias = torch.zeros_like(shift) if own is None else shift
    try:
        zero, slope = _at(module, x, 0), _slope(module, x)
        with torch.no_grad():
            at_probe = _at(module, x, probe, bias)
    except (TypeError, RuntimeError, ValueError):
        return False
    return slope.shape == x.shape and _close(at_probe, zero + probe * slope + bias)


def _computes(module: nn.Module, x: Tensor, expected: Tensor) -> bool:
    try:
        with torch.no_grad():
            y = module(x)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    return isinstance(y, Tensor) and y.shape == expected.shape and _close(y, expected)


def _close(actual: Tensor, expected: Tensor) -> bool:
    tolerance = 30 * torch.finfo(actual.dtype).eps
    error = (actual.double() - expected.double()).abs().max()
    return bool(error <= tolerance * (1 + expected.double().abs().max()))


def _random(*shape: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).to(like.device, like.dtype)
