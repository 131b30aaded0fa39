"""Which of the models that a recipe names are merged, and which is their base."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from fishertool.errors import UsageError, some
from fishertool.recipe.references import place_of
from fishertool.recipe.schema import Recipe, Slice, Source
from fishertool.recipe.settings import Settings
from fishertool.recipe.write import renamed
from fishertool.registry import Method

WEIGHT = "weight"
FROM_BASE = ("slerp", "nearswap", "arcee-fusion")
"""They go from the first model to the second; mergekit calls the first the base."""
PASSED_OVER = (
    WEIGHT, "density", "gamma", "epsilon", "lambda", "normalize", "rescale", "select_topk",
    "filter_wise",
)  # fmt: skip
"""Parameters that mergekit's files give to methods without a use for them, which pass them over."""
OF_ALL = ("lambda", "normalize", "normalize_weights", "rescale", "select_topk", "filter_wise")
"""Parameters that mergekit reads for all models together, and nowhere else."""
STATISTICS = ("fishers", "activations", "kroneckers")
"""Inputs of methods that mergekit has not."""


def normalised(recipe: Recipe, method: Method) -> Recipe:
    """The recipe with the models that `method` merges as sources, and the base where it takes one.

    mergekit lists the base among the models. Where the method has a base, it is no model to be
    merged; where it goes from one model to another, it is the first; else it is one like the
    others. Raises UsageError for a base that the method has no use for.
    """
    recipe = spelled_alike(recipe)
    takes_base = "base" in method.inputs
    notes = list(recipe.notes)
    slices = []
    for number, piece in enumerate(recipe.slices):
        base = piece.base or recipe.base
        if base is None:
            slices.append(piece)
        elif takes_base:
            slices.append(_without_base(piece, base, notes, recipe, number))
        elif method.name in FROM_BASE:
            sources = _from_base(piece.sources, base, recipe, method)
            slices.append(replace(piece, base=None, sources=sources))
        else:
            _check_listed(piece, base, notes, recipe, method)
            slices.append(replace(piece, base=None))
        if recipe.where:
            notes += _listed_twice(slices[-1], "" if recipe.whole else f" of slices[{number}]")
    recipe = replace(recipe, slices=tuple(slices))
    if recipe.where and not any(name in STATISTICS for name in method.inputs):
        recipe = _without_unused(recipe, method, notes)
        notes += _of_one_model(recipe)
    tokenizer = recipe.tokenizer
    if tokenizer is not None and tokenizer.source == "base" and recipe.base is not None:
        tokenizer = replace(tokenizer, source=recipe.base)
    return replace(
        recipe,
        base=recipe.base if takes_base else None,
        tokenizer=tokenizer,
        seed=recipe.seed if draws(method) else 0,
        notes=tuple(notes),
    )


def known_by(method: Method) -> set[str]:
    """Parameters that a recipe may give to a method."""
    weight = {WEIGHT} if "weights" in method.inputs else set()
    return {name.removesuffix("_") for name in method.settings} | weight


def draws(method: Method) -> bool:
    """Whether it draws at random, by a seed."""
    return "generators" in method.inputs


def spelled_alike(recipe: Recipe) -> Recipe:
    """The recipe with one name for each folder, the first that a model there is given."""
    first: dict[str, str] = {}
    models = [source.model for piece in recipe.slices for source in piece.sources]
    for reference in (*models, *recipe.reads):
        first.setdefault(place_of(reference), reference)
    return renamed(recipe, lambda reference: first.get(place_of(reference), reference))


def weighted(recipe: Recipe, method: Method, weights: Sequence[float]) -> Recipe:
    """A normalised recipe with these weights, one a model of each slice, instead of its own.

    Raises UsageError for another number of them, and for a method that has no use for weights.
    """
    if "weights" not in method.inputs:
        raise UsageError(f"method {method.name} takes no --weights")
    slices = []
    for number, piece in enumerate(recipe.slices):
        if len(weights) != len(piece.sources):
            inside = "" if len(recipe.slices) == 1 else f" in slices[{number}]"
            raise UsageError(
                f"--weights has {len(weights)} numbers for {len(piece.sources)} models{inside}"
            )
        sources = tuple(
            replace(source, parameters={**source.parameters, WEIGHT: weight})
            for source, weight in zip(piece.sources, weights, strict=True)
        )
        parameters = _less(piece.parameters, [WEIGHT])
        slices.append(replace(piece, sources=sources, parameters=parameters))
    return replace(recipe, slices=tuple(slices), parameters=_less(recipe.parameters, [WEIGHT]))


def _without_base(piece: Slice, base: str, notes: list[str], recipe: Recipe, number: int) -> Slice:
    kept = tuple(source for source in piece.sources if source.model != base)
    for source in piece.sources:
        if source.model != base:
            continue
        if kept and source.layers != kept[0].layers:
            raise _error(
                recipe,
                f"slices[{number}]: the base {base} has layers {source.layers}, {kept[0].model} "
                f"{kept[0].layers}; they must be the same",
            )
        unused = [*source.parameters, *(["fisher"] if source.fisher else [])]
        if unused:
            notes.append(f"{', '.join(unused)} of the base has no effect: it is not merged")
    return replace(piece, sources=kept)


def _without_unused(recipe: Recipe, method: Method, notes: list[str]) -> Recipe:
    known = known_by(method)
    scopes = [recipe.parameters, *(piece.parameters for piece in recipe.slices)]
    scopes += [source.parameters for piece in recipe.slices for source in piece.sources]
    given = {name for scope in scopes for name in scope if name in PASSED_OVER} - known
    if not given:
        return recipe
    notes.append(f"{', '.join(sorted(given))} has no effect in method {method.name}")
    return reduced(recipe, given)


def reduced(recipe: Recipe, names: Collection[str]) -> Recipe:
    """The recipe without these parameters, anywhere."""
    slices = [
        replace(
            piece,
            parameters=_less(piece.parameters, names),
            sources=tuple(
                replace(source, parameters=_less(source.parameters, names))
                for source in piece.sources
            ),
        )
        for piece in recipe.slices
    ]
    return replace(recipe, slices=tuple(slices), parameters=_less(recipe.parameters, names))


def _less(settings: Settings, names: Collection[str]) -> Settings:
    return {name: setting for name, setting in settings.items() if name not in names}


def _of_one_model(recipe: Recipe) -> list[str]:
    given = {name for piece in recipe.slices for one in piece.sources for name in one.parameters}
    return [
        f"{name} of one model counts for all; mergekit passes it over there, and reads it in the "
        "recipe's own parameters"
        for name in OF_ALL
        if name in given
    ]


def _listed_twice(piece: Slice, inside: str) -> list[str]:
    listed: dict[object, list[str]] = {}
    for number, source in enumerate(piece.sources, 1):
        listed.setdefault((source.model, source.layers), []).append(str(number))
    return [
        f"models {some(numbers)}{inside} are the same, and count as {len(numbers)}; in mergekit "
        "they count as one"
        for numbers in listed.values()
        if len(numbers) > 1
    ]


def _from_base(
    sources: Sequence[Source], base: str, recipe: Recipe, method: Method
) -> tuple[Source, ...]:
    first = [source for source in sources if source.model == base][:1]
    others = [source for source in sources if source not in first]
    if not first and len(others) > 1:
        raise _error(
            recipe,
            f"method {method.name} goes from the base {base} to one other model; {len(others)} are "
            "listed: leave one out, or let the base be one of them",
        )
    return (*(first or [Source(base, sources[0].layers)]), *others)


def _check_listed(
    piece: Slice, base: str, notes: list[str], recipe: Recipe, method: Method
) -> None:
    if any(source.model == base for source in piece.sources):
        return
    if recipe.where and not recipe.whole:
        note = f"base_model has no effect in method {method.name}, beyond tokenizer: base"
        if note not in notes:
            notes.append(note)
        return
    flag = "base_model" if recipe.where else "--base"
    raise _error(
        recipe, f"method {method.name} takes no {flag}; to merge {base}, list it as a model"
    )


def _error(recipe: Recipe, problem: str) -> UsageError:
    return UsageError(f"{recipe.where}: {problem}" if recipe.where else problem)
