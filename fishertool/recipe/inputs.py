"""Which of the models that a recipe names are merged, and which is their base."""

from collections.abc import Sequence
from dataclasses import replace

from fishertool.errors import UsageError
from fishertool.recipe.schema import Recipe, Slice, Source
from fishertool.registry import Method

FROM_BASE = ("slerp", "nearswap", "arcee-fusion")
"""They go from the first model to the second; mergekit calls the first the base."""


def normalised(recipe: Recipe, method: Method) -> Recipe:
    """The recipe with the models that `method` merges as sources, and the base where it takes one.

    mergekit lists the base among the models. Where the method has a base, it is no model to be
    merged; where it goes from one model to another, it is the first; else it is one like the
    others. Raises UsageError for a base that the method has no use for.
    """
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
            slices.append(replace(piece, base=None, sources=_from_base(piece.sources, base)))
        else:
            _check_listed(piece, base, notes, recipe, method)
            slices.append(replace(piece, base=None))
    tokenizer = recipe.tokenizer
    if tokenizer is not None and tokenizer.source == "base" and recipe.base is not None:
        tokenizer = replace(tokenizer, source=recipe.base)
    return replace(
        recipe,
        slices=tuple(slices),
        base=recipe.base if takes_base else None,
        tokenizer=tokenizer,
        notes=tuple(notes),
    )


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
            notes.append(f"{', '.join(unused)} of {base} has no effect: it is the base")
    return replace(piece, sources=kept)


def _from_base(sources: Sequence[Source], base: str) -> tuple[Source, ...]:
    first = [source for source in sources if source.model == base][:1]
    others = [source for source in sources if source not in first]
    return (*(first or [Source(base, sources[0].layers)]), *others)


def _check_listed(
    piece: Slice, base: str, notes: list[str], recipe: Recipe, method: Method
) -> None:
    if any(source.model == base for source in piece.sources):
        return
    if recipe.where and not recipe.whole:
        note = f"base_model {base} has no effect in method {method.name}, beyond tokenizer: base"
        if note not in notes:
            notes.append(note)
        return
    flag = "base_model" if recipe.where else "--base"
    raise _error(
        recipe, f"method {method.name} takes no {flag}; to merge {base}, list it as a model"
    )


def _error(recipe: Recipe, problem: str) -> UsageError:
    return UsageError(f"{recipe.where}: {problem}" if recipe.where else problem)
