"""How low-rank layers on disk come into a model in memory."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fishertool.checkpoint.reader import Checkpoint
from fishertool.errors import InputError
from fishertool.models.low_rank import Factors
from fishertool.models.low_rank_layers import (
    LowRankEmbedding,
    LowRankLinear,
    is_conv1d,
    is_linear,
    token_table,
)
from fishertool.models.names import origins_by_disk_name


def modules_of(
    model: Any, factors: Sequence[Factors], checkpoint: Checkpoint
) -> dict[str, Factors]:
    """Names in a dense model of the modules that have factors on disk, and these.

    What belongs to a head, or to another part that a model of this class goes without, is left out.
    Raises InputError, naming the folder and the module, where the model has no such layer.
    """
    names = dict(model.named_parameters(remove_duplicate=False))
    on_disk = origins_by_disk_name(model, names, checkpoint.folder)
    found = {}
    for one in factors:
        if one.weight not in on_disk:
            if not _left_out(model, one, checkpoint):
                raise InputError(
                    f"{checkpoint.folder}: has factors of {one.module}, and a "
                    f"{type(model).__name__} no such module"
                )
            continue
        origin = on_disk[one.weight]
        if origin is None or origin.shape != tuple(names[origin.name].shape):
            raise InputError(
                f"{checkpoint.folder}: {one.module} is a part of a fused weight in a "
                f"{type(model).__name__}, which cannot be low-rank"
            )
        module = origin.name.removesuffix(".weight")
        _check_layer(model, module, one, checkpoint)
        found[module] = one
    return found


def _left_out(model: Any, one: Factors, checkpoint: Checkpoint) -> bool:
    prefix = f"{model.base_model_prefix}."
    is_head = not one.module.startswith(prefix) and any(
        name.startswith(prefix) for name in checkpoint
    )
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    return is_head or any(re.search(pattern, one.weight) for pattern in patterns)


def _check_layer(model: Any, module: str, one: Factors, checkpoint: Checkpoint) -> None:
    layer = model.get_submodule(module)
    ties = model.all_tied_weights_keys
    if f"{module}.weight" in {*ties, *ties.values()}:
        raise InputError(
            f"{checkpoint.folder}: {module} is tied to another weight, and has factors"
        )
    if not (layer is token_table(model) if one.embedding else is_linear(layer)):
        raise InputError(
            f"{checkpoint.folder}: {module} is of class {type(layer).__name__} in a "
            f"{type(model).__name__}, which cannot be low-rank as "
            f"{'token embeddings are' if one.embedding else 'linear layers are'}"
        )
    ours = (one.outputs, one.inputs)
    shape = tuple(layer.weight.shape)
    wanted = shape[::-1] if one.embedding or is_conv1d(layer) else shape
    has_bias = getattr(layer, "bias", None) is not None
    if ours != wanted or one.has_bias != has_bias:
        raise InputError(
            f"{checkpoint.folder}: the factors of {one.module} make up {list(ours)}"
            f"{' and a bias' if one.has_bias else ''}; a {type(model).__name__} wants "
            f"{list(wanted)}{' and a bias' if has_bias else ''}"
        )


def put_in(model: Any, modules: Mapping[str, Factors]) -> None:
    """Replace dense layers of a model by low-rank ones, without values yet."""
    for name, one in modules.items():
        layer = model.get_submodule(name)
        like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        up = nn.Linear(one.rank, one.outputs, bias=one.has_bias, **like)
        if one.embedding:
            table = nn.Embedding(one.inputs, one.rank, padding_idx=layer.padding_idx, **like)
            model.set_submodule(name, LowRankEmbedding(table, up))
        else:
            down = nn.Linear(one.inputs, one.rank, bias=False, **like)
            model.set_submodule(name, LowRankLinear(down, up, is_conv1d(layer)))


def check_loaded(model: Any, modules: Mapping[str, Factors], checkpoint: Checkpoint) -> None:
    """Raises InputError for a factor that is not the one on disk, by its last row: transformers
    fills what it finds no tensor for with random numbers, and a padding token's row with zeros."""
    for name, one in modules.items():
        layer = model.get_submodule(name)
        for on_disk, weight in ((one.down, layer.down.weight), (one.up, layer.up.weight)):
            if weight.is_meta:
                continue
            last = len(weight) - 1
            stored = checkpoint.read(on_disk, last, last + 1)[0].to(weight.dtype)
            if not torch.equal(stored.nan_to_num(), weight[last].detach().cpu().nan_to_num()):
                raise InputError(
                    f"{checkpoint.where(on_disk)} did not arrive in {type(model).__name__}; this "
                    "version of transformers loads it otherwise"
                )
