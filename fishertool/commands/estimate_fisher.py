"""`fishertool estimate-fisher`: calibration data -> Fisher sidecar."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast, get_args

import torch
from torch import Tensor, nn

from fishertool import calibration, hub
from fishertool.calibration import CalibrationData, DataOptions
from fishertool.checkpoint.header import TensorInfo
from fishertool.checkpoint.layout import lay_out, parse_size
from fishertool.checkpoint.reader import Checkpoint, open_checkpoint
from fishertool.checkpoint.staging import REPORT_FILE, check_output, free_bytes, staged
from fishertool.checkpoint.writer import CheckpointWriter
from fishertool.errors import InputError, UsageError, some
from fishertool.fisher.estimate import Estimate, estimate_diagonal
from fishertool.fisher.header import FisherHeader, statistics_of
from fishertool.fisher.labels import Labels
from fishertool.models.loading import LoadedModel, check_device, load_model
from fishertool.models.names import parameters_by_disk_name
from fishertool.models.tasks import Task, collate, task_of
from fishertool.progress import Track, silent
from fishertool.registry import suggest
from fishertool.report import (
    Files,
    Output,
    Report,
    data_files,
    environment,
    options_of,
    public_name,
)
from fishertool.selection import select
from fishertool.sidecar import KINDS

EXPECTED_UP_TO_CLASSES = 8
"""`--labels auto` takes the exact mean over classes while it costs so few backward passes."""
ACCUMULATOR_BYTES = 8


def estimate_fisher(
    model: str,
    data: DataOptions,
    out: Path,
    *,
    kind: str = "diagonal",
    labels: str = "auto",
    draws: int = 1,
    task: str = "auto",
    batch_size: int = 8,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    dry_run: bool = False,
    allow_nonfinite: bool = False,
    trust_remote_code: bool = False,
    threads: int = 1,
    device: str = "cpu",
    track: Track = silent,
) -> Report:
    """Estimate the Fisher of every selected weight and write it as a sidecar in `out`."""
    report = Report(
        "estimate-fisher", options_of(locals()), environment=environment(threads, device)
    )
    if kind not in KINDS:
        raise UsageError(f"--kind {suggest(kind, KINDS)}")
    if labels not in ("auto", *get_args(Labels)):
        raise UsageError(f"--labels {suggest(labels, ('auto', *get_args(Labels)))}")
    device = check_device(device)
    torch.set_num_threads(threads)
    with open_checkpoint(hub.resolve(model)) as checkpoint:
        chosen = task_of(checkpoint.config(), checkpoint.folder, task)
        wanted = select(checkpoint, include, exclude)
        size = sum(4 * checkpoint.info(name).elements for name in wanted)
        check_output(out, [checkpoint.folder], overwrite, size)
        if dry_run:
            return _plan(report, checkpoint, wanted, size, out)
        with report.phase("open"):
            loaded = load_model(checkpoint, chosen, device, trust_remote_code)
            if not allow_nonfinite:
                _check_finite(checkpoint, loaded.module)
            parameters, buffers = parameters_by_disk_name(loaded.module, checkpoint)
            parameters = {name: parameters[name] for name in wanted if name in parameters}
            if not parameters:
                raise UsageError("--include and --exclude leave no parameter")
            resolved = _resolve_labels(labels, chosen, loaded)
            texts = calibration.load(
                data,
                loaded.tokenizer,
                loaded.max_length,
                loaded.labels,
                need_labels=chosen.has_labels and resolved == "empirical",
            )
            report.warnings += texts.warnings()
        with (
            report.phase("estimate"),
            track("Estimating", len(texts.examples), "examples") as advance,
        ):
            order = sorted(range(len(texts.examples)), key=lambda i: -texts.examples[i].length)
            estimate = estimate_diagonal(
                loaded.module,
                parameters,
                lambda indices: collate(chosen, texts.examples, indices, loaded.pad_id, device),
                order,
                batch_size,
                labels=resolved,
                draws=draws,
                seed=data.seed,
                advance=advance,
            )
            if not allow_nonfinite:
                _check_estimate(checkpoint, estimate.diagonal)
        with staged(out, overwrite) as folder:
            with report.phase("write"):
                header = FisherHeader(
                    kind=kind,
                    labels=resolved,
                    task=chosen.name,
                    model=public_name(model),
                    fingerprint=checkpoint.fingerprint(),
                    examples=estimate.examples,
                    tokens=texts.tokens,
                    token_ids_sha256=texts.fingerprint(),
                    seed=data.seed,
                    draws=draws if resolved == "sampled" else 1,
                    statistics={
                        name: statistics_of(value) for name, value in estimate.diagonal.items()
                    },
                    without=[name for name in buffers if name in wanted],
                )
                _write(folder, estimate.diagonal, header, parse_size(max_shard_size), report)
                files = list(map(asdict, checkpoint.digests()))
                report.inputs += [Files(public_name(model), "model", files), *data_files(data.data)]
            report.calibration = texts.describe() | {"labels": resolved, "seed": data.seed}
            report.summary = _summary(estimate, header, chosen, texts)
            (folder / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
    return report


def _plan(
    report: Report, checkpoint: Checkpoint, wanted: Sequence[str], size: int, out: Path
) -> Report:
    stored = sum(info.nbytes for info in checkpoint.infos().values())
    report.status = "dry-run"
    report.summary = {
        "tensors": len(wanted),
        "bytes_to_read": stored,
        "bytes_to_write": size,
        "free_bytes": free_bytes(out),
        "estimated_peak_bytes": stored + size // 4 * ACCUMULATOR_BYTES + size,
    }
    return report


def _resolve_labels(labels: str, task: Task, model: LoadedModel) -> Labels:
    if labels == "expected" and not task.has_labels:
        raise UsageError(
            f"--labels expected: a mean over every label of a {task.name} is out of reach; "
            "use sampled, its unbiased estimate"
        )
    if labels != "auto":
        return cast(Labels, labels)
    if not task.has_labels:
        return "empirical"
    return "expected" if len(model.labels or ()) <= EXPECTED_UP_TO_CLASSES else "sampled"


def _check_finite(checkpoint: Checkpoint, module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise InputError(
                f"{checkpoint.folder}: tensor {name} has NaN or Inf; repair it, "
                "or go on with --allow-nonfinite"
            )


def _check_estimate(checkpoint: Checkpoint, diagonal: dict[str, Tensor]) -> None:
    if broken := [name for name, value in diagonal.items() if not bool(value.isfinite().all())]:
        raise InputError(
            f"{checkpoint.folder}: the Fisher of {some(broken)} overflows; "
            "try float32 weights, or go on with --allow-nonfinite"
        )


def _write(
    folder: Path,
    diagonal: dict[str, Tensor],
    header: FisherHeader,
    max_shard_bytes: int,
    report: Report,
) -> None:
    tensors = [TensorInfo(name, "F32", tuple(value.shape)) for name, value in diagonal.items()]
    layout = lay_out(tensors, max_shard_bytes, stem=header.kind, metadata=header.to_metadata())
    with CheckpointWriter(folder, layout) as writer:
        for name, value in diagonal.items():
            writer.write(name, value.cpu())
        files = list(map(asdict, writer.finish()))
    report.output = Output(files, layout.nbytes, layout.parameters, "float32")
    report.tensors = [
        {
            "name": name,
            "shape": list(value.shape),
            "dtype": "F32",
            "action": "estimated",
            "mean": header.statistics[name].total / max(header.statistics[name].elements, 1),
            "zero_fraction": float((value == 0).double().mean()),
        }
        for name, value in diagonal.items()
    ]


def _summary(
    estimate: Estimate, header: FisherHeader, task: Task, texts: CalibrationData
) -> dict[str, object]:
    return {
        "kind": header.kind,
        "labels": header.labels,
        "task": task.name,
        "examples": estimate.examples,
        "tokens": texts.tokens,
        "loss": estimate.loss if _has_targets(task, texts) else None,
        "trace": sum(statistic.total for statistic in header.statistics.values()),
        "parameters": sum(statistic.elements for statistic in header.statistics.values()),
        "one_example_at_a_time": estimate.one_by_one,
        "by_autograd": estimate.by_autograd,
        "fingerprint": header.fingerprint,
    }


def _has_targets(task: Task, texts: CalibrationData) -> bool:
    return not task.has_labels or all(example.label is not None for example in texts.examples)
