"""`fishertool estimate-fisher`: calibration data -> Fisher sidecar."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from fishertool.calibration import DataOptions
from fishertool.checkpoint.layout import parse_size, show_size
from fishertool.checkpoint.staging import REPORT_FILE, check_output, resumable, staged
from fishertool.errors import UsageError
from fishertool.estimation.bank import Bank, members_of, open_bank
from fishertool.estimation.forecast import bytes_of, forecast
from fishertool.estimation.job import divided, job_of, run
from fishertool.estimation.output import finish, write_part
from fishertool.estimation.saving import SAVED, Saver, check_nothing_saved, tidy
from fishertool.estimation.settings import Settings, check_settings, resolve_labels
from fishertool.estimation.subject import LoadedSubject, Source, find_subject, load_subject
from fishertool.estimation.work import Unit
from fishertool.estimation.worker import Worker
from fishertool.estimation.workers import Workers, joined, share_of
from fishertool.fisher.estimate import Pass
from fishertool.fisher.kinds import MOMENTS, Gathering
from fishertool.models.loading import check_device, check_spreading
from fishertool.progress import Advance, Track, silent
from fishertool.registry import suggest
from fishertool.report import Report, environment, options_of

ACCUMULATE_ON = ("weights", "cpu")


def estimate_fisher(
    model: str,
    data: DataOptions,
    out: Path,
    *,
    settings: Settings | None = None,
    task: str = "auto",
    adapter: str | None = None,
    adapter_fisher: str = "merged",
    part: str | None = None,
    world_size: int | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    dry_run: bool = False,
    allow_nonfinite: bool = False,
    trust_remote_code: bool = False,
    threads: int = 1,
    device: str = "cpu",
    device_map: str | None = None,
    accumulate_on: str = "weights",
    track: Track = silent,
) -> Report | None:
    """Estimate the Fisher of every selected weight and write it as a sidecar in `out`.

    All kinds of `settings` are gathered in one pass over the data. With `part`, "i/n", what is
    written is the i-th of n partial results, for `combine_fisher`. Processes that `torchrun`
    started share the examples; the first one writes, the others return None. With a LoRA
    `adapter`, of the weights it is merged into, or (`adapter_fisher` "adapter") of its own. A
    model may be spread over several devices by a `device_map` (of transformers), or over the
    processes by the settings' `fsdp`. A diagonal's sums are kept where the `weights` are, or on
    the `cpu`.
    """
    settings = settings or Settings()
    report = Report("estimate-fisher", options_of(locals()))
    report.options |= report.options.pop("settings")
    check_settings(settings)
    saves = resume or checkpoint_every is not None
    _check_places(settings, device_map, accumulate_on)
    _refuse_saving(saves and settings.fsdp, "share weights (--fsdp)")
    device = check_device(device)
    torch.set_num_threads(threads)
    shard_bytes = parse_size(max_shard_size)
    source = Source(model, task, adapter, adapter_fisher, include, exclude, trust_remote_code)
    with ExitStack() as opened:
        workers = opened.enter_context(joined(world_size, device, settings.fsdp))
        if device_map is not None and not workers.alone:
            raise UsageError("--device-map is for one process; several shard a model with --fsdp")
        report.environment = environment(threads, device, workers.share.of)
        share = share_of(part, workers, settings)
        together = settings.until_relative_error is not None and not workers.alone
        _refuse_saving(saves and together, "stop together (--until-relative-error)")
        subject = find_subject(opened, source, data)
        report.options |= options_of({"data": subject.data})
        layers = subject.layers() if set(MOMENTS) & set(settings.kinds) else None
        needed = bytes_of(settings, subject.infos(), data.num_examples, layers)
        if workers.first:
            check_output(out, [subject.checkpoint.folder], overwrite, sum(needed.values()))
            check_nothing_saved(out, resume, overwrite)
        classes = subject.checkpoint.config().get("id2label") or ()
        resolve_labels(settings, subject.task, len(classes))  # or it would fail after loading
        if dry_run:
            if not workers.first:
                return None
            return forecast(report, subject.checkpoint, subject.infos(), needed, out)
        with report.phase("open"):
            loaded = load_subject(subject, settings, workers, device_map, not allow_nonfinite)
        report.environment["device"] = ", ".join(loaded.model.devices)
        report.warnings += loaded.warnings
        work = divided(loaded, settings)
        mine = workers.units_of(work, share)
        job = job_of(loaded, settings, work, share.of)
        place = resumable(out)
        if workers.first:
            saved = SAVED if saves else None
            place = opened.enter_context(staged(out, overwrite, saved))
            tidy(place, resume)
        place = workers.first_one(place)
        bank: Bank | None = None
        if "rank-one" in settings.kinds:
            written = members_of(mine if part else work.units, settings.group)
            with workers.first_ahead():
                again = resume or not workers.first
                bank = opened.enter_context(
                    open_bank(place, job, loaded.parameters, written, shard_bytes, again)
                )
        gathering = Gathering(
            settings.kinds,
            loaded.parameters,
            bank.statistic if bank else None,
            accumulate_on="cpu" if accumulate_on == "cpu" else None,
        )
        workers.begin(gathering)
        members = members_of(mine, settings.group) if bank else []
        worker = Worker(job, share.number, gathering, members)
        saver = Saver(place, worker, checkpoint_every, bank)
        if resume:
            saver.resume(mine)
        shown = track if workers.first else silent
        doing = "Estimating" + (
            f" (bank of {show_size(bank.writer.layout.nbytes)})" if bank else ""
        )
        with report.phase("estimate"), shown(doing, _count(mine), "examples") as advance:
            advance(_count(mine[: worker.units]))
            _run(loaded, settings, mine, worker, workers, saver, advance)
            if bank and not workers.alone:
                bank.sync()  # the first process tells that all members are there
        workers.add_up(worker)
        if not workers.first:
            workers.serve(gathering)
            return None
        opened.callback(workers.release)
        if bank:
            bank.count_written(set(bank.members).difference(members))
        writer = bank.writer if bank else None
        with report.phase("write"):
            report.inputs += subject.files()
            if part is not None:
                write_part(place, worker, writer, share, report)
            else:
                finish(
                    place, worker, writer, report,
                    shard_bytes=shard_bytes, check=not allow_nonfinite, complete=workers.complete,
                )  # fmt: skip
            _tell_of_error(report, settings.until_relative_error)
            (place / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
        saver.discard()
    return report


def _check_places(settings: Settings, device_map: str | None, accumulate_on: str) -> None:
    check_spreading(device_map, settings.fsdp)
    if accumulate_on not in ACCUMULATE_ON:
        raise UsageError(f"--accumulate-on {suggest(accumulate_on, ACCUMULATE_ON)}")


def _refuse_saving(so: bool, what: str) -> None:
    """Processes that wait for one another go on, once killed, from different places, where each
    waits for what another has behind it."""
    if so:
        raise UsageError(
            f"--checkpoint-every and --resume: processes that {what} cannot be saved one by one; "
            "leave them out"
        )


def _run(
    loaded: LoadedSubject,
    settings: Settings,
    mine: Sequence[Unit],
    worker: Worker,
    workers: Workers,
    saver: Saver,
    advance: Advance,
) -> None:
    """Do what is left of this worker's share."""
    until = settings.until_relative_error

    def enough() -> bool:
        if until is None:
            return False
        return workers.relative_error(worker, worker.gathering.traces) <= until

    def after_unit(done: Pass) -> bool:
        saver.after_unit()
        return enough()

    if worker.units and enough():  # killed when all was done but the output
        return
    left = mine[worker.units :]
    run(loaded, settings, worker, left, advance, shards=workers.shards, after=after_unit)


def _tell_of_error(report: Report, until: float | None) -> None:
    error = report.summary.get("largest_relative_error")
    if until is not None and error is not None and error > until:
        report.warnings.append(
            f"--until-relative-error {until:g} was not reached: it is {error:.3g} with all "
            f"{report.summary['examples']} examples; give more"
        )


def _count(units: Sequence[Unit]) -> int:
    return sum(len(batch) for unit in units for batch in unit)
