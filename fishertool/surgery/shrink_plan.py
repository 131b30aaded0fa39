"""What a shrinking will do, decided from headers alone: all that can be refused is refused here."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from fishertool import hub
from fishertool.checkpoint.companions import Folders
from fishertool.checkpoint.compare import check_not_quantized
from fishertool.checkpoint.layout import Layout, lay_out
from fishertool.checkpoint.reader import Checkpoint, open_checkpoint
from fishertool.checkpoint.stored import FLOATING
from fishertool.errors import InputError, UsageError
from fishertool.models.names import tied_names
from fishertool.models.sentence import transformer_folder
from fishertool.models.units import PATTERNS, Units, check_loads, count_kept, units_of
from fishertool.registry import suggest

METHODS = ("fisher", "obs", "magnitude", "random")
COMPENSATIONS = ("none", "mask", "joint", "auto")


@dataclass(frozen=True)
class ShrinkRecipe:
    """What is asked for; the words are those of `fishertool prune`."""

    pattern: str
    sparsity: float
    method: str = "fisher"
    compensate: str = "none"
    """mask: one factor a unit; joint: all weights of the joining layer; auto: what lowers the
    held-out loss most, if any."""
    rearrange: bool = True
    """Whether `fisher` swaps units by the whole block of the Fisher within a layer."""

    @property
    def tunes_masks(self) -> bool:
        return self.compensate in ("mask", "auto")

    @property
    def needs_data(self) -> bool:
        return self.method in ("fisher", "obs") or self.compensate != "none"


@dataclass(frozen=True)
class ShrinkPlan:
    folders: Folders
    checkpoint: Checkpoint
    recipe: ShrinkRecipe
    units: Units
    kept: int
    """Units that stay in every block."""
    layout: Layout


NOT_STRUCTURED = {
    "fisher": None, "general_fisher": None, "budget": None, "normalize": "none", "block": None,
    "damping": None, "steps": 1, "group": 1, "save_mask": False, "resume": False, "include": (),
    "exclude": (),
}  # fmt: skip
"""Options of `prune` that mean nothing for heads and neurons, and their defaults."""


def check_structured(given: Mapping[str, Any]) -> None:
    """Raises UsageError for an option that is only for single weights."""
    for name, default in NOT_STRUCTURED.items():
        value = given[name]
        if (tuple(value) if isinstance(value, list) else value) != default:
            raise UsageError(
                f"--{name.replace('_', '-')} means nothing for --pattern {given['pattern']}, which "
                "takes units out of every block alike"
            )
    if given["recover_steps"] and given["data"] is None:
        raise UsageError("--recover-steps trains on the data: give --data")


def structured_recipe(
    pattern: str,
    sparsity: float | None,
    method: str,
    compensate: str | None,
    settings: Mapping[str, Any],
) -> ShrinkRecipe:
    """From flags. Raises UsageError for a setting that is not known, or no sparsity."""
    if sparsity is None:
        raise UsageError(f"prune needs --sparsity, the share of {pattern} to leave out, as 0.5")
    for name in settings:
        if name != "rearrange" or method != "fisher":
            raise UsageError(
                f"method {method} of --pattern {pattern} has no setting "
                f"{suggest(name, ['rearrange'] if method == 'fisher' else [])}"
            )
    words = {"true": True, "false": False}
    word = str(settings.get("rearrange", True)).lower()
    if word not in words:
        raise UsageError(f"fisher rearrange: {word!r} is not a bool")
    compensate = compensate or ("joint" if method == "obs" else "none")
    return ShrinkRecipe(pattern, sparsity, method, compensate, words[word])


def check_recipe(recipe: ShrinkRecipe, has_data: bool) -> None:
    """Raises UsageError for an unknown word, and for data that are not given."""
    for flag, value, known in (
        ("--pattern", recipe.pattern, PATTERNS),
        ("--method", recipe.method, METHODS),
        ("--compensate", recipe.compensate, COMPENSATIONS),
    ):
        if value not in known:
            raise UsageError(f"{flag} {suggest(value, known)} (of --pattern {recipe.pattern})")
    if recipe.needs_data and not has_data:
        raise UsageError(
            f"--pattern {recipe.pattern} with --method {recipe.method} and --compensate "
            f"{recipe.compensate} looks at examples: give --data, or take --method magnitude "
            "--compensate none"
        )


def plan_shrink(
    opened: ExitStack,
    source: str,
    recipe: ShrinkRecipe,
    max_shard_bytes: int,
    has_data: bool,
    trust_remote_code: bool = False,
) -> ShrinkPlan:
    """Open the checkpoint, find its units, and see that transformers takes so many."""
    check_recipe(recipe, has_data)
    top = hub.resolve(source)
    checkpoint = opened.enter_context(open_checkpoint(transformer_folder(top)))
    check_not_quantized(checkpoint)
    units = units_of(checkpoint, recipe.pattern)
    kept = count_kept(units, recipe.sparsity)
    shapes = units.shapes(checkpoint, kept)
    for name in shapes:
        if checkpoint.info(name).dtype not in FLOATING:
            raise InputError(
                f"{checkpoint.where(name)}: {checkpoint.info(name)} cannot be computed with"
            )
    check_loads(checkpoint, units, kept, trust_remote_code)
    copies = tied_names(checkpoint)
    infos = [
        replace(checkpoint.info(name), shape=shapes.get(name, checkpoint.info(name).shape))
        for name in checkpoint
        if name not in copies
    ]
    folders = Folders.of(top, checkpoint.folder)
    layout = lay_out(infos, max_shard_bytes)
    return ShrinkPlan(folders, checkpoint, recipe, units, kept, layout)
