"""Which tensors a merge writes, and what each is called in every model it comes from."""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any

from fishertool.checkpoint.source import TensorSource
from fishertool.errors import InputError, UsageError, some
from fishertool.models.buffers import is_old_buffer
from fishertool.models.layer_stacks import names_after_layers
from fishertool.models.names import tied_names

DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
LAYER = re.compile(r"(^|.*?\.)(\d+)\.")


@dataclass(frozen=True)
class Place:
    """One output tensor: its slice, and its depth there from 0, the first layer and what comes
    before it, to 1, the last layer and what comes after it."""

    name: str
    slice: int
    depth: float
    names: tuple[str, ...]
    """Its name in each of the slice's sources."""


@dataclass(frozen=True)
class Arrangement:
    places: list[Place]
    config: dict[str, Any] = field(default_factory=dict)
    """What it changes in the first model's config."""
    warnings: list[str] = field(default_factory=list)


def layer_of(name: str) -> tuple[str, int] | None:
    """The stack and number of the layer that a tensor is part of.

    >>> layer_of("model.layers.3.mlp.experts.5.up.weight"), layer_of("lm_head.weight")
    (('model.layers.', 3), None)
    """
    match = LAYER.match(name)
    return None if match is None else (match[1], int(match[2]))


def own_names(source: TensorSource) -> list[str]:
    """A model's tensors without the copies of tied ones."""
    tied = tied_names(source)
    return [name for name in source if name not in tied]


def after_stacks(source: TensorSource, names: Sequence[str]) -> list[str]:
    """Of a model's tensors outside its stacks of layers, those that come after their stack.

    Theirs is the one whose name begins most like their own: T5's encoder.final_layer_norm comes
    after encoder.block, its decoder.embed_tokens before decoder.block. Raises InputError for an
    architecture transformers does not have.
    """
    stacks = list(dict.fromkeys(layer[0] for layer in map(layer_of, names) if layer is not None))
    own: dict[str, list[str]] = {stack: [] for stack in stacks}
    for name in [name for name in names if layer_of(name) is None and stacks]:
        own[max(stacks, key=partial(_alike, name))].append(name)
    return [
        name
        for stack, outside in own.items()
        for name in names_after_layers(source, stack, outside)
    ]


def _alike(one: str, other: str) -> int:
    """How many parts of two names are the same, from the first on."""
    parts = zip(one.split("."), other.split("."), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], parts)))


def arrange_whole(names: Sequence[str], models: int, after: Collection[str] = ()) -> Arrangement:
    """All tensors of models of one depth, under their own names; `after` come after the layers."""
    last: dict[str, int] = {}
    layers = [layer_of(name) for name in names]
    for layer in layers:
        if layer is not None:
            last[layer[0]] = max(last.get(layer[0], 0), layer[1])
    places = []
    for name, layer in zip(names, layers, strict=True):
        depth = 1.0 if name in after else 0.0
        if layer is not None:
            depth = layer[1] / last[layer[0]] if last[layer[0]] else 1.0
        places.append(Place(name, 0, depth, (name,) * models))
    return Arrangement(places)


def arrange_slices(
    slices: Sequence[Sequence[tuple[TensorSource, tuple[int, int]]]],
    apart: Collection[str] = (),
) -> Arrangement:
    """Runs of layers put on top of each other, as (source, layers) for each source of each slice.

    What comes before the layers is the first slice's, what comes after them the last's. Raises
    InputError for a model without exactly one stack of layers, and for one in the first or last
    slice with a tensor outside of them that the lowest has not, but for those `apart`; UsageError
    for layers it has not, or for sources of one slice with runs of different length.
    """
    lowest = slices[0][0][0]
    stacks: dict[int, _Stack] = {}
    for sources in slices:
        for source, _ in sources:
            if id(source) not in stacks:
                stacks[id(source)] = _stack_of(source)
    stack = stacks[id(lowest)].name
    places: list[Place] = []
    layers: list[int] = []
    for number, sources in enumerate(slices):
        _check_runs(number, sources, stacks, stack)
        first, (start, stop) = sources[0]
        grouped = stacks[id(first)].layers
        for offset in range(stop - start):
            depth = offset / (stop - start - 1) if stop - start > 1 else 1.0
            for rest in grouped[start + offset]:
                inside = tuple(f"{stack}{run[0] + offset}{rest}" for _, run in sources)
                places.append(Place(f"{stack}{len(layers)}{rest}", number, depth, inside))
            layers.append(start + offset)
    outside = stacks[id(lowest)].outside
    known = {*outside, *apart}
    for source, _ in (*slices[0], *slices[-1]):
        own = [name for name in stacks[id(source)].outside if name not in known]
        if lost := [name for name in own if not is_old_buffer(name, source.info(name).shape)]:
            raise InputError(
                f"{lowest.folder}: lacks {some(lost)}, which {source.folder} has; let the first and "
                "the last slice be of models that both have it, or neither, or leave it out by "
                "--head keep-first if it is a head's"
            )
    after = names_after_layers(lowest, stack, outside)
    before = [
        Place(name, 0, 0.0, (name,) * len(slices[0])) for name in outside if name not in after
    ]
    end = [Place(name, len(slices) - 1, 1.0, (name,) * len(slices[-1])) for name in after]
    changes = config_of_layers(lowest.config(), stacks[id(lowest)].depth, layers)
    return Arrangement([*before, *places, *end], changes)


def config_of_layers(
    config: Mapping[str, Any], depth: int, layers: Sequence[int]
) -> dict[str, Any]:
    """What changes in the config of a model of some depth when these of its layers are put together.

    Raises InputError where it does not say how many layers there are.

    >>> config_of_layers({"n_layer": 3, "layer_types": ["a", "b", "c"]}, 3, [0, 1, 1, 2])
    {'n_layer': 4, 'layer_types': ['a', 'b', 'b', 'c']}
    """
    changes: dict[str, Any] = {key: len(layers) for key in DEPTH_KEYS if config.get(key) == depth}
    if not changes:
        raise InputError(
            f"config.json: none of {', '.join(DEPTH_KEYS)} is {depth}, the number of layers"
        )
    for key, value in config.items():
        if "layer" in key and isinstance(value, list) and len(value) == depth:
            changes[key] = [value[layer] for layer in layers]
    return changes


@dataclass(frozen=True)
class _Stack:
    """A model's layers, found once however many slices are cut from it."""

    name: str
    depth: int
    layers: Mapping[int, list[str]]
    """The tensors of each, by the rest of their names."""
    outside: list[str]
    """All other tensors."""


def _stack_of(source: TensorSource) -> _Stack:
    stacks = {layer[0] for layer in map(layer_of, source) if layer is not None}
    if len(stacks) != 1:
        raise InputError(
            f"{source.folder}: slices need a model with one stack of layers; it has "
            f"{some(sorted(stacks)) if stacks else 'none'}"
        )
    [stack] = stacks
    layers: dict[int, list[str]] = defaultdict(list)
    outside = []
    for name in own_names(source):
        layer = layer_of(name)
        if layer is None:
            outside.append(name)
        else:
            layers[layer[1]].append(name[len(f"{stack}{layer[1]}") :])
    return _Stack(stack, layer_count(source), layers, outside)


def _check_runs(
    number: int,
    sources: Sequence[tuple[TensorSource, tuple[int, int]]],
    stacks: Mapping[int, _Stack],
    stack: str,
) -> None:
    lengths = {stop - start for _, (start, stop) in sources}
    if len(lengths) != 1 or min(lengths) < 1:
        raise UsageError(
            f"slices[{number}]: its sources have {' and '.join(map(str, sorted(lengths)))} layers; "
            "a slice needs as many of each, and one at least"
        )
    for source, (start, stop) in sources:
        own, depth = stacks[id(source)].name, stacks[id(source)].depth
        if own != stack:
            raise InputError(f"{source.folder}: its layers are {own}*, the others' {stack}*")
        if start < 0 or stop > depth:
            raise UsageError(
                f"slices[{number}]: layers {start} to {stop} of {source.folder}, which has {depth}"
            )


def layer_count(source: TensorSource) -> int:
    """Layers of a model, of the longest stack; 0 where no layer is numbered."""
    return max((layer[1] + 1 for layer in map(layer_of, source) if layer is not None), default=0)
