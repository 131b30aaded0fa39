"""`fishertool estimate-fisher`: calibration data -> Fisher sidecar."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import torch
from torch import nn

from fishertool import calibration, hub
from fishertool.calibration import CalibrationData, DataOptions
from fishertool.checkpoint.layout import parse_size
from fishertool.checkpoint.reader import Checkpoint, open_checkpoint
from fishertool.checkpoint.staging import REPORT_FILE, check_output, resumable, staged
from fishertool.errors import InputError, UsageError
from fishertool.estimation.bank import Bank, members_of, open_bank
from fishertool.estimation.forecast import bytes_of, forecast
from fishertool.estimation.output import finish, write_part
from fishertool.estimation.partial import Job
from fishertool.estimation.saving import SAVED, Saver, check_nothing_saved
from fishertool.estimation.settings import Settings, check_settings, resolve_labels
from fishertool.estimation.work import Unit, Work, divide
from fishertool.estimation.worker import Worker
from fishertool.estimation.workers import joined, share_of
from fishertool.fisher.estimate import Batch, Estimator, Pass, estimate
from fishertool.fisher.header import FisherHeader
from fishertool.fisher.kinds import Gathering
from fishertool.models.adapters import open_adapter
from fishertool.models.loading import check_device, load_model
from fishertool.models.names import parameters_by_disk_name
from fishertool.models.sentence import transformer_folder
from fishertool.models.tasks import collate, task_of
from fishertool.progress import Track, silent
from fishertool.registry import suggest
from fishertool.report import Files, Report, data_files, environment, options_of, public_name
from fishertool.selection import select

ADAPTER_FISHERS = ("merged", "adapter")


def estimate_fisher(
    model: str,
    data: DataOptions,
    out: Path,
    *,
    settings: Settings | None = None,
    task: str = "auto",
    part: str | None = None,
    world_size: int | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
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
) -> Report | None:
    """Estimate the Fisher of every selected weight and write it as a sidecar in `out`.

    All kinds of `settings` are gathered in one pass over the data. With `part`, "i/n", what is
    written is the i-th of n partial results, for `combine_fisher`. Processes that `torchrun`
    started share the examples; the first one writes, the others return None. With a LoRA
    `adapter`, of the weights it is merged into, or (`adapter_fisher` "adapter") of its own.
    """
    settings = settings or Settings()
    report = Report("estimate-fisher", options_of(locals()))
    report.options |= report.options.pop("settings")
    check_settings(settings)
    _check_adapter(adapter, adapter_fisher)
    device = check_device(device)
    torch.set_num_threads(threads)
    with ExitStack() as opened:
        workers = opened.enter_context(joined(world_size, device))
        report.environment = environment(threads, device, workers.share.of)
        share = share_of(part, workers, settings)
        folder = transformer_folder(hub.resolve(model))
        checkpoint = opened.enter_context(open_checkpoint(folder))
        patch = opened.enter_context(open_adapter(hub.resolve(adapter))) if adapter else None
        subject = patch.tensors if patch and adapter_fisher == "adapter" else checkpoint
        chosen = task_of(checkpoint.config(), checkpoint.folder, task)
        data = chosen.form.resolve(data, chosen.name)
        report.options |= options_of({"data": data})
        wanted = select(subject, include, exclude)
        needed = bytes_of(settings, [subject.info(name) for name in wanted], data.num_examples)
        if workers.first:
            check_output(out, [checkpoint.folder], overwrite, sum(needed.values()))
            check_nothing_saved(out, resume, overwrite)
        if dry_run:
            return forecast(report, subject, wanted, needed, out) if workers.first else None
        with report.phase("open"):
            loaded = load_model(
                checkpoint, chosen, str(workers.device), trust_remote_code, data.scale,
                watch_experts=True,
            )  # fmt: skip
            report.warnings += loaded.warnings
            if not allow_nonfinite:
                _check_finite(checkpoint, loaded.pretrained)
            named, buffers = parameters_by_disk_name(loaded.pretrained, checkpoint)
            if patch is not None:
                patch.check(loaded.pretrained)
                if subject is checkpoint:
                    patch.merge_into(loaded.pretrained)
                    report.warnings.append(f"{public_name(adapter or '')} is merged into the model")
                else:
                    named, buffers = patch.attach(loaded.pretrained), []
            parameters = {name: named[name] for name in wanted if name in named}
            if not parameters:
                raise UsageError("--include and --exclude leave no parameter")
            labels = resolve_labels(settings, chosen, len(loaded.labels or ()))
            texts = calibration.load(
                data,
                loaded.tokenizer,
                loaded.max_length,
                loaded.labels,
                chosen.form,
                need_labels=chosen.has_labels and labels == "empirical",
            )
            report.warnings += texts.warnings()
        work = _divide(texts, settings, data.seed)
        header = FisherHeader(
            kind="",
            labels=labels,
            task=chosen.name,
            model="+".join(public_name(one) for one in (model, adapter) if one),
            fingerprint=subject.fingerprint(),
            examples=len(texts.examples),
            tokens=texts.tokens,
            token_ids_sha256=texts.fingerprint(),
            seed=data.seed,
            draws=settings.draws if labels in ("sampled", "expected-signed") else 1,
            estimator=settings.estimator,
            group=settings.group,
            scale=loaded.scale,
            without=[name for name in buffers if name in wanted],
        )
        job = Job(
            header=header,
            kinds=settings.kinds,
            shapes={name: list(value.shape) for name, value in parameters.items()},
            wanted=list(wanted),
            bank_dtype=settings.bank_dtype,
            workers=share.of,
            units=len(work.units),
            batches_sha256=hashlib.sha256(json.dumps(work.units).encode()).hexdigest(),
            calibration=texts.describe() | {"labels": labels, "seed": data.seed},
            labelled=texts.labelled,
        )
        mine, shard_bytes = work.share(share), parse_size(max_shard_size)
        place = resumable(out)
        if workers.first:
            saved = SAVED if checkpoint_every is not None or resume else None
            place = opened.enter_context(staged(out, overwrite, saved))
        workers.wait()
        bank: Bank | None = None
        if "rank-one" in settings.kinds:
            members = members_of(mine, settings.group)
            bank = opened.enter_context(
                open_bank(place, job, parameters, members, shard_bytes, resume)
            )
        gathering = Gathering(
            settings.kinds, loaded.module, parameters, None if bank is None else bank.statistic
        )
        worker = Worker(job, share.number, gathering, () if bank is None else bank.members)
        saver = Saver(place, worker, checkpoint_every, bank)
        if resume:
            saver.resume(mine)

        def batch_of(indices: Sequence[int]) -> Batch:
            return collate(chosen, texts.examples, indices, loaded.pad_id, str(workers.device))

        def after_unit(done: Pass) -> bool:
            saver.after_unit()
            return settings.until_relative_error is not None and (
                workers.relative_error(worker, gathering.traces) <= settings.until_relative_error
            )

        shown = track if workers.first else silent
        with report.phase("estimate"), shown("Estimating", _count(mine), "examples") as advance:
            advance(_count(mine[: worker.units]))
            estimate(
                loaded.module,
                parameters,
                batch_of,
                mine[worker.units :],
                gathering.statistics,
                probe=work.probe,
                inputs=gathering.inputs,
                labels=labels,
                draws=settings.draws,
                seed=data.seed,
                estimator=cast(Estimator, settings.estimator),
                skip_nonfinite=settings.skip_nonfinite,
                done=worker.done,
                after=after_unit,
                advance=advance,
            )
        workers.add_up(worker)
        if not workers.first:
            return None
        saver.discard()
        with report.phase("write"):
            files = list(map(asdict, checkpoint.digests()))
            report.inputs.append(Files(public_name(model), "model", files))
            if adapter and patch:
                files = list(map(asdict, patch.tensors.digests()))
                report.inputs.append(Files(public_name(adapter), "adapter", files))
            report.inputs += data_files(data.data)
            writer = None if bank is None else bank.writer
            if part is not None:
                write_part(place, worker, writer, share, report)
            else:
                worker.job = replace(
                    job, header=replace(header, tokens=_tokens(work, worker, texts))
                )
                finish(
                    place, worker, writer, report,
                    shard_bytes=shard_bytes, check=not allow_nonfinite,
                )  # fmt: skip
            (place / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
    return report


def _check_adapter(adapter: str | None, adapter_fisher: str) -> None:
    if adapter_fisher not in ADAPTER_FISHERS:
        raise UsageError(f"--adapter-fisher {suggest(adapter_fisher, ADAPTER_FISHERS)}")
    if adapter is None and adapter_fisher != "merged":
        raise UsageError("--adapter-fisher is for --adapter")


def _divide(texts: CalibrationData, settings: Settings, seed: int) -> Work:
    return divide(
        [example.size for example in texts.examples],
        [len(example.texts) for example in texts.examples],
        size=settings.examples_a_batch,
        group=settings.group,
        shuffle_by=None if settings.until_relative_error is None else seed,
    )


def _tokens(work: Work, worker: Worker, texts: CalibrationData) -> int:
    """Of the examples that took part: a run may stop before the last."""
    if not work.windows:
        return texts.tokens
    done = work.units[: worker.units]
    return sum(texts.examples[n].tokens for unit in done for batch in unit for n in batch)


def _count(units: Sequence[Unit]) -> int:
    return sum(len(batch) for unit in units for batch in unit)


def _check_finite(checkpoint: Checkpoint, module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise InputError(
                f"{checkpoint.folder}: tensor {name} has NaN or Inf; repair it, "
                "or go on with --allow-nonfinite"
            )
