"""Which tensors of a checkpoint are matrices that a layer multiplies by, told from the architecture."""

import re
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn

from fishertool.checkpoint.reader import Checkpoint
from fishertool.errors import InputError, some
from fishertool.models.low_rank_layers import is_conv1d, is_linear, token_table
from fishertool.models.names import architecture_of, empty_model, origins_by_disk_name
from fishertool.models.probes import Origin, whole

IN_A_BLOCK = re.compile(r"\.\d+\.")
"""Blocks are numbered, and what lies outside of them is not."""


@dataclass(frozen=True)
class Layer:
    """One tensor on disk, [out, in] or a stack of such."""

    name: str
    kind: str
    """linear; part (of a linear layer that is one in memory and several on disk); expert (the same,
    of a stack); experts (a stack on disk too); embedding."""
    turned: bool
    """Whether it is [in, out]."""
    in_block: bool
    tied: str | None
    """Another name of the same parameter."""
    plain: bool
    """Whether a low-rank module can take its module's place."""


def layers_of(checkpoint: Checkpoint, trust_remote_code: bool = False) -> dict[str, Layer]:
    """By name on disk. Reads headers and config.json, and makes no weights.

    Raises InputError for an architecture that transformers does not have, and for matrices of
    other shapes than it gives them, by name.
    """
    module = empty_model(checkpoint, trust_remote_code)
    if module is None:
        raise InputError(
            f"{checkpoint.folder / 'config.json'}: architecture "
            f"{architecture_of(checkpoint) or 'not given'} is not in transformers, so its linear "
            "layers cannot be told"
        )
    parameters = dict(module.named_parameters(remove_duplicate=False))
    aliases: dict[int, list[str]] = defaultdict(list)
    for name, parameter in parameters.items():
        aliases[id(parameter)].append(name)
    found: dict[str, Layer] = {}
    misfits: list[str] = []
    as_in_memory = {name: whole(name, parameter) for name, parameter in parameters.items()}
    origins = as_in_memory | origins_by_disk_name(module, parameters, checkpoint.folder)
    tokens = token_table(module)
    for name in checkpoint:
        origin = origins.get(name)
        if origin is None:
            continue
        parameter = parameters[origin.name]
        owner = module.get_submodule(origin.name.rpartition(".")[0])
        kind = _kind(owner, origin, parameter)
        if kind is None:
            continue
        if (stored := checkpoint.info(name).shape) != origin.shape:
            misfits.append(f"{name} ({list(stored)} on disk, {list(origin.shape)} by config.json)")
            continue
        others = [alias for alias in aliases[id(parameter)] if alias != origin.name]
        found[name] = Layer(
            name,
            kind,
            _are_turned(owner) != origin.mirrored if kind == "experts" else is_conv1d(owner),
            IN_A_BLOCK.search(name) is not None,
            others[0] if others else None,
            kind == "linear" or owner is tokens,
        )
    if misfits:
        raise InputError(
            f"{checkpoint.folder}: has tensors of another shape than config.json gives them: "
            f"{some(misfits)}; give it the config.json of these weights"
        )
    return found


def _kind(owner: nn.Module, origin: Origin, parameter: torch.Tensor) -> str | None:
    dimensions = len(origin.shape)
    if parameter.dim() == 3:
        return {3: "experts", 2: "expert"}.get(dimensions) if _has_experts(owner) else None
    if dimensions != 2 or not origin.name.endswith(".weight"):
        return None
    if isinstance(owner, nn.Embedding):
        return "embedding"
    if is_linear(owner):
        return "linear" if origin.shape == tuple(parameter.shape) else "part"
    return None


def _are_turned(owner: nn.Module) -> bool:
    """Whether a stack's matrices are [in, out]: as its class says, or else where the last one only
    then gives what the first one takes."""
    if hasattr(owner, "is_transposed"):
        return bool(owner.is_transposed)
    stacks = [one.shape for one in owner.parameters(recurse=False) if one.dim() == 3]
    first, last = stacks[0], stacks[-1]
    return first[1] == last[2] and first[2] != last[1]


def _has_experts(owner: nn.Module) -> bool:
    """Other parameters of three dimensions are kernels of convolutions, or have one for heads."""
    # The attribute is set on every class that transformers can compute as grouped experts.
    return type(owner).__name__.endswith("Experts") or hasattr(owner, "is_transposed")
