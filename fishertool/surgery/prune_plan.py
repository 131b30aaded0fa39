"""What a pruning will do, decided from headers alone: all that can be refused is refused here."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

from fishertool import hub
from fishertool.checkpoint.companions import Folders
from fishertool.checkpoint.compare import check_not_quantized
from fishertool.checkpoint.header import TensorInfo
from fishertool.checkpoint.layout import Layout, lay_out
from fishertool.checkpoint.reader import Checkpoint, open_checkpoint
from fishertool.checkpoint.stored import FLOATING
from fishertool.errors import InputError, UsageError, some
from fishertool.fisher.kronecker import MAX_SIDE
from fishertool.models.layers import Layer, layers_of
from fishertool.models.names import tied_names
from fishertool.models.sentence import transformer_folder
from fishertool.selection import select
from fishertool.sidecar import check_fits
from fishertool.surgery.matrix import Matrix, matrices_of
from fishertool.surgery.prune_recipe import TOO_SMALL, Recipe
from fishertool.surgery.prune_statistics import Opened, Statistics, open_kind

SUMMED_STACK = "a stack of experts, over which a factored Fisher is summed"
UNREACHED = "an expert that no token reached"


@dataclass(frozen=True)
class PrunePlan:
    """All that is decided before the first tensor is read."""

    folders: Folders
    checkpoint: Checkpoint
    recipe: Recipe
    statistics: Statistics | None
    """From the sidecars that were given; None where they are yet to be estimated."""
    selected: list[Matrix]
    """In file order; of these, experts that no token reached stay."""
    kept: dict[str, str]
    """Every tensor or expert that stays, by key, and why."""
    layout: Layout
    allow_nonfinite: bool

    @cached_property
    def matrices(self) -> list[Matrix]:
        """What is pruned, in file order."""
        return [matrix for matrix in self.selected if matrix.key not in self.kept]

    @cached_property
    def by_name(self) -> dict[str, list[Matrix]]:
        """Those that are selected, by tensor."""
        found: dict[str, list[Matrix]] = defaultdict(list)
        for matrix in self.selected:
            found[matrix.name].append(matrix)
        return dict(found)

    @property
    def parts(self) -> list[TensorInfo]:
        """Every matrix that is selected and every other tensor, by key, in file order."""
        found: list[TensorInfo] = []
        for name in self.checkpoint:
            if name in self.by_name:
                found += [matrix.info for matrix in self.by_name[name]]
            elif name in self.kept:  # and no copy of a tied tensor
                found.append(self.checkpoint.info(name))
        return found

    @property
    def elements(self) -> int:
        return sum(matrix.elements for matrix in self.matrices)

    def without(self, keys: Collection[str]) -> Self:
        """The same with these experts, of which the data tell nothing, as they are."""
        return replace(self, kept=self.kept | dict.fromkeys(keys, UNREACHED))


def plan_prune(
    opened: ExitStack,
    source: str,
    fisher: str | None,
    general_fisher: str | None,
    recipe: Recipe,
    include: Sequence[str],
    exclude: Sequence[str],
    max_shard_bytes: int,
    allow_nonfinite: bool,
    trust_remote_code: bool,
    has_data: bool,
) -> PrunePlan:
    """Open everything, choose the matrices, and hold pattern and sidecars against them."""
    _check_inputs(recipe, fisher, general_fisher, has_data)
    top = hub.resolve(source)
    checkpoint = opened.enter_context(open_checkpoint(transformer_folder(top)))
    check_not_quantized(checkpoint)
    copies = tied_names(checkpoint)
    layers = layers_of(checkpoint, trust_remote_code)
    statistics = None
    if recipe.kinds and fisher is not None:
        statistics = _open_statistics(opened, recipe, checkpoint, fisher, general_fisher)
    summed = statistics is not None and statistics.factored
    chosen, kept = _choose(checkpoint, layers, include, exclude, summed)
    names = [name for name in checkpoint if name not in copies]
    selected = [
        matrix
        for name in names
        if name in chosen
        for matrix in matrices_of(checkpoint, layers[name])
    ]
    _check_pattern(checkpoint, recipe, selected)
    plan = PrunePlan(
        Folders.of(top, checkpoint.folder), checkpoint, recipe, statistics, selected,
        {name: kept[name] for name in names if name in kept},
        lay_out([checkpoint.info(name) for name in names], max_shard_bytes), allow_nonfinite,
    )  # fmt: skip
    if statistics is not None:
        plan = plan.without(statistics.unreached(selected))
        statistics.check(plan.matrices)
        if "rank-one" in recipe.kinds:
            check_bank(recipe, statistics.bank.members)
    elif "activation" in recipe.kinds:
        _check_inputs_are_seen(checkpoint, selected)
    return plan


def _open_statistics(
    opened: ExitStack, recipe: Recipe, model: Checkpoint, fisher: str, general: str | None
) -> Statistics:
    """The sidecars' parts that the recipe needs.

    Raises InputError for one that lacks a kind, or is of another checkpoint.
    """
    found: list[dict[str, Opened]] = [{}, {}]
    for source, kinds in zip((fisher, general), found, strict=True):
        if source is None:
            continue
        for kind in recipe.kinds:
            tensors, header = kinds[kind] = open_kind(opened, hub.resolve(source), kind)
            check_fits(tensors, header, model)
    return Statistics(*found)


def mask_name(weight: str) -> str:
    """Under which a weight's mask lies beside it."""
    return f"{weight}#mask"


def check_bank(recipe: Recipe, members: int) -> None:
    """Refuse a Fisher that is singular in every block, with damping too small to make up for it."""
    block, damping = recipe.block, recipe.damping
    if (block is None or block > members) and damping is not None and damping < TOO_SMALL:
        size = "F whole" if block is None else f"a block of {block} weights"
        raise UsageError(
            f"--damping {damping:g}: {size} by {members} gradients is singular, and so little "
            f"damping leaves nothing else to tell weights apart; take --block {members} or less, "
            f"--damping {TOO_SMALL:g} or more, or more examples"
        )


def _check_inputs(
    recipe: Recipe, fisher: str | None, general_fisher: str | None, has_data: bool
) -> None:
    name, kinds = recipe.method.name, ", ".join(recipe.kinds)
    if fisher is not None and not recipe.kinds:
        raise UsageError(f"method {name} takes no --fisher")
    if general_fisher is not None and not recipe.needs_general:
        raise UsageError(f"method {name} takes no --general-fisher")
    if recipe.needs_general and (fisher is None or general_fisher is None):
        raise UsageError(
            f"method {name} needs --fisher and --general-fisher, sidecars of diagonal and "
            "mean-gradient on the domain's data and on general data"
        )
    if recipe.kinds and fisher is None and not has_data:
        raise UsageError(
            f"method {name} needs a Fisher of kind {kinds}: --fisher, a sidecar of it, or --data "
            "to estimate it on"
        )
    anew = "estimates the Fisher anew" if recipe.kinds else "changes nothing but what is measured"
    for needed, why in (
        (recipe.gated, "--compensate auto keeps what helps on held-out examples"),
        (
            recipe.has_damping and recipe.damping is None,
            "--damping auto is chosen on held-out examples",
        ),
        (recipe.steps > 1, f"--steps {anew} after each"),
        (recipe.recover_steps > 0, "--recover-steps trains on the data"),
    ):
        if needed and not has_data:
            raise UsageError(f"{why}: give --data")


def _choose(
    checkpoint: Checkpoint,
    layers: dict[str, Layer],
    include: Sequence[str],
    exclude: Sequence[str],
    summed: bool,
) -> tuple[set[str], dict[str, str]]:
    """Names to prune, and why every other tensor stays: linear weights inside the blocks by default."""
    if not layers:
        raise UsageError(f"nothing is selected: {checkpoint.folder} has no linear layer")
    kept = dict.fromkeys(checkpoint, "no linear weight")
    kept |= dict.fromkeys(layers, "not selected")
    chosen: set[str] = set()
    for name in select(layers, include, exclude):
        layer, info = layers[name], checkpoint.info(name)
        if layer.kind == "experts" and summed:
            kept[name] = SUMMED_STACK
        elif info.dtype not in FLOATING or not info.elements:
            kept[name] = f"{info} cannot be computed with"
        elif include or (layer.in_block and layer.kind != "embedding" and layer.tied is None):
            chosen.add(name)
            del kept[name]
        else:
            kept[name] = "an embedding" if layer.kind == "embedding" else "outside the blocks"
    if not chosen:
        why = sorted({kept[name] for name in layers})
        raise UsageError(f"nothing is selected ({'; '.join(why)}); say what with --include")
    return chosen, kept


def _check_inputs_are_seen(checkpoint: Checkpoint, matrices: Sequence[Matrix]) -> None:
    """Refuse matrices of which an estimate keeps no second moment of the input."""
    embeddings = [matrix.name for matrix in matrices if matrix.layer.kind == "embedding"]
    wide = [matrix.name for matrix in matrices if max(matrix.shape) > MAX_SIDE]
    for names, why in (
        (embeddings, "which look tokens up and multiply no input"),
        (wide, f"which have a side of more than {MAX_SIDE}"),
    ):
        if names:
            raise InputError(
                f"{checkpoint.folder}: no activations are estimated of {some(names)}, {why}; leave "
                "these out with --exclude, or take a method that needs none"
            )


def _check_pattern(checkpoint: Checkpoint, recipe: Recipe, matrices: Sequence[Matrix]) -> None:
    odd = {
        f"{matrix.name} {list(matrix.shape)}": None
        for matrix in matrices
        if not recipe.pattern.divides(matrix.shape)
    }
    if odd:
        raise InputError(
            f"{checkpoint.folder}: --pattern {recipe.pattern} does not divide {some([*odd])}; leave "
            "them out with --exclude, or take another pattern"
        )
