"""In which order a model uses its parameters: the order of registration need not be that."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TOKENS = 4


def order_of_use(model: nn.Module) -> list[str]:
    """Parameters by the first operation on each in a forward pass on tokens.

    model   on the meta device, so that the pass costs neither memory nor arithmetic

    Parameters that it did not come to are left out: those of other inputs than tokens, or behind an
    operation that needs values. Of tied ones, all but the first registered are left out.
    """
    watch = _Watch({id(value): name for name, value in model.named_parameters()})
    tokens = torch.ones(1, TOKENS, dtype=torch.long, device="meta")
    inputs = {"input_ids": tokens}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens
    with suppress(Exception):  # an architecture without experts, or that cannot choose
        # Others loop over the experts that the tokens' values choose.
        model.set_experts_implementation("batched_mm")  # type: ignore[operator]
    # What was seen before a forward pass failed was seen; it may raise anything.
    with suppress(Exception), torch.no_grad(), torch.device("meta"), watch:
        model.eval()(**inputs)
    return list(watch.seen)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation, with its operands."""

    def __init__(self, names: Mapping[int, str]):
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = names
        self.seen: dict[str, None] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for operand in tree_leaves((args, kwargs)):
            if (name := self._names.get(id(operand))) is not None:
                self.seen[name] = None
        if func is torch.ops.aten._local_scalar_dense.default:
            return _any_value(args[0])
        return func(*args, **(kwargs or {}))


def _any_value(scalar: Tensor) -> Any:
    """For a branch on a value, such as whether all of a mask is set: there is none."""
    return torch.ones((), dtype=scalar.dtype, device="cpu").item()
