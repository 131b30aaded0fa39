"""Heads and neurons of a checkpoint: which rows and columns of which tensors make one up."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from fishertool.checkpoint.reader import Checkpoint
from fishertool.errors import InputError, UsageError, some
from fishertool.models.names import empty_model, reason_of

PATTERNS = ("heads", "neurons")
T = TypeVar("T")


@dataclass(frozen=True)
class Naming:
    """How an architecture names the layers of a block, and the fields of its config.json."""

    block: str
    """A pattern that ends names before a layer's own."""
    read: tuple[str, ...]
    """Layers whose outputs are units: gate and up; query, key and value."""
    join: str
    """The layer whose inputs are units."""
    turned: bool = False
    """Whether weights are [in, out]."""
    width: str = ""
    """Of neurons: the field that counts them."""
    heads: tuple[str, str] | None = None
    """Of heads: the fields that count them and those of keys, where there is one more, `head_dim`,
    for their size. None where size follows from number, so that none can be left out."""


NAMINGS: dict[str, tuple[Naming, ...]] = {
    "neurons": (
        Naming(r"layer\.\d+\.", ("intermediate.dense",), "output.dense", width="intermediate_size"),
        Naming(r"layer\.\d+\.", ("ffn.lin1",), "ffn.lin2", width="hidden_dim"),
        Naming(r"h\.\d+\.", ("mlp.c_fc",), "mlp.c_proj", turned=True, width="n_inner"),
        Naming(
            r"layers\.\d+\.",
            ("mlp.gate_proj", "mlp.up_proj"),
            "mlp.down_proj",
            width="intermediate_size",
        ),
        Naming(r"layers\.\d+\.", ("mlp.fc1",), "mlp.fc2", width="intermediate_size"),
        Naming(r"layers\.\d+\.", ("fc1",), "fc2", width="ffn_dim"),
    ),
    "heads": (
        Naming(
            r"layers\.\d+\.",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "self_attn.o_proj",
            heads=("num_attention_heads", "num_key_value_heads"),
        ),
        Naming(
            r"layer\.\d+\.",
            ("attention.self.query", "attention.self.key", "attention.self.value"),
            "attention.output.dense",
        ),
        Naming(
            r"layer\.\d+\.",
            ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            "attention.out_lin",
        ),
        Naming(r"h\.\d+\.", ("attn.c_attn",), "attn.c_proj", turned=True),
    ),
}


@dataclass(frozen=True)
class Cut:
    """A tensor of which each unit has a run of `features` along one dimension."""

    name: str
    dimension: int
    features: int


@dataclass(frozen=True)
class Block:
    """The units of one layer of the model."""

    join: Cut
    """The weight whose inputs they are."""
    read: tuple[Cut, ...]
    """Weights and biases whose outputs they are."""


@dataclass(frozen=True)
class Units:
    pattern: str
    blocks: tuple[Block, ...]
    number: int
    """In every block."""
    turned: bool
    config: Mapping[str, int]
    """Fields of config.json that count them, and how much each unit counts for."""
    fixed: Mapping[str, int]
    """Fields that are to be said once fewer are left."""

    def changes(self, kept: int) -> dict[str, int]:
        """What config.json says of a checkpoint with so many."""
        return {**{field: kept * each for field, each in self.config.items()}, **self.fixed}

    def shapes(self, checkpoint: Checkpoint, kept: int) -> dict[str, tuple[int, ...]]:
        """Of the tensors that change."""
        found = {}
        for cut in (cut for block in self.blocks for cut in (block.join, *block.read)):
            shape = list(checkpoint.info(cut.name).shape)
            shape[cut.dimension] = kept * cut.features
            found[cut.name] = tuple(shape)
        return found


def units_of(checkpoint: Checkpoint, pattern: str) -> Units:
    """The heads, in whole groups that share keys and values, or the neurons of every block.

    Read from names and shapes. Raises InputError where there are none that are known by name, where
    blocks have different numbers of them, or where heads cannot be left out, with the reason.
    """
    for naming in NAMINGS[pattern]:
        join = re.compile(rf"((?:.*\.)?{naming.block}){re.escape(naming.join)}\.weight")
        prefixes = [match[1] for name in checkpoint if (match := join.fullmatch(name))]
        if not prefixes or f"{prefixes[0]}{naming.read[0]}.weight" not in checkpoint:
            continue
        if pattern == "neurons":
            return _neurons(checkpoint, naming, prefixes)
        if naming.heads is None:
            raise InputError(
                f"{checkpoint.folder}: heads of {_architecture(checkpoint)} cannot be left out: "
                "its config.json has no field for their size, which is the hidden size by the "
                "number of heads, so fewer would each be larger; --pattern neurons can be"
            )
        return _heads(checkpoint, naming, prefixes, naming.heads)
    known = ", ".join(naming.join for naming in NAMINGS[pattern])
    raise InputError(
        f"{checkpoint.folder}: no {pattern} are known by name in {_architecture(checkpoint)}; "
        f"they are looked for before layers named {known}"
    )


def check_loads(
    checkpoint: Checkpoint, units: Units, kept: int, trust_remote_code: bool = False
) -> None:
    """Refuse a number of units that transformers makes no model of, or none that runs.

    Raises InputError with its reason, and with the numbers of heads it does take.
    """
    reason = _refusal(checkpoint, units, kept, trust_remote_code)
    if reason is None:
        return
    offered = ""
    if units.pattern == "heads":
        others = (
            n
            for n in range(1, units.number)
            if _refusal(checkpoint, units, n, trust_remote_code) is None
        )
        offered = f"; of {units.number} groups it takes {', '.join(map(str, others)) or 'no fewer'}"
    raise InputError(
        f"{checkpoint.folder}: transformers makes no {_architecture(checkpoint)} of {kept} "
        f"{'groups of heads' if units.pattern == 'heads' else 'neurons'}: {reason}{offered}"
    )


def count_kept(units: Units, sparsity: float) -> int:
    """How many stay in every block, one at least.

    Raises UsageError for a sparsity that is out of range, or so small that all stay.
    """
    if not 0 < sparsity < 1:
        raise UsageError(f"--sparsity {sparsity}: is above 0 and below 1")
    kept = units.number - round(sparsity * units.number)
    if not 0 < kept < units.number:
        raise UsageError(
            f"--sparsity {sparsity}: leaves {kept} of the {units.number} "
            f"{'groups of heads' if units.pattern == 'heads' else 'neurons'} of a block; "
            f"one is {1 / units.number:.3g}"
        )
    return kept


def _neurons(checkpoint: Checkpoint, naming: Naming, prefixes: list[str]) -> Units:
    dimension = 0 if naming.turned else 1
    widths = {
        prefix: checkpoint.info(f"{prefix}{naming.join}.weight").shape[dimension]
        for prefix in prefixes
    }
    blocks = tuple(
        Block(
            Cut(f"{prefix}{naming.join}.weight", dimension, 1),
            tuple(
                cut for layer in naming.read for cut in _read(checkpoint, prefix + layer, naming, 1)
            ),
        )
        for prefix in prefixes
    )
    number = _one(checkpoint, "neurons", widths)
    return Units("neurons", blocks, number, naming.turned, {naming.width: 1}, {})


def _heads(
    checkpoint: Checkpoint, naming: Naming, prefixes: list[str], fields: tuple[str, str]
) -> Units:
    """Sizes follow from shapes and the one number of heads that config.json must say."""
    config = checkpoint.config()
    heads = config.get(fields[0])
    if not isinstance(heads, int):
        raise InputError(f"{checkpoint.folder / 'config.json'}: does not say {fields[0]}")
    sides: dict[str, tuple[int, int, int]] = {}
    for prefix in prefixes:
        query, key, _ = (
            checkpoint.info(f"{prefix}{layer}.weight").shape[0] for layer in naming.read
        )
        joined = checkpoint.info(f"{prefix}{naming.join}.weight").shape[1]
        sides[prefix] = query, key, joined
    query, key, joined = _one(checkpoint, "heads", sides)
    size = query // heads
    groups = key // max(size, 1)
    if query != heads * size or joined != query or key != groups * size or heads % groups:
        raise InputError(
            f"{checkpoint.folder}: {heads} heads in config.json do not go into queries of {query}, "
            f"keys of {key} and an output layer of {joined} inputs"
        )
    each = query // groups
    blocks = tuple(
        Block(
            Cut(f"{prefix}{naming.join}.weight", 1, each),
            tuple(
                cut
                for layer, rows in zip(naming.read, (each, size, size), strict=True)
                for cut in _read(checkpoint, prefix + layer, naming, rows)
            ),
        )
        for prefix in prefixes
    )
    counts = {fields[0]: heads // groups, fields[1]: 1}
    return Units("heads", blocks, groups, naming.turned, counts, {"head_dim": size})


def _read(checkpoint: Checkpoint, layer: str, naming: Naming, features: int) -> list[Cut]:
    cuts = [Cut(f"{layer}.weight", 1 if naming.turned else 0, features)]
    if f"{layer}.bias" in checkpoint:
        cuts.append(Cut(f"{layer}.bias", 0, features))
    return cuts


def _one(checkpoint: Checkpoint, what: str, found: Mapping[str, T]) -> T:
    values = set(found.values())
    if len(values) > 1:
        raise InputError(
            f"{checkpoint.folder}: blocks have different {what} ({some(list(map(str, values)))}), "
            "and config.json has one number for all"
        )
    return values.pop()


def _refusal(
    checkpoint: Checkpoint, units: Units, kept: int, trust_remote_code: bool
) -> str | None:
    """Why transformers makes no model of the planned shapes that runs; None if it does."""
    try:
        module = empty_model(checkpoint, trust_remote_code, units.changes(kept))
    except InputError as error:
        return reason_of(error)
    if module is None:
        return f"it has no {_architecture(checkpoint)}"
    state, prefix = module.state_dict(), f"{getattr(module, 'base_model_prefix', '')}."
    shapes = units.shapes(checkpoint, kept)
    for name in checkpoint:
        same = (name, prefix + name, name.removeprefix(prefix))
        theirs = next((list(state[one].shape) for one in same if one in state), None)
        if theirs is None and name not in shapes:
            continue  # not read on load, or put together with others
        ours = list(shapes.get(name, checkpoint.info(name).shape))
        if theirs != ours:
            becomes = "would be" if name in shapes else "stays"
            return f"{name} {becomes} {ours}, and its model has {theirs or 'no such tensor'}"
    failure = _failure(module)
    whole = None if failure is None else empty_model(checkpoint, trust_remote_code)
    runs_whole = whole is not None and _failure(whole) is None  # else nothing is told by it
    return f"it does not run: {failure}" if runs_whole else None


def _failure(module: nn.Module) -> str | None:
    """Why a model on the meta device does not run there; None if it does."""
    try:
        with torch.no_grad(), torch.device("meta"):
            module(input_ids=torch.zeros(1, 2, dtype=torch.long))
    except Exception as error:  # an architecture may raise anything
        return reason_of(error)
    return None


def _architecture(checkpoint: Checkpoint) -> str:
    return ", ".join(checkpoint.config().get("architectures") or ["a model of no architecture"])
