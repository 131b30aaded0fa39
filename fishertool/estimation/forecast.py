"""What an estimate will take, from headers alone."""

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

from fishertool.checkpoint.header import TensorInfo
from fishertool.checkpoint.reader import Checkpoint
from fishertool.checkpoint.staging import free_bytes
from fishertool.checkpoint.stored import BITS
from fishertool.estimation.settings import BANK_DTYPES, Settings
from fishertool.fisher.kronecker import MAX_SIDE
from fishertool.models.layers import Layer
from fishertool.report import Report

ACCUMULATOR_BYTES = 8


def bytes_of(
    settings: Settings,
    infos: Sequence[TensorInfo],
    examples: int | None,
    layers: Mapping[str, Layer] | None = None,
) -> dict[str, int]:
    """What each kind takes on disk, at most; of a bank, what is known from headers.

    layers  the linear ones, by weight; without, every matrix is taken for one's
    """
    return {kind: _bytes_of(kind, settings, infos, examples, layers) for kind in settings.kinds}


def _bytes_of(
    kind: str,
    settings: Settings,
    infos: Sequence[TensorInfo],
    examples: int | None,
    layers: Mapping[str, Layer] | None,
) -> int:
    if kind == "rank-one":
        members = -(-(examples or 1) // settings.group)
        bits = BITS[BANK_DTYPES[settings.bank_dtype]]
        return members * sum(info.elements for info in infos) * bits // 8
    if kind in ("diagonal", "mean-gradient"):
        return sum(4 * info.elements for info in infos)
    matrices = [info for info in infos if len(info.shape) > 1]
    if kind == "factored":
        rest = sum(info.elements for info in infos if len(info.shape) < 2)
        return 4 * (rest + sum(info.rows + info.width for info in matrices))
    whole = kind == "kronecker"
    return 4 * sum(_factors(info, layers, whole) for info in matrices)


def _factors(info: TensorInfo, layers: Mapping[str, Layer] | None, whole: bool) -> int:
    """Elements of the second moments of a layer's inputs and, of the `whole` Fisher, gradients."""
    layer = None if layers is None else layers.get(info.name)
    *stack, out, width = info.shape
    experts = layer is not None and layer.kind == "experts"
    if max(out, width) > MAX_SIDE or (stack and (whole or not experts)):
        return 0
    if layers is not None and (layer is None or (layer.kind == "embedding" and not layer.tied)):
        return 0
    if layer is not None and layer.turned:
        out, width = width, out
    return prod(stack) * (width**2 + (out**2 if whole else 0))


def forecast(
    report: Report,
    model: Checkpoint,
    infos: Sequence[TensorInfo],
    needed: Mapping[str, int],
    out: Path,
) -> Report:
    """The report of a dry run that would estimate the Fisher of these tensors."""
    stored = sum(info.nbytes for info in model.infos().values())
    elements = sum(info.elements for info in infos)
    sums = {kind: size // 4 * ACCUMULATOR_BYTES for kind, size in needed.items()}
    sums["rank-one"] = 0
    report.status = "dry-run"
    report.summary = {
        "tensors": len(infos),
        "bytes_to_read": stored,
        "bytes_to_write": sum(needed.values()),
        "bytes_by_kind": dict(needed),
        "free_bytes": free_bytes(out),
        "estimated_peak_bytes": stored + 4 * elements + sum(sums.values()),
    }
    if "rank-one" in needed and report.options["data"]["num_examples"] is None:
        report.warnings.append("the bank's bytes are for one example; give --num-examples for all")
    return report
