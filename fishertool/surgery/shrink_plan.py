"""What a shrinking will do, decided from headers alone: all that can be refused is refused here."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from fishertool import hub
from fishertool.checkpoint.companions import Companions, find_companions
from fishertool.checkpoint.compare import check_not_quantized
from fishertool.checkpoint.dtypes import FLOATING
from fishertool.checkpoint.layout import Layout, lay_out
from fishertool.checkpoint.reader import Checkpoint, open_checkpoint
from fishertool.errors import InputError, UsageError
from fishertool.models.names import tied_names
from fishertool.models.sentence import transformer_folder
from fishertool.models.units import PATTERNS, Units, check_loads, count_kept, units_of
from fishertool.registry import suggest

METHODS = ("fisher", "magnitude", "random")
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
    def needs_data(self) -> bool:
        return self.method == "fisher" or self.compensate != "none"


@dataclass(frozen=True)
class ShrinkPlan:
    top: Path
    """The model's folder; of sentence-transformers it may hold the checkpoint in one below."""
    checkpoint: Checkpoint
    recipe: ShrinkRecipe
    units: Units
    kept: int
    """Units that stay in every block."""
    layout: Layout
    companions: dict[Path, Companions]
    """By folder."""


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
    folders = dict.fromkeys([top, checkpoint.folder])
    return ShrinkPlan(
        top, checkpoint, recipe, units, kept, lay_out(infos, max_shard_bytes),
        {folder: find_companions(folder) for folder in folders},
    )  # fmt: skip
