"""What a merge will do, decided from headers alone: everything that can be refused is refused here."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fishertool import hub
from fishertool.checkpoint.companions import Companions, find_companions, same_file
from fishertool.checkpoint.compare import settings_that_differ
from fishertool.checkpoint.dtypes import NAMES
from fishertool.checkpoint.header import TensorInfo
from fishertool.checkpoint.layout import Layout, lay_out
from fishertool.checkpoint.source import TensorSource
from fishertool.checkpoint.stored import FLOATING
from fishertool.errors import InputError, UsageError, some
from fishertool.models.chat_template import choose_template
from fishertool.models.layer_stacks import check_layers
from fishertool.models.sources import folders_of, public_reference
from fishertool.models.vocabulary import Vocabulary
from fishertool.paths import expanded
from fishertool.recipe.resolve import Matches, Resolver
from fishertool.recipe.schema import Recipe
from fishertool.registry import Method
from fishertool.surgery.merge_inputs import Inputs, arrange, check_tensor, open_inputs
from fishertool.surgery.merge_layers import Place
from fishertool.surgery.merge_statistics import (
    Sidecar,
    check_complete,
    open_factors,
    open_fishers,
)
from fishertool.surgery.merge_trial import try_settings
from fishertool.surgery.merge_vocabulary import align, choose_vocabulary

STORED = {
    str(dtype).removeprefix("torch."): name for dtype, name in NAMES.items() if name in FLOATING
}
"""Dtypes as a recipe names them -> as a safetensors header does."""


@dataclass(frozen=True)
class Target:
    """One tensor of the output, and what it is made of."""

    info: TensorInfo
    action: str
    """merge, average (the method's statistic does not exist for it), equal (whole numbers), or
    keep-first."""
    sources: tuple[tuple[int, str], ...]
    """Numbers of the plan's sources, each with the tensor's name there."""
    base: tuple[int, str] | None
    weights: list[float]
    settings: dict[str, Any]


@dataclass(frozen=True)
class MergePlan:
    """All that is decided before the first tensor is read."""

    inputs: Inputs
    method: Method
    targets: dict[str, Target]
    places: list[Place]
    """Where each target lies, for the settings it gets."""
    fishers: dict[int, Sidecar]
    """Diagonals by number of the source."""
    factors: dict[int, Sidecar]
    """Second moments of linear layers by number of the source, if the method needs them."""
    layout: Layout
    companions: Companions
    vocabulary: Vocabulary
    chat_template: str | None
    """What replaces the first model's."""
    config: dict[str, Any]
    """What changes in the first model's config."""
    rules: list[Matches]
    """How many tensors each of the recipe's rules decided."""
    folders: list[Path]
    """Everything that is read, which an output must not replace."""
    seed: int
    allow_nonfinite: bool
    warnings: Sequence[str]

    @property
    def first(self) -> TensorSource:
        """The model that config, companion files and tensors left alone are taken from."""
        return self.inputs.sources[0]

    @property
    def predicts(self) -> bool:
        """Whether every model of a merge of whole models tells how its loss on an example depends on
        its weights."""
        return self.unit == "example"

    @property
    def unit(self) -> str | None:
        """What all models' Fishers are means over, in a merge of whole models; None where some have
        no Fisher or another unit."""
        if len(self.inputs.slices) > 1 or not self.fishers.keys() >= set(self.inputs.models):
            return None
        units = {self.fishers[number].header.unit for number in self.inputs.models}
        return units.pop() if len(units) == 1 else None

    def fishers_of(self, target: Target) -> list[Sidecar]:
        """Each model's that is merged, or none where not all of them know the tensor."""
        if target.action not in ("merge", "average"):
            return []
        found = [self.fishers.get(number) for number, _ in target.sources]
        known = [
            one
            for one, (_, name) in zip(found, target.sources, strict=True)
            if one is not None and one.knows(name)
        ]
        return known if len(known) == len(found) else []

    def with_settings(self, resolver: Resolver) -> "MergePlan":
        """The same merge by what a recipe says of every tensor.

        Raises UsageError for a rule that decides none, and for what the method has against it.
        """
        targets = {}
        for place in self.places:
            resolved = resolver.at(place.slice, place.name, place.depth)
            targets[place.name] = replace(
                self.targets[place.name], weights=resolved.weights, settings=resolved.settings
            )
        _check_rules(resolver, len(targets))
        _check_settings(self.method, targets.values())
        return replace(self, targets=targets, rules=resolver.matches(), seed=resolver.recipe.seed)

    def with_weights(self, weights: Sequence[float]) -> "MergePlan":
        """The same merge by other weights, alike for every tensor.

        Raises UsageError for what the method has against them.
        """
        targets = {
            name: replace(target, weights=list(weights)) for name, target in self.targets.items()
        }
        _check_settings(self.method, targets.values())
        return replace(self, targets=targets)


def plan_merge(
    opened: ExitStack,
    recipe: Recipe,
    method: Method,
    max_shard_bytes: int,
    allow_nonfinite: bool,
    trust_remote_code: bool,
    beside: Sequence[str] = (),
) -> MergePlan:
    """Open everything, compare the headers, and decide what becomes of every tensor.

    beside  models that are read and not merged, as the base of an adapter
    """
    resolver = Resolver(recipe, method, public_reference)
    inputs = open_inputs(opened, recipe, method, beside)
    fishers = open_fishers(opened, inputs, method)
    factors = open_factors(opened, inputs, method)
    vocabulary = choose_vocabulary(recipe, inputs, trust_remote_code)
    align(inputs, vocabulary, [fishers, factors])
    arrangement, merged = arrange(recipe, inputs)
    companions = find_companions(inputs.sources[0].folder)
    warnings = [*vocabulary.warnings, *arrangement.warnings]
    warnings += _companions_that_differ(companions, inputs)
    warnings += _settings_that_differ(inputs)
    needed = factors or (fishers if "fishers" in method.inputs else {})
    without = {number: sidecar.without(method) for number, sidecar in needed.items()}
    targets = {}
    for place in arrangement.places:
        target = _target(place, inputs, place.name in merged, recipe.dtype)
        unknown = any(name in without.get(number, ()) for number, name in target.sources)
        if target.action == "merge" and unknown:
            target = replace(target, action="average")
        targets[place.name] = target
    for number, sidecar in [*fishers.items(), *factors.items()]:
        used = _names_in(number, targets.values())
        check_complete(sidecar, used)
        sidecar.measure(used)
    layout = lay_out([target.info for target in targets.values()], max_shard_bytes)
    first = inputs.sources[0]
    config = vocabulary.renumbered(first.config(), inputs.references[0]) | arrangement.config
    if arrangement.config:
        shapes = {name: target.info.shape for name, target in targets.items()}
        check_layers(first, config, shapes, trust_remote_code)
    template = None
    if recipe.chat_template is not None:
        template = choose_template(recipe.chat_template, [one.folder for one in inputs.sources])
    sidecars = [one.tensors.folder for one in (*fishers.values(), *factors.values())]
    plan = MergePlan(
        inputs, method, targets, arrangement.places, fishers, factors, layout, companions,
        vocabulary, template, config, [], [*_named_places(recipe, inputs), *sidecars], recipe.seed,
        allow_nonfinite, warnings,
    )  # fmt: skip
    return plan.with_settings(resolver)


def _named_places(recipe: Recipe, inputs: Inputs) -> list[Path]:
    """Folders of models, adapters and a tokenizer, and the files of a recipe and its template."""
    named = [*inputs.references]
    if recipe.tokenizer is not None and hub.may_be(recipe.tokenizer.source):
        named.append(recipe.tokenizer.source)
    files = [
        expanded(one)
        for one in (recipe.where, recipe.chat_template)
        if one and "{" not in one  # the text of a template is no file
    ]
    folders = [folder for one in named for folder in folders_of(one)]
    return [*folders, *(file for file in files if file.is_file())]


def _companions_that_differ(companions: Companions, inputs: Inputs) -> list[str]:
    """Weights beside the model's own, as a sentence-transformers Dense module's, are not merged."""
    first, *others = [(inputs.name(n), inputs.sources[n].folder) for n in inputs.models]
    return [
        f"{name} is taken from {first[0]} as it is, not merged; {other} has another or none"
        for name in companions.copied
        for other, folder in others
        if name.endswith(".safetensors") and not same_file(first[1] / name, folder / name)
    ]


def _settings_that_differ(inputs: Inputs) -> list[str]:
    first, *others = inputs.sources
    return [
        f"{inputs.name(number)}: its config.json has {some(found)} in {inputs.name(0)}, whose config "
        "the output has"
        for number, other in enumerate(others, 1)
        if (found := settings_that_differ(first.config(), other.config()))
    ]


def _target(place: Place, inputs: Inputs, merged: bool, dtype: str | None) -> Target:
    """Yet without weights and settings."""
    named = tuple(zip(inputs.slices[place.slice], place.names, strict=True))
    ancestor = inputs.bases[place.slice]
    base = None if ancestor is None else (ancestor, place.names[0])
    source, name = inputs.sources[named[0][0]], place.names[0]
    if name not in source:
        raise InputError(
            f"{source.folder}: lacks {name}, which {inputs.sources[0].folder} has; let the first and "
            "the last slice be of models that both have it, or neither"
        )
    stored = source.info(name)
    floating = stored.dtype in FLOATING
    action = ("merge" if floating else "equal") if merged else "keep-first"
    if merged:
        check_tensor(inputs, named, base)
    else:  # the others may not have it
        named, base = named[:1], None
    written = STORED[dtype] if floating and dtype is not None else stored.dtype
    info = TensorInfo(place.name, written, stored.shape)
    return Target(info, action, named, base, [], {})


def _names_in(number: int, targets: Iterable[Target]) -> list[str]:
    """A source's tensors that are merged."""
    merged = [target.sources for target in targets if target.action == "merge"]
    return [name for sources in merged for source, name in sources if source == number]


def _check_rules(resolver: Resolver, tensors: int) -> None:
    for place, pattern in resolver.unmatched():
        raise UsageError(
            f"{resolver.recipe.where}: {place}: {pattern!r} decides none of {tensors} tensors: "
            "it matches none, or only such as an earlier rule decides"
        )


def _check_settings(method: Method, targets: Iterable[Target]) -> None:
    tried = set()
    for target in targets:
        combination = repr((target.weights, target.settings))
        if target.action == "merge" and combination not in tried:
            tried.add(combination)
            if (
                len(target.weights) == 1
                and target.weights[0] != 1
                and target.settings.get("normalize")
            ):
                raise UsageError(
                    f"method {method.name}: the weight of one model has no effect while weights are "
                    "normalized; --set normalize=false"
                )
            try_settings(method, target.weights, target.settings, target.base is not None)
