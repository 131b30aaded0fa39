"""What `fishertool merge` is to merge: a recipe from a file, or one that flags make."""

from dataclasses import replace
from inspect import signature
from math import isfinite
from pathlib import Path
from typing import Any

import typer

from fishertool.cli.flags import flags_of_data, is_given, refuse, set_defaults
from fishertool.cli.values import method_settings, number
from fishertool.errors import UsageError
from fishertool.registry import MERGING, find_method

SETTINGS = ("anchor", "power", "trim")
"""Settings of methods that have a flag of their own."""
NOT_IN_A_RECIPE = ("as_lora", "search_weights")


def load_recipe_or_config(context: typer.Context, path: Path | None) -> Path | None:
    """Keep a file's content, as a pipe is read once; one of flags gives their defaults."""
    if path is not None:
        from fishertool.recipe.document import read_document
        from fishertool.recipe.schema import is_recipe

        context.obj = read_document(path)
        if not is_recipe(context.obj):
            set_defaults(context, context.obj, path)
    return path


def weights_of(given: str | None) -> list[float] | str | None:
    if given is None or given in ("optimal", "optimal-free"):
        return given
    weights = [number("--weights", item) for item in given.split(",")]
    if not all(map(isfinite, weights)):
        raise UsageError(f"--weights {given}: are finite numbers")
    if not any(weights):
        raise UsageError("--weights must not all be 0")
    return weights


def recipe_of(context: typer.Context, config: Path | None) -> Any:
    """What is to be merged, but for --weights: the file's recipe, or one of the flags."""
    from fishertool.recipe.document import Value
    from fishertool.recipe.flags import from_flags
    from fishertool.recipe.schema import DTYPES, is_recipe, parse_recipe

    flags = context.params
    parts = [name for name in signature(from_flags).parameters if name != "settings"]
    if is_recipe(context.obj):
        recipe = parse_recipe(context.obj, str(config))
        said = {*parts, "settings", *SETTINGS} - {"seed"}
        refuse(context, said, f"the recipe {config} says what is merged; change it there")
        if is_given(context, "seed"):
            recipe = replace(recipe, seed=flags["seed"])
    else:
        given = {name: flags[name] for name in parts if flags[name] is not None}
        named = {name: flags[name] for name in SETTINGS}
        settings = method_settings(flags["settings"], **named)
        recipe = from_flags(**{"models": [], **given}, settings=settings)
    if flags["dtype"] is not None:
        dtype = Value(flags["dtype"], "--dtype").word(DTYPES)
        recipe = replace(recipe, dtype=dtype)
    return recipe


def text_of(context: typer.Context, recipe: Any, weights: list[float] | str | None) -> str:
    """The whole merge as a recipe. Raises UsageError for what a recipe cannot say."""
    from fishertool.recipe.inputs import normalised, weighted
    from fishertool.recipe.write import to_yaml

    why = "a recipe cannot say it; leave it out with --print-config"
    refuse(context, NOT_IN_A_RECIPE, why)
    if isinstance(weights, str):
        raise UsageError(f"--weights {weights}: {why}")
    method = find_method(MERGING, recipe.method)
    recipe = normalised(recipe, method)
    return to_yaml(recipe if weights is None else weighted(recipe, method, weights))


def check_seed(context: typer.Context, recipe: Any) -> None:
    """Refuse a seed, in a recipe's file or as a flag, where nothing is drawn."""
    from fishertool.recipe.inputs import draws

    if draws(find_method(MERGING, recipe.method)):
        return
    told = f"method {recipe.method} draws nothing; leave it out"
    if recipe.where and context.obj.get("seed") is not None:
        raise UsageError(f"{recipe.where}: seed: {told}")
    if is_given(context, "seed") and context.params["evaluate_on"] is None:
        raise UsageError(f"--seed: {told}")


def check_measuring(context: typer.Context) -> None:
    """Refuse flags of a measurement, or of a search, that is not asked for."""
    if context.params["evaluate_on"] is None:
        names = {*flags_of_data(), "batch_size"}
        refuse(context, names, "needs --evaluate-on, the data to measure on")
    if context.params["search_weights"] is None:
        refuse(context, {"metric", "search_points"}, "needs --search-weights")
