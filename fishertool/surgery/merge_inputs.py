"""What a recipe names, opened and compared by headers."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from fishertool.checkpoint.compare import check_not_quantized, check_same_shape, check_same_tensors
from fishertool.checkpoint.source import TensorSource
from fishertool.errors import InputError, UsageError
from fishertool.models.names import head_names, ignored_buffers
from fishertool.models.prefixed import named_like
from fishertool.models.sources import open_source, public_reference
from fishertool.recipe.schema import Recipe
from fishertool.registry import Method
from fishertool.selection import select
from fishertool.surgery.merge_layers import (
    Arrangement,
    after_stacks,
    arrange_slices,
    arrange_whole,
    own_names,
)


@dataclass
class Inputs:
    """Everything that weights are read from, by number in the order in which the recipe names it."""

    sources: list[TensorSource] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    """The sources as the recipe names them."""
    slices: list[list[int]] = field(default_factory=list)
    bases: list[int | None] = field(default_factory=list)
    """For each slice."""
    sidecars: dict[int, str] = field(default_factory=dict)

    def name(self, number: int) -> str:
        """For messages and reports."""
        return public_reference(self.references[number])

    @property
    def models(self) -> list[int]:
        """Those that are merged."""
        return sorted({number for numbers in self.slices for number in numbers})

    @property
    def listed(self) -> list[str]:
        """The models as the recipe names them. In a merge of whole models, as it lists them, in the
        order of predicted losses: one may be there twice."""
        numbers = self.slices[0] if len(self.slices) == 1 else self.models
        return [self.references[number] for number in numbers]


def open_inputs(opened: ExitStack, recipe: Recipe, method: Method, beside: Sequence[str]) -> Inputs:
    """Open each model and base once, and what is read `beside` them.

    Raises UsageError where the method takes other inputs, or a model has two sidecars.
    """
    inputs = Inputs()

    def number_of(reference: str) -> int:
        if reference not in inputs.references:
            source = opened.enter_context(open_source(reference))
            check_not_quantized(source)
            inputs.references.append(reference)
            inputs.sources.append(source)
        return inputs.references.index(reference)

    for piece in recipe.slices:
        inputs.slices.append([number_of(one.model) for one in piece.sources])
        for one, number in zip(piece.sources, inputs.slices[-1], strict=True):
            if one.fisher is not None:
                known = inputs.sidecars.setdefault(number, one.fisher)
                if known != one.fisher:
                    raise UsageError(
                        f"{one.model}: is given with two sidecars, {known} and {one.fisher}; "
                        "a model has one"
                    )
    for piece in recipe.slices:
        base = piece.base or recipe.base
        _check_counts(method, len(piece.sources), base)
        inputs.bases.append(None if base is None else number_of(base))
    for reference in beside:
        number_of(reference)
    _name_bases_like_models(inputs)
    return inputs


def _name_bases_like_models(inputs: Inputs) -> None:
    for numbers, base in zip(inputs.slices, inputs.bases, strict=True):
        model = inputs.sources[numbers[0]]
        if (
            base is None
            or base in inputs.models
            or all(map(inputs.sources[base].__contains__, model))
        ):
            continue
        inputs.sources[base] = named_like(inputs.sources[base], model)


def arrange(recipe: Recipe, inputs: Inputs) -> tuple[Arrangement, set[str]]:
    """The output's tensors, and the names of those that are merged: others are the first model's,
    and may be anything in the rest."""
    models = [inputs.sources[number] for number in inputs.models]
    heads = _kept_heads(models, recipe.head or "error")
    if recipe.whole:
        whole = [inputs.sources[number] for number in inputs.slices[0]]
        names = [own_names(model) for model in whole]
        known = list(dict.fromkeys(chain(*names)))
        merged = set(select(known, recipe.include, recipe.exclude)) - heads
        merged.difference_update(*map(ignored_buffers, whole))
        check_same_tensors(whole, set(known) - merged, names)
        arrangement = _arrange_whole(whole[0], names[0], len(whole), recipe.graded)
    else:
        arrangement = arrange_slices(_runs(recipe, inputs), heads)
        known = [place.name for place in arrangement.places]
        merged = set(select(known, recipe.include, recipe.exclude)) - heads
    if recipe.head == "keep-first" and not heads:
        told = "head keep-first: no model has a head of its own; all tensors are merged"
        arrangement = replace(arrangement, warnings=[*arrangement.warnings, told])
    return arrangement, merged


def _runs(recipe: Recipe, inputs: Inputs) -> list[list[tuple[TensorSource, tuple[int, int]]]]:
    """Of each slice, which layers of its sources."""
    runs = []
    for piece, numbers in zip(recipe.slices, inputs.slices, strict=True):
        sources = [inputs.sources[number] for number in numbers]
        runs.append(
            [
                (source, one.layers)
                for source, one in zip(sources, piece.sources, strict=True)
                if one.layers is not None
            ]
        )
    return runs


def _arrange_whole(
    first: TensorSource, names: Sequence[str], models: int, graded: bool
) -> Arrangement:
    """Only gradients need to know what comes after the layers."""
    try:
        return arrange_whole(names, models, after_stacks(first, names) if graded else ())
    except InputError:
        told = (
            f"{first.folder.name}: its architecture does not tell what comes after its layers: "
            "gradients give all tensors outside of them their first value"
        )
        return replace(arrange_whole(names, models), warnings=[told])


def check_tensor(
    inputs: Inputs, named: Sequence[tuple[int, str]], base: tuple[int, str] | None
) -> None:
    """Refuse a tensor that one of its sources lacks, or has in another shape."""
    first, name = inputs.sources[named[0][0]], named[0][1]
    for number, other in [*named[1:], *([base] if base else [])]:
        source = inputs.sources[number]
        if other not in source:
            raise InputError(
                f"{source.folder}: lacks {other}, which {first.folder} has as {name}; --exclude it, "
                "or if it is a head's, take the first model's head by --head keep-first"
            )
        check_same_shape(first, source, name, other)


def _check_counts(method: Method, models: int, base: str | None) -> None:
    scaled = base is not None and "base" in method.inputs and "normalize" in method.settings
    fewest = method.models or (1 if scaled else 2)  # one task vector alone is scaled, or negated
    if models < fewest or (method.models is not None and models > fewest):
        wanted = f"{fewest}" if method.models else f"{('one', 'two')[fewest - 1]} or more"
        beside = " beside the base" if base is not None and "base" in method.inputs else ""
        alone = "; to write out the base alone: passthrough" if not models else ""
        raise UsageError(
            f"method {method.name} merges {wanted} models; {models} given{beside}{alone}"
        )
    if base is not None and "base" not in method.inputs:
        raise UsageError(f"method {method.name} takes no --base")
    if base is None and method.inputs.get("base"):
        raise UsageError(f"method {method.name} needs --base, the models' common ancestor")


def _kept_heads(models: Sequence[TensorSource], head: str) -> set[str]:
    """Names of head tensors that stay the first model's; with `error`, heads that differ are refused."""
    if head == "keep-first":
        return {name for model in models for name in head_names(model)}
    first = _classes(models[0])
    for model in models[1:]:
        labels = _classes(model)
        if head == "error" and first and labels and labels != first:
            raise InputError(
                f"{model.folder}: its classes ({', '.join(map(str, labels.values()))}) are not "
                f"those of {models[0].folder} ({', '.join(map(str, first.values()))}); "
                "--head keep-first takes the first model's head, --head merge merges them as they are"
            )
    return set()


def _classes(model: TensorSource) -> dict[str, Any]:
    """Names of a classifier's classes by id, where config.json has them."""
    labels = model.config().get("id2label") or {}
    if not isinstance(labels, dict):
        raise InputError(f"{model.folder / 'config.json'}: id2label maps no ids to names")
    return labels
