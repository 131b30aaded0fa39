"""`fishertool estimate-fisher`: calibration data -> Fisher sidecar."""

import errno
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from math import ceil
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from fishertool import calibration, hub
from fishertool.calibration import CalibrationData, DataOptions
from fishertool.checkpoint.dtypes import BITS, TORCH
from fishertool.checkpoint.header import TensorInfo
from fishertool.checkpoint.layout import parse_size, show_size
from fishertool.checkpoint.reader import Checkpoint, open_checkpoint
from fishertool.checkpoint.staging import REPORT_FILE, check_output, free_bytes, staged
from fishertool.errors import InputError, UsageError, some
from fishertool.fisher.batches import micro_batches
from fishertool.fisher.estimate import Pass, estimate
from fishertool.fisher.gradient_bank import GradientBank
from fishertool.fisher.header import FisherHeader, TensorStatistics
from fishertool.fisher.kinds import KINDS, Gathering, Stored
from fishertool.fisher.kronecker import MAX_SIDE
from fishertool.fisher.labels import Labels
from fishertool.models.adapters import Adapter, open_adapter
from fishertool.models.loading import LoadedModel, check_device, load_model
from fishertool.models.names import parameters_by_disk_name
from fishertool.models.sentence import transformer_folder
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
from fishertool.sidecar import BankWriter, write_sidecar

EXPECTED_UP_TO_CLASSES = 8
"""`--labels auto` takes the exact mean over classes while it costs so few backward passes."""
BANK_DTYPES = {"bfloat16": "BF16", "float32": "F32"}
ACCUMULATOR_BYTES = 8
ADAPTER_FISHERS = ("merged", "adapter")


def estimate_fisher(
    model: str,
    data: DataOptions,
    out: Path,
    *,
    kind: str = "diagonal",
    labels: str = "auto",
    draws: int = 1,
    group: int = 1,
    bank_dtype: str = "bfloat16",
    task: str = "auto",
    batch_size: str = "auto",
    adapter: str | None = None,
    adapter_fisher: str = "merged",
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
    """Estimate the Fisher of every selected weight and write it as a sidecar in `out`.

    `kind` names one kind or several, with commas; all are gathered in one pass over the data.
    With a LoRA `adapter`, of the weights it is merged into, or (`adapter_fisher` "adapter") of its
    own.
    """
    report = Report(
        "estimate-fisher", options_of(locals()), environment=environment(threads, device)
    )
    kinds = _kinds(kind, labels, draws, group, bank_dtype)
    _check_adapter(adapter, adapter_fisher)
    size = _batch_size(batch_size)
    device = check_device(device)
    torch.set_num_threads(threads)
    with (
        open_checkpoint(transformer_folder(hub.resolve(model))) as checkpoint,
        open_adapter(hub.resolve(adapter)) if adapter else nullcontext() as patch,
    ):
        subject = patch.tensors if patch and adapter_fisher == "adapter" else checkpoint
        chosen = task_of(checkpoint.config(), checkpoint.folder, task)
        chosen.form.check(data, chosen.name)
        wanted = select(subject, include, exclude)
        infos = [subject.info(name) for name in wanted]
        needed = {one: _bytes_of(one, infos, data.num_examples, group, bank_dtype) for one in kinds}
        check_output(out, [checkpoint.folder], overwrite, sum(needed.values()))
        if dry_run:
            return _plan(report, subject, wanted, needed, out)
        with report.phase("open"):
            loaded = load_model(
                checkpoint, chosen, device, trust_remote_code, data.scale, watch_experts=True
            )
            report.warnings += loaded.warnings
            if not allow_nonfinite:
                _check_finite(checkpoint, loaded.pretrained)
            parameters, buffers = parameters_by_disk_name(loaded.pretrained, checkpoint)
            if patch is not None:
                patch.check(loaded.pretrained)
                if subject is checkpoint:
                    patch.merge_into(loaded.pretrained)
                    report.warnings.append(f"{public_name(adapter or '')} is merged into the model")
                else:
                    parameters, buffers = patch.attach(loaded.pretrained), []
            parameters = {name: parameters[name] for name in wanted if name in parameters}
            if not parameters:
                raise UsageError("--include and --exclude leave no parameter")
            resolved = _resolve_labels(labels, chosen, loaded, kinds)
            texts = calibration.load(
                data,
                loaded.tokenizer,
                loaded.max_length,
                loaded.labels,
                chosen.form,
                need_labels=chosen.has_labels and resolved == "empirical",
            )
            report.warnings += texts.warnings()
        header = FisherHeader(
            kind="",
            labels=resolved,
            task=chosen.name,
            model="+".join(public_name(one) for one in (model, adapter) if one),
            fingerprint=subject.fingerprint(),
            examples=len(texts.examples),
            tokens=texts.tokens,
            token_ids_sha256=texts.fingerprint(),
            seed=data.seed,
            draws=draws if resolved == "sampled" else 1,
            without=[name for name in buffers if name in wanted],
        )
        batches = _batches(texts, size, group)
        shard_bytes = parse_size(max_shard_size)
        with ExitStack() as opened:
            folder = opened.enter_context(staged(out, overwrite))
            bank, bank_writer = None, None
            if "rank-one" in kinds:
                members = ceil(len(texts.examples) / group)
                bank_writer = _open_bank(
                    folder, header, parameters, members, group, bank_dtype, shard_bytes
                )
                opened.enter_context(bank_writer)
                dtype = TORCH[BANK_DTYPES[bank_dtype]]
                bank = GradientBank(parameters, bank_writer.write, dtype, group)
            gathering = Gathering(kinds, loaded.module, parameters, bank)
            with (
                report.phase("estimate"),
                track("Estimating", len(texts.examples), "examples") as advance,
            ):
                done = estimate(
                    loaded.module,
                    parameters,
                    lambda indices: collate(chosen, texts.examples, indices, loaded.pad_id, device),
                    batches,
                    gathering.statistics,
                    inputs=gathering.inputs,
                    labels=resolved,
                    draws=draws,
                    seed=data.seed,
                    advance=advance,
                )
            stored = gathering.stored(done.examples)
            if not allow_nonfinite:
                _check_estimate(checkpoint, stored)
            with report.phase("write"):
                layouts, files = [], []
                for name, one in stored.items():
                    complete = _complete(header, name, one, wanted, gathering)
                    layout, digests = write_sidecar(folder, complete, one.tensors, shard_bytes)
                    layouts.append(layout)
                    files += digests
                    report.tensors += _rows(name, one, parameters, done.tokens)
                if bank is not None and bank_writer is not None:
                    layouts.append(bank_writer.layout)
                    files += bank_writer.finish()
                    report.tensors += _bank_rows(bank, parameters, members, bank_dtype)
                report.output = Output(
                    list(map(asdict, files)),
                    sum(layout.nbytes for layout in layouts),
                    sum(layout.parameters for layout in layouts),
                    "float32" if bank is None else bank_dtype,
                )
                inputs = list(map(asdict, checkpoint.digests()))
                report.inputs += [
                    Files(public_name(model), "model", inputs),
                    *_adapter_files(adapter, patch),
                    *data_files(data.data),
                ]
            report.calibration = texts.describe() | {"labels": resolved, "seed": data.seed}
            if done.untouched:
                report.warnings.append(
                    f"{some(done.untouched)}: no part of {chosen.name}, so the Fisher is zero"
                )
            report.summary = _summary(kinds, done, header, stored, parameters, texts.labelled)
            (folder / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
    return report


def _kinds(kind: str, labels: str, draws: int, group: int, bank_dtype: str) -> list[str]:
    """The kinds asked for, in the order of KINDS; what does not go together is refused."""
    asked = [one.strip() for one in kind.split(",")]
    for one in asked:
        if one not in KINDS:
            raise UsageError(f"--kind {suggest(one, KINDS)}")
    if labels not in ("auto", *get_args(Labels)):
        raise UsageError(f"--labels {suggest(labels, ('auto', *get_args(Labels)))}")
    if bank_dtype not in BANK_DTYPES:
        raise UsageError(f"--bank-dtype {suggest(bank_dtype, BANK_DTYPES)}")
    if "rank-one" not in asked:
        for flag, given in (("--group", group != 1), ("--bank-dtype", bank_dtype != "bfloat16")):
            if given:
                raise UsageError(f"{flag} is for --kind rank-one, not {kind}")
    elif labels == "expected" or draws > 1:
        raise UsageError(
            "--kind rank-one keeps one gradient an example: use --labels sampled with one draw, "
            "or empirical"
        )
    return [one for one in KINDS if one in asked]


def _check_adapter(adapter: str | None, adapter_fisher: str) -> None:
    if adapter_fisher not in ADAPTER_FISHERS:
        raise UsageError(f"--adapter-fisher {suggest(adapter_fisher, ADAPTER_FISHERS)}")
    if adapter is None and adapter_fisher != "merged":
        raise UsageError("--adapter-fisher is for --adapter")


def _adapter_files(adapter: str | None, patch: Adapter | None) -> list[Files]:
    if adapter is None or patch is None:
        return []
    return [Files(public_name(adapter), "adapter", list(map(asdict, patch.tensors.digests())))]


def _batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--batch-size {text!r}: auto, or a number of examples")
    return int(text)


def _batches(texts: CalibrationData, size: int | None, group: int) -> list[list[int]]:
    """With groups, one after another, as the bank needs them."""
    sizes = [example.size for example in texts.examples]
    rows = [len(example.texts) for example in texts.examples]
    if group == 1:
        return micro_batches(sizes, rows_each=rows, size=size)
    starts = range(0, len(sizes), group)
    members = [range(start, min(start + group, len(sizes))) for start in starts]
    return [
        batch
        for member in members
        for batch in micro_batches(sizes, member, rows_each=rows, size=size)
    ]


def _bytes_of(
    kind: str, infos: Sequence[TensorInfo], examples: int | None, group: int, bank_dtype: str
) -> int:
    """What a kind takes on disk, at most; of a bank, what is known from headers."""
    if kind == "rank-one":
        members = ceil((examples or 1) / group)
        return members * sum(info.elements for info in infos) * BITS[BANK_DTYPES[bank_dtype]] // 8
    if kind == "diagonal":
        return sum(4 * info.elements for info in infos)
    matrices = [info for info in infos if len(info.shape) > 1]
    if kind == "factored":
        rest = sum(info.elements for info in infos if len(info.shape) < 2)
        return 4 * (rest + sum(info.rows + info.width for info in matrices))
    sides = [
        info.shape for info in matrices if len(info.shape) == 2 and max(info.shape) <= MAX_SIDE
    ]
    return 4 * sum(a * a + (b * b if kind == "kronecker" else 0) for a, b in sides)


def _open_bank(
    folder: Path,
    header: FisherHeader,
    parameters: Mapping[str, Tensor],
    members: int,
    group: int,
    dtype: str,
    shard_bytes: int,
) -> BankWriter:
    size = sum(value.numel() for value in parameters.values()) * members
    needed, free = size * BITS[BANK_DTYPES[dtype]] // 8, free_bytes(folder)
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"the bank takes {show_size(needed)}, {show_size(free)} are free; take fewer "
            "--num-examples, a larger --group, or --include fewer tensors",
            str(folder.parent),
        )
    statistics = {name: TensorStatistics(value.numel()) for name, value in parameters.items()}
    return BankWriter(
        folder,
        replace(header, kind="rank-one", group=group, statistics=statistics),
        {name: tuple(value.shape) for name, value in parameters.items()},
        BANK_DTYPES[dtype],
        members,
        shard_bytes,
    )


def _complete(
    header: FisherHeader, kind: str, stored: Stored, wanted: Sequence[str], gathering: Gathering
) -> FisherHeader:
    transposed = gathering.inputs.transposed if gathering.inputs is not None else []
    return replace(
        header,
        kind=kind,
        statistics=dict(stored.statistics),
        leaders=dict(stored.leaders),
        transposed=[name for name in transposed if name in stored.leaders],
        without=[name for name in wanted if name not in stored.statistics],
    )


def _plan(
    report: Report,
    checkpoint: Checkpoint,
    wanted: Sequence[str],
    needed: Mapping[str, int],
    out: Path,
) -> Report:
    stored = sum(info.nbytes for info in checkpoint.infos().values())
    elements = sum(checkpoint.info(name).elements for name in wanted)
    sums = {kind: size // 4 * ACCUMULATOR_BYTES for kind, size in needed.items()}
    sums["rank-one"] = 0
    report.status = "dry-run"
    report.summary = {
        "tensors": len(wanted),
        "bytes_to_read": stored,
        "bytes_to_write": sum(needed.values()),
        "bytes_by_kind": dict(needed),
        "free_bytes": free_bytes(out),
        "estimated_peak_bytes": stored + 4 * elements + sum(sums.values()),
    }
    if "rank-one" in needed and report.options["data"]["num_examples"] is None:
        report.warnings.append("the bank's bytes are for one example; give --num-examples for all")
    return report


def _resolve_labels(labels: str, task: Task, model: LoadedModel, kinds: Collection[str]) -> Labels:
    if labels == "expected" and not task.one_prediction:
        raise UsageError(
            f"--labels expected: a mean over every label of a {task.name} is out of reach; "
            "use sampled, its unbiased estimate"
        )
    if labels != "auto":
        return cast(Labels, labels)
    if not task.has_labels:
        return "empirical"
    few = task.one_prediction and len(model.labels or ()) <= EXPECTED_UP_TO_CLASSES
    return "expected" if few and "rank-one" not in kinds else "sampled"


def _check_finite(checkpoint: Checkpoint, module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise InputError(
                f"{checkpoint.folder}: tensor {name} has NaN or Inf; repair it, "
                "or go on with --allow-nonfinite"
            )


def _check_estimate(checkpoint: Checkpoint, stored: Mapping[str, Stored]) -> None:
    broken = [
        name
        for one in stored.values()
        for name, value in one.tensors.items()
        if not bool(value.isfinite().all())
    ]
    if broken:
        raise InputError(
            f"{checkpoint.folder}: the Fisher of {some(broken)} overflows; "
            "try float32 weights, or go on with --allow-nonfinite"
        )


def _row(kind: str, name: str, parameter: Tensor, dtype: str, **more: Any) -> dict[str, Any]:
    shape = list(parameter.shape)
    return {
        "name": name,
        "kind": kind,
        "shape": shape,
        "dtype": dtype,
        "action": "estimated",
        **more,
    }


def _rows(
    kind: str, stored: Stored, parameters: Mapping[str, Tensor], tokens: Mapping[str, int]
) -> list[dict[str, Any]]:
    rows = []
    for name, statistic in stored.statistics.items():
        more: dict[str, Any] = {}
        if kind != "activation":
            more["mean"] = statistic.total / max(statistic.elements, 1)
        if statistic.standard_error is not None and statistic.total > 0:
            more["relative_error"] = statistic.standard_error / statistic.total
        if kind == "diagonal":
            more["zero_fraction"] = float((stored.tensors[name] == 0).double().mean())
        if name in tokens:
            more["tokens"] = tokens[name]
        rows.append(_row(kind, name, parameters[name], "F32", **more))
    return rows


def _bank_rows(
    bank: GradientBank, parameters: Mapping[str, Tensor], members: int, dtype: str
) -> list[dict[str, Any]]:
    """The relative error is that of rounding to the bank's dtype, in the norm of all its members."""
    return [
        _row(
            "rank-one",
            name,
            parameter,
            BANK_DTYPES[dtype],
            mean=bank.traces[name] / members / max(parameter.numel(), 1),
            rounding_error=(bank.rounding[name] / (bank.traces[name] or 1.0)) ** 0.5,
        )
        for name, parameter in parameters.items()
    ]


def _summary(
    kinds: Sequence[str],
    done: Pass,
    header: FisherHeader,
    stored: Mapping[str, Stored],
    parameters: Mapping[str, Tensor],
    with_targets: bool,
) -> dict[str, Any]:
    statistics = next((one.statistics for one in stored.values()), {}).values()
    errors = [
        one.standard_error / one.total
        for one in statistics
        if one.standard_error is not None and one.total > 0
    ]
    return {
        "kind": ",".join(kinds),
        "labels": header.labels,
        "task": header.task,
        "examples": done.examples,
        "tokens": header.tokens,
        "loss": done.loss if with_targets else None,
        "trace": sum(one.total for one in statistics) or None,
        "largest_relative_error": max(errors, default=None),
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
        "one_example_at_a_time": done.one_by_one,
        "by_autograd": done.by_autograd,
        "expert_weights_without_tokens": sum(count == 0 for count in done.tokens.values()),
        "fingerprint": header.fingerprint,
    }
