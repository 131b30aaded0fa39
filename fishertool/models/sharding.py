"""Weights spread over processes, for models that no one device can hold."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fishertool.errors import InputError, some
from fishertool.models.loading import LoadedModel


def shard(
    loaded: LoadedModel, parameters: Mapping[str, Tensor], device: torch.device, processes: int
) -> dict[str, nn.Parameter]:
    """Leave every process a shard of each weight, by rows; give the sharded `parameters`.

    With FSDP2, the weights of a block are together only while it runs, those outside of the blocks
    (embeddings, head) all the time. The first process has loaded the weights into host memory,
    which must hold them; the others have none (device "meta") and get theirs block by block.

    Raises InputError, by name, for weights that FSDP cannot shard.
    """
    module = loaded.module
    groups = _groups(module, set(getattr(loaded.pretrained, "_no_split_modules", None) or ()))
    in_memory = {id(parameter): name for name, parameter in module.named_parameters()}
    _check(
        module, groups, [name for name, value in parameters.items() if id(value) not in in_memory]
    )
    names = {name: in_memory[id(value)] for name, value in parameters.items()}
    mesh = init_device_mesh(device.type, (processes,))
    for block, parts in reversed(groups.items()):  # the inner ones first
        _place(parts, device)
        fully_shard(block, mesh=mesh)
    sharded = dict(module.named_parameters())
    return {name: sharded[name_there] for name, name_there in names.items()}


def _groups(module: nn.Module, blocks: set[str]) -> dict[nn.Module, list[nn.Module]]:
    """What is sharded together: the module and the blocks in it, each with the modules that are
    in no block further inside."""
    inside: dict[nn.Module, nn.Module] = {}
    for outer in module.modules():
        if outer is module or type(outer).__name__ in blocks:
            inside |= dict.fromkeys(outer.modules(), outer)
    groups: dict[nn.Module, list[nn.Module]] = {}
    for part, block in inside.items():
        groups.setdefault(block, []).append(part)
    return groups


def _place(parts: Iterable[nn.Module], device: torch.device) -> None:
    """Put the first process's tensors in these modules on everyone's device; a tied one stays one."""
    placed: dict[int, tuple[Tensor, Tensor]] = {}
    """By id, what was there, which keeps the id in use, and what is there now."""
    for part in parts:
        tables: list[dict[str, Any]] = [part._parameters, part._buffers]
        for table in tables:
            for name, value in table.items():
                if value is None:
                    continue
                if id(value) not in placed:
                    placed[id(value)] = value, _from_first(value, device)
                table[name] = placed[id(value)][1]


def _from_first(value: Tensor, device: torch.device) -> Tensor:
    whole = torch.empty(value.shape, dtype=value.dtype, device=device)
    if not value.is_meta:
        whole.copy_(value)
    distributed.broadcast(whole, 0)
    return nn.Parameter(whole, False) if isinstance(value, nn.Parameter) else whole


def _check(
    module: nn.Module, groups: Mapping[nn.Module, list[nn.Module]], views: list[str]
) -> None:
    if views:
        raise InputError(f"--fsdp cannot serve weights that are fused on load: {some(views)}")
    if scalars := [name for name, parameter in module.named_parameters() if not parameter.dim()]:
        raise InputError(f"--fsdp cannot shard weights of no dimension: {some(scalars)}")
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in module.parameters()}
    if len(dtypes) > 1:
        raise InputError(
            f"--fsdp needs weights of one dtype, this model has {', '.join(sorted(dtypes))}; "
            "convert it"
        )
    owner: dict[int, nn.Module] = {}
    for block, parts in groups.items():
        for parameter in (one for part in parts for one in part.parameters(recurse=False)):
            if owner.setdefault(id(parameter), block) is not block:
                names = {id(one): name for name, one in module.named_parameters()}
                raise InputError(
                    f"--fsdp cannot shard {names[id(parameter)]}, which several blocks share"
                )
