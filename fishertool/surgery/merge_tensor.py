"""One tensor of a merge: its pieces are read, merged and rounded."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fishertool.checkpoint.dtypes import TORCH, all_finite, representable
from fishertool.checkpoint.header import TensorInfo
from fishertool.checkpoint.source import TensorSource, check_finite
from fishertool.checkpoint.stored import FLOATING
from fishertool.checkpoint.stream import Piece, pieces
from fishertool.errors import InputError
from fishertool.merging.linear import linear
from fishertool.merging.method import Fisher, Passes, make_passes
from fishertool.merging.parts.blocks import BLOCK_ELEMENTS, blocks
from fishertool.surgery.merge_plan import MergePlan, Target
from fishertool.surgery.merge_statistics import MATRICES


class Part(NamedTuple):
    """What is read of a target for one piece of it, in the dtypes of the files."""

    models: Sequence[Tensor]
    base: Tensor | None
    fishers: Sequence[Fisher]
    """Empty where not every model has one."""

    def to(self, dtype: torch.dtype) -> "Part":
        """Ready to be computed with."""
        models = [model.to(dtype) for model in self.models]
        fishers = [fisher._replace(values=fisher.values.to(dtype)) for fisher in self.fishers]
        return Part(models, None if self.base is None else self.base.to(dtype), fishers)

    def blocks(self) -> Iterator["Part"]:
        """Runs of its rows of which a core's cache holds all that is computed; a vector is one."""
        if self.models[0].ndim == 1 or self.models[0].numel() <= BLOCK_ELEMENTS:
            yield self
            return
        count, base = len(self.models), [] if self.base is None else [self.base]
        for rows in blocks(*self.models, *base, *(fisher.values for fisher in self.fishers)):
            values = rows[count + len(base) :]
            yield Part(
                rows[:count],
                rows[count] if base else None,
                [f._replace(values=v) for f, v in zip(self.fishers, values, strict=True)],
            )


class Look(NamedTuple):
    """What a method's passes over a whole tensor came to."""

    found: Any
    read: bool
    """Whether they read its values, which are finite then."""


def cut(plan: MergePlan, outputs: Iterable[TensorInfo]) -> Iterator[Piece]:
    """The pieces in which these tensors are merged: runs of rows, of which a vector is one."""
    matrices = bool(MATRICES & plan.method.inputs.keys())
    for info in outputs:
        whole = matrices and plan.targets[info.name].action == "merge"
        if info.elements and (whole or len(info.shape) == 1):
            yield Piece(info.name, 0, info.rows, info.elements)
        else:
            yield from pieces([info])


def merge_piece(plan: MergePlan, piece: Piece, look: Look | None) -> tuple[Tensor, Part | None]:
    """The rows of a piece in the output's dtype, and what they were merged from; None where not.

    look  needed where the method makes passes and the tensor is more than this piece
    """
    target = plan.targets[piece.name]
    if target.action in ("keep-first", "equal"):
        take = _kept if target.action == "keep-first" else _equal
        return take(plan, target, piece), None
    # An average of what is not finite is not finite, and then `_fitting` says whose fault it is.
    averaged = target.action != "merge" or plan.method.function is linear
    trusted = look.read if look else averaged and target.base is None
    part = reader(plan, target, trusted=trusted)(piece)
    dtype, stored = computed_in(plan, target), TORCH[target.info.dtype]
    if target.action == "merge" and plan.factors:
        whole = _merge_matrices(plan, target, part.to(dtype))
        merged = representable(whole, stored).to(stored)
    else:
        function = _function(plan, target, piece, part, look)
        merged, done = torch.empty(part.models[0].shape, dtype=stored), 0
        for block in part.blocks():
            rows = function(block.to(dtype))
            assert rows.shape == block.models[0].shape
            merged[done : done + len(rows)] = representable(rows, stored)
            done += len(rows)
    return _fitting(plan, target, merged, part.models), part


def _function(
    plan: MergePlan, target: Target, piece: Piece, part: Part, look: Look | None
) -> Callable[[Part], Tensor]:
    """Merges the blocks of a piece, in their order."""
    if target.action != "merge":
        return lambda block: linear(block.models, target.weights)
    given: dict[str, Any] = {}
    if "generators" in plan.method.inputs:
        given["generators"] = [
            _generator(plan.seed, target.info.name, number, piece.start)
            for number in range(len(target.sources))
        ]
    if plan.method.whole is not None:
        given["whole"] = look.found if look else _look_at(plan, target, part)

    def one(block: Part) -> Tensor:
        inputs = {"weights": target.weights, "base": block.base, "fishers": block.fishers}
        own = {name: inputs[name] for name in inputs if name in plan.method.inputs}
        merged: Tensor = plan.method.function(block.models, **own, **given, **target.settings)
        return merged

    return one


def _look_at(plan: MergePlan, target: Target, part: Part) -> Any:
    """What the passes find out about a tensor of one piece."""
    whole = part.to(computed_in(plan, target))[: shown_to_passes(plan)]
    return make_passes(passes_of(plan, target), lambda: [whole])


def computed_in(plan: MergePlan, target: Target) -> torch.dtype:
    """The dtype of the arithmetic."""
    stored = {plan.inputs.sources[number].info(name).dtype for number, name in target.sources}
    return torch.float64 if "F64" in stored | {target.info.dtype} else torch.float32


def passes_of(plan: MergePlan, target: Target) -> Passes[Any]:
    passes: Passes[Any] = plan.method.passes(target.weights, target.info.elements, target.settings)
    return passes


def shown_to_passes(plan: MergePlan) -> int:
    """How many of a part's fields they are given."""
    return 3 if "fishers" in plan.method.inputs else 2


def reader(plan: MergePlan, target: Target, *, trusted: bool = False) -> Callable[[Piece], Part]:
    """Reads pieces of a target's inputs, and refuses what is not finite.

    trusted  they were read before, and found finite
    """
    named = [(plan.inputs.sources[number], name) for number, name in target.sources]
    base = None if target.base is None else (plan.inputs.sources[target.base[0]], target.base[1])
    fishers = plan.fishers_of(target)
    shape = target.info.shape

    def shaped(rows: Tensor) -> Tensor:
        return rows.reshape(-1, shape[-1]) if len(shape) > 2 else rows

    def one(source: TensorSource, name: str, piece: Piece) -> Tensor:
        values = source.read(name, piece.start, piece.stop)
        if not trusted and not plan.allow_nonfinite:
            check_finite(source, name, values)
        return shaped(values)

    def read(piece: Piece) -> Part:
        models = [one(source, name, piece) for source, name in named]
        found = [
            sidecar.fisher(name, piece.start, piece.stop)
            for sidecar, (_, name) in zip(fishers, named, strict=False)
        ]
        found = [fisher._replace(values=shaped(fisher.values)) for fisher in found]
        return Part(models, None if base is None else one(*base, piece), found)

    return read


def _merge_matrices(plan: MergePlan, target: Target, part: Part) -> Tensor:
    """By the second moments of a linear layer, for which its weight is [out, in]; of experts in a
    stack one by one."""
    named = [(plan.factors[number], name) for number, name in target.sources]

    def one(weights: Sequence[Tensor], expert: int | None = None) -> Tensor:
        models = [
            sidecar.oriented(name, weight)
            for (sidecar, name), weight in zip(named, weights, strict=True)
        ]
        statistics: dict[str, Any] = {}
        if "activations" in plan.method.inputs:
            moments = [sidecar.activation(name, expert) for sidecar, name in named]
            statistics["activations"] = moments
        else:
            statistics["kroneckers"] = [sidecar.kronecker(name) for sidecar, name in named]
        merged = plan.method.function(models, target.weights, **statistics, **target.settings)
        sidecar, name = named[0]
        return sidecar.oriented(name, merged)

    *stack, rows, _ = target.info.shape
    if not stack:
        return one(part.models)
    experts = zip(*(torch.split(model, rows) for model in part.models), strict=True)
    return torch.cat([one(weights, expert) for expert, weights in enumerate(experts)])


def _generator(seed: int, name: str, model: int, start: int) -> torch.Generator:
    """Of its own for every piece, so that draws do not depend on the order of work."""
    digest = hashlib.sha256(f"{seed}\0{name}\0{model}\0{start}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _kept(plan: MergePlan, target: Target, piece: Piece) -> Tensor:
    number, name = target.sources[0]
    source = plan.inputs.sources[number]
    values = source.read(name, piece.start, piece.stop)
    if target.info.dtype not in FLOATING:
        return values
    if not plan.allow_nonfinite:
        check_finite(source, name, values)
    stored = TORCH[target.info.dtype]
    return _fitting(plan, target, representable(values, stored).to(stored))


def _equal(plan: MergePlan, target: Target, piece: Piece) -> Tensor:
    """Whole numbers, which all models must agree on."""
    number, name = target.sources[0]
    first = plan.inputs.sources[number]
    values = first.read(name, piece.start, piece.stop)
    for other, same in target.sources[1:]:
        source = plan.inputs.sources[other]
        if not torch.equal(values, source.read(same, piece.start, piece.stop)):
            raise InputError(
                f"{source.where(same)}: its whole numbers differ from {first.folder}'s; "
                "--exclude it to keep the first model's"
            )
    return values


def _fitting(
    plan: MergePlan, target: Target, rounded: Tensor, models: Sequence[Tensor] = ()
) -> Tensor:
    """What was rounded, if it is finite; `models` are what it was made from, if they may be to blame."""
    if not plan.allow_nonfinite and not all_finite(rounded):
        for (number, name), model in zip(target.sources, models, strict=False):
            check_finite(plan.inputs.sources[number], name, model)
        raise InputError(
            f"{plan.first.folder}: tensor {target.info.name}: the merged values do not fit "
            f"{target.info.dtype}; lower the weights, or go on with --allow-nonfinite"
        )
    return rounded
