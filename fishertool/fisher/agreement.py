"""Whether gradients formed by rules are those of plain autograd, and logits those without padding."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fishertool.fisher.gradients import Gradient, dtype_of, rows_of

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
        self._all = _rms(list(exact.values()))
        self.differing = {name for name, value in exact.items() if bool(value.any())}
        """At first, all that have a gradient: one that is never handed on is missed, however small."""

    def consume(self, name: str, parts: Sequence[Gradient]) -> None:
        self.differing.discard(name)
        shape = rows_of(self._named[name])
        for n, factor in enumerate(self._factors):
            found = torch.zeros(shape, dtype=dtype_of(parts), device=self._named[name].device)
            for part in parts:
                part.add_rows(found, n, 0)
            error = found / factor
            if name in self._exact:
                error -= self._exact[name].reshape(shape)
            if not self._small(name, error):
                self.differing.add(name)

    def _small(self, name: str, error: Tensor) -> bool:
        """Beside the tensor's own gradient, or beside all of them where it has next to none."""
        own = _rms([self._exact[name]]) if name in self._exact else 0.0
        return _rms([error]) <= TOLERANCE * (own + 1e-3 * self._all)


def equal_but_for_rounding(alone: Tensor, padded: Tensor) -> bool:
    """Whether logits are those that the same example has with more columns behind its own."""
    error = alone - padded[tuple(map(slice, alone.shape))]
    error, size = (one.double().nan_to_num(0, 0, 0).norm() for one in (error, alone))
    return bool(error <= torch.finfo(alone.dtype).eps ** 0.5 * size)


def _rms(tensors: Sequence[Tensor]) -> float:
    count = sum(tensor.numel() for tensor in tensors)
    norms = (torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors)
    return math.sqrt(sum(float(norm) ** 2 for norm in norms) / max(count, 1))
