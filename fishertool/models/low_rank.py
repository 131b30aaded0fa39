"""Low-rank layers on disk.

W ~ up @ down in place of a linear layer's W [out, in], with down [rank, in] and up [out, rank]. Of a
module M, a checkpoint holds M.down.weight, M.up.weight, M.up.bias where there is a bias, and an
empty M.weight, on whose shape a loader that does not know the format stops. The token embeddings are
such a layer of one-hot vectors, in = vocabulary, and their down lies as [in, rank]. config.json names
the ranks, and the module that is the token embeddings, under `quantization_config`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fishertool.checkpoint.contents import Contents
from fishertool.checkpoint.stored import FLOATING
from fishertool.errors import InputError, some
from fishertool.plugin import METHOD

FORMAT_VERSION = 1
EMPTY = (0,)
"""Shape of what stands in the place of a dense weight."""


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


def factors_of(checkpoint: Contents, settings: Mapping[str, Any]) -> list[Factors]:
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


def _factors(checkpoint: Contents, module: str, rank: Any, embedding: bool) -> Factors:
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
