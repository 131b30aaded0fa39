"""Low-rank layers: what they are on disk, and how they come into a model.

W ~ up @ down in place of a linear layer's W [out, in], with down [rank, in] and up [out, rank]. Of a
module M, a checkpoint holds M.down.weight, M.up.weight, M.up.bias where there is a bias, and an
empty M.weight, on whose shape a loader that does not know the format stops. The token embeddings are
such a layer of one-hot vectors, in = vocabulary, and their down lies as [in, rank]. config.json names
the ranks, and the module that is the token embeddings, under `quantization_config`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fishertool.checkpoint.reader import Checkpoint
from fishertool.checkpoint.stored import FLOATING
from fishertool.errors import InputError, some
from fishertool.models.low_rank_layers import (
    EMPTY,
    LowRankEmbedding,
    LowRankLinear,
    is_linear,
    is_turned,
    token_table,
)
from fishertool.models.names import origins_by_disk_name
from fishertool.plugin import METHOD

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Factors:
    """A low-rank module of a checkpoint; its names on disk."""

    module: str
    rank: int
    inputs: int
    outputs: int
    dtype: str
    has_bias: bool
    embedding: bool = False

    @property
    def weight(self) -> str:
        return f"{self.module}.weight"

    @property
    def bias(self) -> str:
        return f"{self.module}.bias"

    @property
    def down(self) -> str:
        return f"{self.module}.down.weight"

    @property
    def up(self) -> str:
        return f"{self.module}.up.weight"

    @property
    def up_bias(self) -> str:
        return f"{self.module}.up.bias"


def quantization_config(ranks: Mapping[str, int], embedding: str | None) -> dict[str, Any]:
    """What config.json says of modules with these ranks, by their names on disk."""
    told = {"quant_method": METHOD, "format_version": FORMAT_VERSION, "ranks": dict(ranks)}
    return told if embedding is None else {**told, "embedding": embedding}


def factors_of(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> list[Factors]:
    """The low-rank modules of a checkpoint, by what its quantization_config says.

    Raises InputError, naming the folder and the module, unless that and the tensors agree.
    """
    folder = checkpoint.folder
    if settings.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{folder}: low-rank format {settings.get('format_version')!r}; this version of "
            f"fishertool reads {FORMAT_VERSION}"
        )
    ranks = settings.get("ranks")
    if not isinstance(ranks, Mapping) or not ranks:
        raise InputError(f"{folder}: its quantization_config gives no ranks")
    embedding = settings.get("embedding")
    if embedding is not None and (not isinstance(embedding, str) or embedding not in ranks):
        raise InputError(
            f"{folder}: its quantization_config says that the embedding is {embedding!r}, of which "
            "it gives no rank"
        )
    found = [
        _factors(checkpoint, str(module), rank, module == embedding)
        for module, rank in ranks.items()
    ]
    named = {one.weight for one in found}
    if lost := [
        name for name in checkpoint if checkpoint.info(name).shape == EMPTY and name not in named
    ]:
        modules = some([name.removesuffix(".weight") for name in lost])
        raise InputError(f"{folder}: its quantization_config gives no rank for {modules}")
    return found


def _factors(checkpoint: Checkpoint, module: str, rank: Any, embedding: bool) -> Factors:
    folder = checkpoint.folder
    if type(rank) is not int or rank < 1:
        raise InputError(f"{folder}: the rank of {module} is {rank!r}, not a number of at least 1")
    one = Factors(module, rank, 0, 0, "", False)
    if missing := [name for name in (one.down, one.up, one.weight) if name not in checkpoint]:
        raise InputError(
            f"{folder}: lacks {some(missing)}, though config.json gives {module} rank {rank}; "
            "fetch it again, or factorize again"
        )
    down, up, weight = map(checkpoint.info, (one.down, one.up, one.weight))
    inputs = 0 if embedding else 1  # the dimension of down
    for info, side in ((down, 1 - inputs), (up, 1)):
        if len(info.shape) != 2 or info.shape[side] != rank:
            raise InputError(
                f"{checkpoint.where(info.name)} is {list(info.shape)}, but config.json gives "
                f"{module} rank {rank}"
            )
    if weight.shape != EMPTY or down.dtype != up.dtype or up.dtype not in FLOATING:
        raise InputError(
            f"{checkpoint.where(one.weight)} is {weight}, beside {down} and {up}; a low-rank "
            "module's is empty, and its factors have one dtype"
        )
    has_bias = one.up_bias in checkpoint
    return Factors(module, rank, down.shape[inputs], up.shape[0], up.dtype, has_bias, embedding)


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
    wanted = shape[::-1] if one.embedding or is_turned(layer) else shape
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
            model.set_submodule(name, LowRankLinear(down, up, is_turned(layer)))


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
