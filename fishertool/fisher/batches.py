"""A batch, and which examples are run together: micro-batches that waste no padding."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, distributed, nn

from fishertool.errors import InputError

MASKS = ("attention_mask", "decoder_attention_mask")

TOKENS = 2048
"""Fewer, and what is done once a batch weighs (adding up in float64); more, and activations leave
the caches of a CPU."""


@dataclass(frozen=True)
class Batch:
    """Some examples, padded to one length."""

    inputs: Mapping[str, Tensor]
    """The model's keyword arguments, each with examples in front."""
    targets: Tensor
    """[example] classes, or [example, time] next tokens."""
    scored: Tensor
    """As `targets`: False where nothing is predicted (padding, the last position)."""
    examples: Sequence[int]
    """Which examples of the data these are."""
    rows_each: int = 1
    """Texts an example has. Where there are several, the model runs them as adjacent rows."""

    @property
    def masks(self) -> list[Tensor]:
        """[..., time], zero at padding: of the encoder, and of the decoder where there are both."""
        return [self.inputs[name] for name in MASKS if name in self.inputs]

    @property
    def tokens(self) -> int:
        """Of its examples, padding not counted."""
        return sum(int(mask.sum()) for mask in self.masks) if self.examples else 0

    def emptied(self) -> Self:
        """The same inputs, of no example: nothing is predicted."""
        return replace(self, scored=torch.zeros_like(self.scored), examples=())

    def beside(self, logits: Tensor) -> Self:
        """With targets on the logits' device, which need not be the inputs'."""
        device = logits.device
        return replace(self, targets=self.targets.to(device), scored=self.scored.to(device))


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Raises InputError where the model's own code fails, as Funnel's on texts of few tokens."""
    try:
        logits: Tensor = model(**batch.inputs).logits
    except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        together = distributed.is_available() and distributed.is_initialized()
        if together or isinstance(error, torch.OutOfMemoryError):  # or another process has failed
            raise
        shapes = ", ".join(f"{name} {list(one.shape)}" for name, one in batch.inputs.items())
        raise InputError(
            f"{type(model).__name__} fails on {shapes}: {error!r}; texts of other lengths or another "
            "version of transformers may pass (FISHERTOOL_DEBUG=1 shows where)"
        ) from error
    return logits


def micro_batches(
    lengths: Sequence[int],
    examples: Iterable[int] | None = None,
    *,
    rows_each: Sequence[int] | None = None,
    size: int | None = None,
    tokens: int = TOKENS,
) -> list[list[int]]:
    """Indices of examples, the longest first, in batches of `size`, or of at most `tokens` tokens
    with padding (one example at least); only examples with as many rows each go together.

    >>> micro_batches([3, 9, 5, 4], tokens=10)
    [[1], [2, 3], [0]]
    """
    if examples is None:
        examples = range(len(lengths))
    rows = rows_each or [1] * len(lengths)
    order = sorted(examples, key=lambda index: (-rows[index], -lengths[index]))
    batches: list[list[int]] = []
    for index in order:
        if batches:
            last = batches[-1]
            limit = size if size is not None else max(1, tokens // max(lengths[last[0]], 1))
            if len(last) < limit and rows[last[0]] == rows[index]:
                last.append(index)
                continue
        batches.append([index])
    return batches
