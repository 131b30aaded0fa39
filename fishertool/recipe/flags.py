"""A recipe from what the command line gives."""

from collections.abc import Mapping, Sequence
from typing import Any

from fishertool.errors import UsageError
from fishertool.recipe.schema import HEADS, Recipe, Slice, Source
from fishertool.recipe.settings import Setting, scalar
from fishertool.recipe.tokens import TokenizerChoice
from fishertool.registry import suggest

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "matena": {
        "normalization": "l2",
        "floor": 1e-6,
        "floor_scale": "absolute",
        "floor_models": "first",
        "power": 1.0,
    }
}
"""The options of the code released with Matena and Raffel 2022; its head stays the first model's."""


def from_flags(
    models: Sequence[str],
    method: str = "linear",
    *,
    fisher: Sequence[str] = (),
    base: str | None = None,
    head: str | None = None,
    settings: Mapping[str, Any] | None = None,
    preset: str | None = None,
    tokenizer: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
) -> Recipe:
    """A merge of whole models.

    fisher     one a model, in their order
    settings   a value each; several, as 0.5,0.7, are one a model, in their order
    preset     settings to start from, under those given
    tokenizer  `union`, `base` or a model

    Raises UsageError for other counts, and for a preset or head policy that there is not.
    """
    if fisher and len(fisher) != len(models):
        raise UsageError(
            f"--fisher: {len(fisher)} sidecars for {len(models)} models; give one --fisher for each, "
            "in their order"
        )
    shared: dict[str, Setting] = {}
    if preset is not None:
        shared |= _preset(preset, method)
        head = head or "keep-first"
    if head is not None and head not in HEADS:
        raise UsageError(f"--head {suggest(head, HEADS)}")
    own: list[dict[str, Setting]] = [{} for _ in models]
    for name, given in (settings or {}).items():
        items = given.split(",") if isinstance(given, str) else given
        several = isinstance(items, list | tuple)
        values = [_value(name, item) for item in (items if several else [items])]
        if len(values) == 1:
            shared[name] = values[0]
        elif len(values) != len(models):
            raise UsageError(f"--set {name} has {len(values)} values for {len(models)} models")
        else:
            for parameters, value in zip(own, values, strict=True):
                parameters[name] = value
    sources = [
        Source(model, None, parameters, fisher[index] if fisher else None)
        for index, (model, parameters) in enumerate(zip(models, own, strict=True))
    ]
    return Recipe(
        method,
        (Slice(tuple(sources)),),
        base,
        shared,
        tokenizer=None if tokenizer is None else TokenizerChoice(tokenizer),
        head=head,
        include=tuple(include),
        exclude=tuple(exclude),
        seed=seed,
    )


def _preset(name: str, method: str) -> Mapping[str, Setting]:
    if name not in PRESETS:
        raise UsageError(f"--preset {suggest(name, PRESETS)}")
    if method != "fisher":
        raise UsageError(f"--preset {name} is for --method fisher, not {method}")
    return PRESETS[name]


def _value(name: str, given: Any) -> bool | int | float | str:
    if given is None:
        return "none"
    value = scalar(given.strip() if isinstance(given, str) else given)
    if value is None or value == "":
        raise UsageError(f"--set {name}: {given!r} is not a finite number, a word, true or false")
    return {"true": True, "false": False}.get(str(value).lower(), value)
