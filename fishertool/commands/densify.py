"""`fishertool densify`: a low-rank checkpoint -> the dense one that it stands for."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fishertool import hub
from fishertool.checkpoint.companions import Folders, write_json
from fishertool.checkpoint.digest import FileDigest
from fishertool.checkpoint.dtypes import TORCH, all_finite, representable
from fishertool.checkpoint.header import TensorInfo
from fishertool.checkpoint.layout import Layout, lay_out, parse_size
from fishertool.checkpoint.reader import Checkpoint, open_checkpoint
from fishertool.checkpoint.source import check_finite
from fishertool.checkpoint.staging import REPORT_FILE, check_output, free_bytes, staged
from fishertool.checkpoint.stored import FLOATING
from fishertool.checkpoint.stream import Piece, pieces, stream
from fishertool.checkpoint.writer import CheckpointWriter
from fishertool.errors import InputError
from fishertool.models.low_rank import Factors, factors_of
from fishertool.models.low_rank_layers import is_conv1d, product
from fishertool.models.low_rank_loading import modules_of
from fishertool.models.names import empty_model
from fishertool.models.sentence import weights_folder
from fishertool.plugin import is_low_rank
from fishertool.progress import Advance, Track, silent
from fishertool.report import Files, Report, environment, options_of, public_name
from fishertool.surgery.output import checkpoint_output, code_left_out, row_of


@dataclass(frozen=True)
class _Plan:
    """All that is decided before the first tensor is read."""

    folders: Folders
    checkpoint: Checkpoint
    factors: Mapping[str, tuple[Factors, bool]]
    """By the dense weight's name; and whether that is [in, out]."""
    sources: Mapping[str, str]
    """Output tensors that are copied, and their names in the input."""
    layout: Layout
    allow_nonfinite: bool


def densify(
    model: str,
    out: Path,
    *,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    dry_run: bool = False,
    allow_nonfinite: bool = False,
    threads: int = 1,
    track: Track = silent,
) -> Report:
    """Write W = up @ down in place of every pair of factors, and all else as it is.

    The product is taken in float32 and rounded once, to the factors' dtype.
    """
    report = Report("densify", options_of(locals()), environment=environment(threads, "cpu"))
    with ExitStack() as opened:
        with report.phase("check"):
            top = hub.resolve(model)
            checkpoint = opened.enter_context(open_checkpoint(weights_folder(top)))
            plan = _plan(top, checkpoint, parse_size(max_shard_size), allow_nonfinite)
            check_output(out, [top], overwrite, plan.layout.nbytes)
        report.tensors = _rows(plan)
        report.summary = _summary(plan)
        if dry_run:
            report.status = "dry-run"
            report.summary["free_bytes"] = free_bytes(out)
            return report
        with staged(out, overwrite) as folder:
            with (
                report.phase("densify"),
                track("Densifying", plan.layout.parameters, "weights") as step,
            ):
                digests = _write(plan, folder, threads, step)
            with report.phase("digest"):
                report.inputs = [Files.of(public_name(model), "model", checkpoint.digests())]
            report.output = checkpoint_output(
                plan.layout, digests, plan.folders.of_top, folder, plan.folders.place(folder)
            )
            report.warnings += code_left_out(checkpoint, plan.folders.companions)
            (folder / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
    return report


def _plan(top: Path, checkpoint: Checkpoint, max_shard_bytes: int, allow_nonfinite: bool) -> _Plan:
    folder, config = checkpoint.folder, checkpoint.config()
    if not is_low_rank(config):
        quantized = config.get("quantization_config")
        raise InputError(
            f"{folder}: is not low-rank, "
            + (
                "but quantized otherwise; dequantize it with transformers"
                if quantized
                else "so it is dense already; use it as it is"
            )
        )
    found = factors_of(checkpoint, config["quantization_config"])
    try:
        model = empty_model(checkpoint)
    except InputError as error:
        if "auto_map" not in config:
            raise
        raise InputError(
            f"{folder / 'config.json'}: names code of the model's own (auto_map), which densify does "
            "not run; load it in transformers with trust_remote_code, and dequantize it there"
        ) from error
    if model is None:
        raise InputError(
            f"{folder / 'config.json'}: its architecture is not in transformers, so how its dense "
            "weights lie cannot be told"
        )
    modules = modules_of(model, found, checkpoint)
    factors = {
        one.weight: (one, one.embedding or is_conv1d(model.get_submodule(name)))
        for name, one in modules.items()
    }
    if unknown := [one.module for one in found if one.weight not in factors]:
        raise InputError(
            f"{folder}: has factors of {unknown[0]}, and a {type(model).__name__} no such module"
        )
    inside = {name for one in found for name in (one.down, one.up)}
    renamed = {one.up_bias: one.bias for one in found}
    sources: dict[str, str] = {}
    outputs = []
    for name in checkpoint:
        info = checkpoint.info(name)
        if name in factors:
            one, turned = factors[name]
            shape = (one.inputs, one.outputs) if turned else (one.outputs, one.inputs)
            outputs.append(TensorInfo(name, one.dtype, shape))
        elif name not in inside:
            new = renamed.get(name, name)
            sources[new] = name
            outputs.append(replace(info, name=new))
    layout = lay_out(outputs, max_shard_bytes)
    folders = Folders.of(top, folder)
    return _Plan(folders, checkpoint, factors, sources, layout, allow_nonfinite)


def _write(plan: _Plan, folder: Path, threads: int, advance: Advance) -> list[FileDigest]:
    place = plan.folders.place(folder)
    place.mkdir(parents=True, exist_ok=True)
    with CheckpointWriter(place, plan.layout) as writer:

        def one(piece: Piece) -> None:
            writer.write(piece.name, _piece(plan, piece), piece.start)

        stream(pieces(plan.layout.tensors), one, threads, advance)
        digests = writer.finish()
    config = plan.checkpoint.config()
    del config["quantization_config"]
    write_json(place / "config.json", config)
    plan.folders.copy(folder)
    return digests


def _piece(plan: _Plan, piece: Piece) -> Tensor:
    """Rows of an output tensor, in its stored dtype."""
    checkpoint = plan.checkpoint
    if piece.name not in plan.factors:
        name = plan.sources[piece.name]
        values = checkpoint.read(name, piece.start, piece.stop)
        if checkpoint.info(name).dtype in FLOATING:
            _check_finite(plan, name, values)
        return values
    one, turned = plan.factors[piece.name]
    if one.embedding:
        down = checkpoint.read(one.down, piece.start, piece.stop).T
        up = checkpoint.read(one.up)
    elif turned:
        down = checkpoint.read_columns(one.down, piece.start, piece.stop)
        up = checkpoint.read(one.up)
    else:
        down, up = checkpoint.read(one.down), checkpoint.read(one.up, piece.start, piece.stop)
    for name, values in ((one.down, down), (one.up, up)):
        _check_finite(plan, name, values)
    dense = representable(product(up, down), TORCH[one.dtype]).to(TORCH[one.dtype])
    if not plan.allow_nonfinite and not all_finite(dense):
        raise InputError(
            f"{checkpoint.where(one.weight)}: the product of its factors does not fit {one.dtype}; "
            "go on with --allow-nonfinite, or load it in transformers and dequantize to float32"
        )
    return dense.T if turned else dense


def _check_finite(plan: _Plan, name: str, values: Tensor) -> None:
    if not plan.allow_nonfinite:
        check_finite(plan.checkpoint, name, values)


def _rows(plan: _Plan) -> list[dict[str, Any]]:
    return [
        row_of(tensor, "densify", rank=plan.factors[tensor.name][0].rank)
        if tensor.name in plan.factors
        else row_of(tensor, "keep")
        for tensor in plan.layout.tensors
    ]


def _summary(plan: _Plan) -> dict[str, Any]:
    return {
        "modules": len(plan.factors),
        "parameters": plan.layout.parameters,
        "parameters_before": sum(info.elements for info in plan.checkpoint.infos().values()),
        "bytes": plan.layout.nbytes,
        "bytes_before": sum(shard.path.stat().st_size for shard in plan.checkpoint.shards),
    }
