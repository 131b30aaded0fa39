"""Where each tensor of a saved checkpoint lies in the loaded model's parameters.

transformers renames, stacks and splits on load, and undoes it in `save_pretrained`. Probes that hold
no memory are sent along the same way back, so what comes out under each name tells where it is from.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Origin:
    """A tensor on disk is this strided view of one tensor of the model."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def mirrored(self) -> bool:
        """Whether rows on disk are columns of the model's."""
        return len(self.stride) > 1 and self.stride[-1] > self.stride[-2]

    def of(self, tensor: Tensor) -> Tensor:
        """The view itself; a tensor that is on disk as it is comes back as it is."""
        if (
            self.offset == 0
            and self.shape == tuple(tensor.shape)
            and self.stride == tensor.stride()
        ):
            return tensor
        with torch.no_grad():  # or a view of a leaf could not be a plain tensor
            return tensor.as_strided(self.shape, self.stride, self.offset)


def whole(name: str, tensor: Tensor) -> Origin:
    """All of a tensor of the model, as it is."""
    return Origin(name, tuple(tensor.shape), tensor.stride(), 0)


class _Probe(Tensor):
    """A meta tensor that knows its origin's name for as long as it is a view of it."""

    origin: str | None = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.contiguous:  # a copy would forget where it is from
            return args[0]
        found = super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        source = next((one.origin for one in args if isinstance(one, _Probe)), None)
        for one in found if isinstance(found, tuple | list) else (found,):
            if isinstance(one, _Probe) and one._is_view():
                one.origin = source
        return found


def origins(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Origin | None]:
    """Name that `save_pretrained` gives -> where it lies in these tensors of the module, by name.

    None for one that is no view of a single tensor: several put together, or rows interleaved.
    """
    from transformers.core_model_loading import revert_weight_conversion

    probes = {}
    for name, tensor in tensors.items():
        probes[name] = torch.empty(tensor.shape, device="meta").as_subclass(_Probe)
        probes[name].origin = name
    return {
        name: Origin(probe.origin, tuple(probe.shape), probe.stride(), int(probe.storage_offset()))
        if isinstance(probe, _Probe) and probe.origin is not None
        else None
        for name, probe in revert_weight_conversion(module, probes).items()
    }
