"""Whether gradients formed by rules are those of plain autograd, and logits those without padding."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fishertool.fisher.gradients import Gradient, dtype_of, rows_of
from fishertool.fisher.views import View

TOLERANCE = 0.05
"""Of a tensor's root mean square; a wrong rule is off by more, bfloat16 by less."""


class Agreement:
    """Compares each example's gradients with multiples of autograd's; `differing` has the names.

    exact   name -> autograd's gradient, for those that have one
    named   name -> a tensor of its shape, for all
    factors  what each example's gradient is, in terms of `exact`
    """

    def __init__(
        self, exact: Mapping[str, Tensor], named: Mapping[str, Tensor], factors: Sequence[float]
    ):
        self._exact = exact
        self._named = named
        self._factors = factors
        self._own = {name: _rms(value) for name, value in exact.items()}
        count = sum(value.numel() for value in exact.values())
        squares = (self._own[name] ** 2 * value.numel() for name, value in exact.items())
        self._all = math.sqrt(sum(squares) / max(count, 1))
        self.differing = {name for name, v in exact.items() if self._own[name] or bool(v.any())}
        """At first, all that have a gradient: one that is never handed on is missed, however small."""

    def consume(self, name: str, parts: Sequence[Gradient]) -> None:
        self.differing.discard(name)
        named, exact, dtype = self._named[name], self._exact.get(name), dtype_of(parts)
        for n, factor in enumerate(self._factors):
            if exact is None:
                error = torch.zeros(rows_of(named), dtype=dtype, device=named.device)
            else:
                error = (exact.reshape(rows_of(named)) * -factor).to(dtype)
            for part in parts:
                part.add_rows(error, n, 0)
            # Beside the tensor's own gradient, or beside all of them where it has next to none, or
            # none but rounding: a key's bias has no influence at all.
            rounding = 0.0 if exact is None else 8 * torch.finfo(exact.dtype).eps
            bound = TOLERANCE * (self._own.get(name, 0.0) + max(1e-3, rounding) * self._all)
            if not _rms(error) <= bound * abs(factor):
                self.differing.add(name)


def exact_gradients(
    logits: Tensor, cotangent: Tensor, views: Mapping[int, Sequence[View]]
) -> dict[str, Tensor]:
    """Autograd's, by the names of the views, of those whose parameter takes part in the logits."""
    if not logits.requires_grad:
        return {}
    parameters = [same[0].parameter for same in views.values()]
    found = torch.autograd.grad(logits, parameters, cotangent, allow_unused=True)
    return {
        view.name: view.of(gradient)
        for same, gradient in zip(views.values(), found, strict=True)
        for view in same
        if gradient is not None
    }


def equal_but_for_rounding(alone: Tensor, padded: Tensor) -> bool:
    """Whether logits are those that the same example has with more columns behind its own. Either
    may have columns for padding of a decoder."""
    common = tuple(map(slice, map(min, alone.shape, padded.shape)))
    alone = alone[common]
    error = alone - padded[common]
    error, size = (one.double().nan_to_num(0, 0, 0).norm() for one in (error, alone))
    return bool(error <= torch.finfo(alone.dtype).eps ** 0.5 * size)


def _rms(tensor: Tensor) -> float:
    wide = torch.promote_types(tensor.dtype, torch.float32)
    norm = float(torch.linalg.vector_norm(tensor, dtype=wide))
    return norm / math.sqrt(max(tensor.numel(), 1))
