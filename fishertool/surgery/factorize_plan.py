"""What a factorization will do, decided from headers alone: all that can be refused is refused here."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from fishertool import hub
from fishertool.checkpoint.companions import Folders
from fishertool.checkpoint.compare import check_not_quantized
from fishertool.checkpoint.dtypes import COMPUTED
from fishertool.checkpoint.header import TensorInfo
from fishertool.checkpoint.layout import Layout, lay_out
from fishertool.checkpoint.reader import Checkpoint, open_checkpoint
from fishertool.errors import InputError, UsageError
from fishertool.factorization.rank import Ranks
from fishertool.models.layers import Layer, layers_of
from fishertool.models.low_rank import EMPTY
from fishertool.models.names import tied_names
from fishertool.models.sentence import weights_folder
from fishertool.registry import Method
from fishertool.selection import select
from fishertool.surgery.factorize_ranks import Budget
from fishertool.surgery.factorize_statistics import SUFFICES, Statistics, open_statistics
from fishertool.surgery.matrix import Matrix, matrices_of

FORMATS = ("low-rank", "dense")
NOT_PLAIN = {
    "part": "one layer in memory with others",
    "expert": "experts are one tensor in memory",
    "experts": "experts are one tensor",
    "embedding": "an embedding of other things than tokens, or of a class of its own",
}


@dataclass(frozen=True)
class Refined:
    """A method with its settings, and the one whose result it starts from."""

    method: Method
    settings: dict[str, Any]
    start: Method | None = None

    @property
    def methods(self) -> list[Method]:
        return [self.method, *([self.start] if self.start else [])]

    @property
    def refines(self) -> bool:
        return "start" in self.method.inputs

    @property
    def inputs(self) -> list[str]:
        """The statistics that are needed."""
        return [name for name in SUFFICES if any(one.inputs.get(name) for one in self.methods)]


@dataclass(frozen=True)
class FactorizePlan:
    """All that is decided before the first tensor is read."""

    folders: Folders
    checkpoint: Checkpoint
    chosen: Refined
    statistics: Statistics
    budget: Budget
    format: str
    matrices: list[Matrix]
    """What is factorized, in file order."""
    layers: dict[str, Layer]
    kept: dict[str, str]
    """Every other tensor, and why it stays."""
    allow_nonfinite: bool
    max_shard_bytes: int

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {matrix.key: matrix.shape for matrix in self.matrices}

    @property
    def others(self) -> int:
        """Parameters of the model that are not to be factorized."""
        names = {matrix.name for matrix in self.matrices} | set(self.kept)
        whole = sum(self.checkpoint.info(name).elements for name in names)
        return whole - sum(matrix.elements for matrix in self.matrices)

    def low_rank(self, ranks: Ranks) -> dict[str, tuple[Matrix, int]]:
        """Name of each tensor on disk that factors stand for in the output."""
        if self.format == "dense":
            return {}
        found = {matrix.name: (matrix, ranks[matrix.key]) for matrix in self.matrices}
        return {name: (matrix, rank) for name, (matrix, rank) in found.items() if rank is not None}

    def layout(self, ranks: Ranks) -> Layout:
        factored = self.low_rank(ranks)
        tensors: list[TensorInfo] = []
        names = {matrix.name for matrix in self.matrices} | set(self.kept)
        for name in self.checkpoint:
            if name in factored:
                tensors += _factors(*factored[name])
            elif name in names:
                new = self.output_name(name, factored)
                tensors.append(replace(self.checkpoint.info(name), name=new))
        return lay_out(tensors, self.max_shard_bytes)

    def output_name(self, name: str, factored: dict[str, tuple[Matrix, int]]) -> str:
        """The bias of a layer goes with the factor that gives its output."""
        module = name.removesuffix(".bias")
        return f"{module}.up.bias" if f"{module}.weight" in factored else name


def plan_factorize(
    opened: ExitStack,
    source: str,
    fisher: str | None,
    chosen: Refined,
    budget: Budget,
    form: str,
    include: Sequence[str],
    exclude: Sequence[str],
    max_shard_bytes: int,
    allow_nonfinite: bool,
    trust_remote_code: bool,
) -> FactorizePlan:
    """Open everything, choose the matrices, and hold the sidecar and the budget against them."""
    top = hub.resolve(source)
    checkpoint = opened.enter_context(open_checkpoint(weights_folder(top)))
    check_not_quantized(checkpoint)
    sidecar = None if fisher is None else hub.resolve(fisher)
    statistics = open_statistics(opened, sidecar, chosen.methods, checkpoint)
    copies = tied_names(checkpoint)
    layers = {
        name: _as_linear(layer)
        for name, layer in layers_of(checkpoint, trust_remote_code).items()
        if name not in copies
    }
    selected, kept = _choose(checkpoint, layers, form, include, exclude)
    matrices: list[Matrix] = []
    for name in checkpoint:
        if name in copies:
            continue
        if name not in selected:
            kept.setdefault(name, "not selected" if name in layers else "no linear weight")
        elif layers[name].kind == "experts" and not statistics.apart(chosen.inputs, name):
            kept[name] = "a stack of experts, of which only a diagonal Fisher and activations tell"
        else:
            matrices += matrices_of(checkpoint, layers[name])
    if not matrices:
        why = sorted({kept[name] for name in selected if name in kept})
        raise UsageError(f"nothing is selected: {'; '.join(why) or 'all is left out'}")
    statistics.check(chosen.inputs, matrices)
    plan = FactorizePlan(
        Folders.of(top, checkpoint.folder), checkpoint, chosen, statistics, budget, form, matrices,
        layers, kept, allow_nonfinite, max_shard_bytes,
    )  # fmt: skip
    budget.check_rank(plan.shapes)
    if budget.is_shared:
        budget.kept_of(plan.shapes, plan.others)
    return plan


def _as_linear(layer: Layer) -> Layer:
    """An embedding is a linear layer of one-hot inputs, whose weight lies as [in, out]."""
    return replace(layer, turned=True) if layer.kind == "embedding" else layer


def _choose(
    checkpoint: Checkpoint,
    layers: dict[str, Layer],
    form: str,
    include: Sequence[str],
    exclude: Sequence[str],
) -> tuple[set[str], dict[str, str]]:
    """Names to factorize, and why some that might be are not."""
    if not layers:
        raise UsageError(f"nothing is selected: {checkpoint.folder} has no linear layer")
    selected, kept = set(select(layers, include, exclude)), {}
    for name in sorted(selected):
        layer, info = layers[name], checkpoint.info(name)
        default = layer.in_block and layer.kind != "embedding" and layer.tied is None
        if not include and not default:
            kept[name] = f"tied to {layer.tied}" if layer.tied else "outside the blocks"
            if layer.kind == "embedding":
                kept[name] = "an embedding"
        elif layer.tied is not None:
            raise InputError(
                f"{checkpoint.where(name)}: is one with {layer.tied}, and cannot be factorized "
                f"alone; leave it out with --exclude {name!r}, or save the model untied"
            )
        elif info.dtype not in COMPUTED or 0 in info.shape:
            kept[name] = f"{info} cannot be decomposed"
        elif form == "low-rank" and not layer.plain:
            kept[name] = f"{NOT_PLAIN[layer.kind]}; --format dense takes it"
        else:
            continue
        selected.discard(name)
    if not selected:
        raise UsageError(
            f"nothing is selected: {'; '.join(sorted(set(kept.values())))}; say what with --include"
        )
    return selected, kept


def _factors(matrix: Matrix, rank: int) -> list[TensorInfo]:
    """An empty weight stops loaders that do not know the format."""
    out, width = matrix.shape
    down = (width, rank) if matrix.layer.kind == "embedding" else (rank, width)
    shapes = {"down.weight": down, "up.weight": (out, rank), "weight": EMPTY}
    return [
        TensorInfo(f"{matrix.module}.{part}", matrix.dtype, shape) for part, shape in shapes.items()
    ]
