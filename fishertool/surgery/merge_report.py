"""What a merge tells of itself."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fishertool.checkpoint.staging import free_bytes
from fishertool.checkpoint.stream import PIECE_ELEMENTS
from fishertool.models.lora_writer import LoraWriter
from fishertool.models.sources import public_reference
from fishertool.report import Files, Report
from fishertool.surgery.merge_plan import MergePlan
from fishertool.surgery.merge_write import Written
from fishertool.surgery.output import (
    BASE_RSS_BYTES,
    checkpoint_output,
    code_left_out,
    row_of,
)


def forecast(plan: MergePlan, threads: int, out: Path) -> dict[str, Any]:
    """What a merge would read, write and hold."""
    sources = plan.inputs.sources
    read = {one for target in plan.targets.values() for one in (*target.sources, target.base)}
    sidecars = [*plan.fishers.values(), *plan.factors.values()]
    nbytes = sum(sources[one[0]].info(one[1]).nbytes for one in read if one is not None)
    nbytes += sum(info.nbytes for one in sidecars for info in one.tensors.infos().values())
    floats = len(sources) + len(plan.fishers) + 4
    return {
        "tensors": _actions(plan),
        "bytes_to_read": nbytes,
        "bytes_to_write": plan.layout.nbytes,
        "shards": len(plan.layout.shards),
        "free_bytes": free_bytes(out),
        "estimated_peak_bytes": BASE_RSS_BYTES + (threads + 1) * floats * 4 * PIECE_ELEMENTS,
    }


def rows(plan: MergePlan, more: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a tensor of the output, with what there is more to tell of it."""
    return [
        {**row_of(tensor, plan.targets[tensor.name].action), **more.get(tensor.name, {})}
        for tensor in plan.layout.tensors
    ]


def tell(
    report: Report, plan: MergePlan, written: Written, folder: Path, by_tensor: bool = False
) -> None:
    """What was written into a folder; with `by_tensor`, the losses predicted too."""
    predicted = written.passed.predicted if by_tensor else {}
    told = {name: {"predicted_loss": found} for name, found in predicted.items()}
    report.tensors = rows(plan, told)
    report.output = checkpoint_output(plan.layout, written.files, plan.companions, folder)
    report.warnings += code_left_out(plan.first, {plan.first.folder: plan.companions})
    report.summary = summary(plan) | {
        "bytes": report.output.bytes,
        "predicted_loss": written.passed.predicted_loss,
    }


def summary(plan: MergePlan) -> dict[str, Any]:
    """The merge in a few figures; weights only where the method has a use for them, and they are
    the same for all tensors."""
    used = "weights" in plan.method.inputs
    weights = {tuple(target.weights) for target in plan.targets.values() if used}
    return {
        "method": plan.method.name,
        "weights": list(weights.pop()) if len(weights) == 1 else None,
        "parameters": plan.layout.parameters,
        "tensors": _actions(plan),
        "rules": {f"{rule.place}: {rule.condition}": rule.tensors for rule in plan.rules},
    }


def _actions(plan: MergePlan) -> dict[str, int]:
    """How many tensors of the output there are of each."""
    return dict(Counter(target.action for target in plan.targets.values()))


def forecast_adapter(plan: MergePlan, lora: LoraWriter, threads: int, out: Path) -> dict[str, Any]:
    """Likewise of a merge that is written as an adapter, where all tensors differ from the base's."""
    found, most = forecast(plan, threads, out), lora.most_bytes
    found |= {"bytes_to_write": most, "shards": 1}
    found["bytes_to_read"] += sum(
        lora.base.info(tensor.name).nbytes for tensor in plan.layout.tensors
    )
    found["estimated_peak_bytes"] += most
    return found


def input_files(plan: MergePlan) -> list[Files]:
    """Everything that was read, with digests."""
    models = set(plan.inputs.models)
    found = [
        (reference, "model" if number in models else "base", source)
        for number, (reference, source) in enumerate(
            zip(plan.inputs.references, plan.inputs.sources, strict=True)
        )
    ]
    found += [
        (plan.inputs.sidecars[number], "fisher", sidecar.tensors)
        for kind in (plan.fishers, plan.factors)
        for number, sidecar in kind.items()
    ]
    return [
        Files.of(public_reference(reference), role, source.digests())
        for reference, role, source in found
    ]
