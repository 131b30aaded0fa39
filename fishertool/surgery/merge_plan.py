"""What a merge will do, decided from headers alone: everything that can be refused is refused here."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from fishertool import hub
from fishertool.checkpoint.companions import Companions, find_companions
from fishertool.checkpoint.compare import check_not_quantized, check_same_shape, check_same_tensors
from fishertool.checkpoint.dtypes import FLOATING
from fishertool.checkpoint.header import TensorInfo
from fishertool.checkpoint.layout import Layout, lay_out
from fishertool.checkpoint.reader import Checkpoint, open_checkpoint
from fishertool.errors import InputError, UsageError, some
from fishertool.fisher.header import FisherHeader
from fishertool.models.names import head_names, tied_names
from fishertool.registry import Method
from fishertool.selection import select
from fishertool.sidecar import check_fits, open_diagonal


@dataclass(frozen=True)
class MergePlan:
    """All that is decided before the first tensor is read."""

    models: list[Checkpoint]
    base: Checkpoint | None
    sidecars: list[tuple[Checkpoint, FisherHeader]]
    method: Method
    settings: dict[str, Any]
    actions: dict[str, str]
    """What becomes of each output tensor: merge, average (no Fisher exists), equal, keep-first."""
    layout: Layout
    companions: Companions
    allow_nonfinite: bool

    @property
    def dtype(self) -> str:
        """The dtype most output weights have."""
        totals: dict[str, int] = {}
        for tensor in self.outputs():
            totals[tensor.dtype] = totals.get(tensor.dtype, 0) + tensor.elements
        floating = {dtype: count for dtype, count in totals.items() if dtype in FLOATING}
        return max(floating or totals, key=lambda dtype: totals[dtype])

    def outputs(self) -> list[TensorInfo]:
        return [tensor for shard in self.layout.shards for tensor in shard.tensors]


def plan_merge(
    opened: ExitStack,
    sources: Sequence[str],
    fisher: Sequence[str],
    base: str | None,
    chosen: Method,
    settings: dict[str, Any],
    head: str,
    include: Sequence[str],
    exclude: Sequence[str],
    max_shard_bytes: int,
    allow_nonfinite: bool,
) -> MergePlan:
    """Open everything, compare the headers, and decide what becomes of every tensor."""
    models = [opened.enter_context(open_checkpoint(hub.resolve(source))) for source in sources]
    ancestor = None if base is None else opened.enter_context(open_checkpoint(hub.resolve(base)))
    _check_inputs(chosen, settings, len(models), len(fisher), base)
    for checkpoint in [*models, *([ancestor] if ancestor else [])]:
        check_not_quantized(checkpoint)
    first = models[0]
    names = [[name for name in model if name not in tied_names(model)] for model in models]
    apart = _kept_heads(models, head)
    check_same_tensors(models, apart, names)
    selected = set(select(names[0], include, exclude))
    merged = [name for name in names[0] if name in selected and name not in apart]
    actions = dict.fromkeys(names[0], "keep-first")
    for name in merged:
        actions[name] = "merge" if first.info(name).dtype in FLOATING else "equal"
        if ancestor is not None:
            if name not in ancestor:
                raise InputError(f"{ancestor.folder}: lacks {name}, which the models have")
            check_same_shape(first, ancestor, name)
    sidecars = []
    for source, model in zip(fisher, models, strict=False):
        tensors, header = open_diagonal(hub.resolve(source))
        opened.enter_context(tensors)
        check_fits(tensors, header, model)
        sidecars.append((tensors, header))
        for name in merged:
            if name in header.without:
                actions[name] = "average"
        lost = [
            name for name in merged if actions[name] == "merge" and name not in header.statistics
        ]
        if lost:
            raise InputError(
                f"{tensors.folder}: has no Fisher of {some(lost)}; estimate it of all tensors, "
                "or leave these out with --exclude"
            )
    layout = lay_out([first.info(name) for name in names[0]], max_shard_bytes)
    return MergePlan(
        models, ancestor, sidecars, chosen, settings, actions, layout,
        find_companions(first.folder), allow_nonfinite,
    )  # fmt: skip


def _check_inputs(
    chosen: Method, settings: Mapping[str, Any], models: int, sidecars: int, base: str | None
) -> None:
    if "fishers" in chosen.inputs and sidecars != models:
        raise UsageError(
            f"method {chosen.name} needs one --fisher for each of {models} models, in their "
            f"order; {sidecars} given"
        )
    if "fishers" not in chosen.inputs and sidecars:
        raise UsageError(f"method {chosen.name} takes no --fisher")
    if base is not None and "base" not in chosen.inputs:
        raise UsageError(f"method {chosen.name} takes no --base")
    if base is None and settings.get("anchor"):
        raise UsageError("an anchor needs --base, the model to be anchored to")


def _kept_heads(models: Sequence[Checkpoint], head: str) -> set[str]:
    """Names of head tensors that stay the first model's; with `error`, heads that differ are refused."""
    if head == "keep-first":
        return {
            name for model in models for name in head_names(model.config(), model, model.folder)
        }
    first = models[0].config().get("id2label")
    for model in models[1:]:
        labels = model.config().get("id2label")
        if head == "error" and first and labels and labels != first:
            raise InputError(
                f"{model.folder}: its classes ({', '.join(map(str, labels.values()))}) are not "
                f"those of {models[0].folder} ({', '.join(map(str, first.values()))}); "
                "--head keep-first takes the first model's head, --head merge merges them as they are"
            )
    return set()
