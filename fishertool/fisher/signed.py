"""The signed estimator: squared per-example gradients from one ordinary backward pass a batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from fishertool.fisher.gradients import Whole, local, rows_of
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

    Where the model is sharded over `shards` processes (FSDP), the gradients of a step come
    averaged over their batches, and each process has its shard of them: scaled back to sums,
    all batches of a step are one unit. A batch of no example takes part with zero.
    """

    one_by_one = False
    by_autograd: frozenset[str] = frozenset()

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor], seed: int, shards: int):
        self._model = model
        self._parameters = dict(parameters)
        self._seed = seed
        self._shards = shards
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

    def __exit__(self, *raised: object) -> None:
        for parameter, required in self._required.items():
            parameter.requires_grad_(required)
            parameter.grad = None

    def check(
        self, forward: Forward, rows_each: int = 1, padded: Callable[[], Tensor] | None = None
    ) -> None:
        """Nothing to find out."""

    def begin(self, examples: Sequence[int], rows_each: int = 1) -> Sequence[int]:
        """Before each forward pass; what counts as the batch's units: it is one."""
        seeds = (self._seed * SEED_STRIDE + example ^ SIGNS for example in examples)
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return [0]

    def backward(
        self, logits: Tensor, cotangent: Tensor, consume: Consume, retain_graph: bool = False
    ) -> None:
        """Run autograd from the logits, every example's cotangent with a sign."""
        signs = [random_signs((1,), generator) for generator in self._generators]
        factors = self._shards * torch.cat(signs or [torch.zeros(1)]).to(cotangent)
        factors = factors.reshape(-1, *[1] * (cotangent.dim() - 1))
        signed = (cotangent * factors).to(logits.dtype)
        logits.backward(signed, retain_graph=retain_graph)  # type: ignore[no-untyped-call]
        for name, owner in self._owners.items():
            if owner.grad is None:
                continue
            value = local(self._parameters[name])
            gradient = local(owner.grad).contiguous()
            inside = value.storage_offset() - local(owner).storage_offset()
            offset = gradient.storage_offset() + inside
            gradient = gradient.as_strided(value.shape, value.stride(), offset)
            consume(name, [Whole(gradient.reshape(1, *rows_of(value)))])
        for owner in self._owners.values():
            owner.grad = None
