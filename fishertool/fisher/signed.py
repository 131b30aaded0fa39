"""The signed estimator: squared per-example gradients from one ordinary backward pass a batch."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from fishertool.fisher.gradients import Whole, rows_of
from fishertool.fisher.labels import SEED_STRIDE, random_signs
from fishertool.fisher.per_example import Consume, Forward

SIGNS = 0x9E3779B9
"""Sets these draws apart from those of labels: signs that go with the labels would be no signs."""


class SignedGradients:
    """In place of `PerExampleGradients`: a batch counts as one unit, its gradient a signed sum.

        E[(sum_b s_b g_b) ^ 2] = sum_b g_b ^ 2        for independent random signs s_b

    so its square is an unbiased estimate of what the exact way adds up. No hook is needed, and
    any architecture will do; the noise at batch size B is that of having 1 / B of the data or so,
    and the standard error of the traces, which counts batches, tells how much.

    An example's signs, one a label, follow from `seed` and its number in the data.
    """

    one_by_one = False
    by_autograd: frozenset[str] = frozenset()

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor], seed: int):
        self._model = model
        self._parameters = dict(parameters)
        self._seed = seed
        self._generators: list[torch.Generator] = []
        self._owners = {
            name: value if value._base is None else value._base
            for name, value in self._parameters.items()
        }

    def __enter__(self) -> Self:
        self._required = {p: p.requires_grad for p in self._model.parameters()}
        self._model.requires_grad_(False)
        for owner in self._owners.values():
            owner.requires_grad_(True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for parameter, required in self._required.items():
            parameter.requires_grad_(required)
            parameter.grad = None

    def check(self, forward: Forward, rows_each: int = 1) -> None:
        """Nothing to find out."""

    def begin(self, examples: Sequence[int], rows_each: int = 1) -> Sequence[int]:
        """Before each forward pass; what counts as the batch's units."""
        seeds = (self._seed * SEED_STRIDE + example ^ SIGNS for example in examples)
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return examples[:1]

    def backward(
        self, logits: Tensor, cotangent: Tensor, consume: Consume, retain_graph: bool = False
    ) -> None:
        """Run autograd from the logits, every example's cotangent with a sign."""
        signs = torch.cat([random_signs((1,), generator) for generator in self._generators])
        signs = signs.to(cotangent).reshape(-1, *[1] * (cotangent.dim() - 1))
        signed = (cotangent * signs).to(logits.dtype)
        logits.backward(signed, retain_graph=retain_graph)  # type: ignore[no-untyped-call]
        for name, owner in self._owners.items():
            if owner.grad is None:
                continue
            value = self._parameters[name]
            offset = value.storage_offset() - owner.storage_offset()
            gradient = owner.grad.contiguous().as_strided(value.shape, value.stride(), offset)
            consume(name, [Whole(gradient.reshape(1, *rows_of(value)))])
        for owner in self._owners.values():
            owner.grad = None
