"""What `fishertool merge` is to merge: a recipe from a file, or one that flags make."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from fishertool.cli.flags import flag_name, is_given, load_config, number, pairs
from fishertool.errors import UsageError

SAID_BY_A_RECIPE = (
    "models", "method", "fisher", "base", "anchor", "power", "preset", "settings", "head",
    "tokenizer", "include", "exclude",
)  # fmt: skip


def load_recipe_or_config(context: typer.Context, path: Path | None) -> Path | None:
    """A recipe is read later; a file of flags gives their defaults."""
    if path is not None:
        from fishertool.recipe.document import read_document
        from fishertool.recipe.schema import is_recipe

        if not is_recipe(read_document(path)):
            load_config(context, path)
    return path


def weights_of(given: str | None) -> list[float] | str | None:
    if given is None or given in ("optimal", "optimal-free"):
        return given
    weights = [number("--weights", item) for item in given.split(",")]
    if not all(0 <= weight < float("inf") for weight in weights) or sum(weights) <= 0:
        raise UsageError("--weights must be at least 0, and not all 0")
    return weights


def recipe_of(
    context: typer.Context, config: Path | None, weights: list[float] | str | None
) -> Any:
    """What is to be merged: the file's recipe, or one of the flags."""
    from fishertool.recipe.document import Value, read_document
    from fishertool.recipe.flags import from_flags
    from fishertool.recipe.schema import DTYPES, is_recipe, parse_recipe

    flags = context.params
    content = None if config is None else read_document(config)
    if is_recipe(content):
        _refuse_flags_of_a_recipe(context, config)
        recipe = parse_recipe(content, str(config))
        if is_given(context, "seed"):
            recipe = replace(recipe, seed=flags["seed"])
    else:
        recipe = from_flags(
            flags["models"] or [],
            flags["method"],
            weights=None if isinstance(weights, str) else weights,
            fisher=flags["fisher"] or [],
            base=flags["base"],
            head=flags["head"],
            settings=_settings(flags),
            preset=flags["preset"],
            tokenizer=flags["tokenizer"],
            include=flags["include"] or [],
            exclude=flags["exclude"] or [],
            seed=flags["seed"],
        )
    if flags["dtype"] is not None:
        dtype = Value(flags["dtype"], "--dtype").word(DTYPES)
        recipe = replace(recipe, dtype=dtype)
    return recipe


def _settings(flags: dict[str, Any]) -> dict[str, Any]:
    chosen: dict[str, Any] = dict(pairs("--set", flags["settings"]))
    for name in ("anchor", "power", "trim"):
        if flags[name] is not None:
            if name in chosen:
                raise UsageError(f"--{name} and --set {name} say it twice")
            chosen[name] = flags[name]
    return chosen


def _refuse_flags_of_a_recipe(context: typer.Context, config: Path | None) -> None:
    for parameter in context.command.params:
        if parameter.name in SAID_BY_A_RECIPE and is_given(context, parameter.name):
            raise UsageError(
                f"{flag_name(parameter)}: the recipe {config} says what is merged; change it there"
            )
