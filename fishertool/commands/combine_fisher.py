"""`fishertool combine-fisher`: partial results of `estimate-fisher --part` -> one Fisher sidecar."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from fishertool.checkpoint.dtypes import TORCH
from fishertool.checkpoint.layout import parse_size
from fishertool.checkpoint.reader import Checkpoint, open_checkpoint
from fishertool.checkpoint.shards import PARTIAL
from fishertool.checkpoint.staging import REPORT_FILE, check_output, free_bytes, staged
from fishertool.errors import InputError, some
from fishertool.estimation.bank import bank_writer
from fishertool.estimation.output import finish
from fishertool.estimation.part_sums import check_sums
from fishertool.estimation.partial import Job, Partial, difference, open_partial
from fishertool.estimation.settings import BANK_DTYPES
from fishertool.estimation.worker import Worker
from fishertool.fisher.gradient_bank import GradientBank
from fishertool.fisher.kinds import Gathering
from fishertool.fisher.sums import flattened
from fishertool.paths import expanded
from fishertool.progress import Track, silent
from fishertool.report import Files, Report, environment, options_of
from fishertool.sidecar import BankWriter

RANK_ONE = "rank-one"


def combine_fisher(
    parts: Sequence[Path],
    out: Path,
    *,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    dry_run: bool = False,
    allow_nonfinite: bool = False,
    track: Track = silent,
) -> Report:
    """Add the partial results of all parts of one estimate, and write the sidecar in `out`.

    It is the one that a single run would have written, whatever ran the parts and in which order
    they are given. Their sums are held in memory, in float64.
    """
    report = Report("combine-fisher", options_of(locals()), environment=environment(1, "cpu"))
    shard_bytes = parse_size(max_shard_size)
    with ExitStack() as opened:
        found = [_open(opened, expanded(folder)) for folder in parts]
        found.sort(key=lambda part: part[1].progress.number)
        job = _common_job(found)
        for tensors, partial in found:
            check_sums(tensors, partial, flattened(Worker(job, 0, _gathering(job, "meta")).groups))
        banks = _open_banks(opened, job, found) if RANK_ONE in job.kinds else []
        bytes_in = sum(info.nbytes for tensors, _ in found for info in tensors.infos().values())
        check_output(out, [tensors.folder for tensors, _ in found], overwrite, bytes_in // 2)
        if dry_run:
            report.status = "dry-run"
            report.summary = {
                "kind": ",".join(job.kinds),
                "parts": len(found),
                "bytes_to_read": bytes_in,
                "free_bytes": free_bytes(out),
            }
            return report
        folder = opened.enter_context(staged(out, overwrite))
        worker = Worker(job, 0, _gathering(job))
        with report.phase("combine"), track("Combining", len(found), "parts") as advance:
            for tensors, partial in found:
                worker.take(partial.progress, tensors)
                report.inputs.append(_files(tensors))
                advance(1)
        writer = None
        with report.phase("write"):
            if RANK_ONE in job.kinds:
                members = sum(len(partial.progress.members) for _, partial in found)
                writer = opened.enter_context(bank_writer(folder, job, members, shard_bytes))
                for bank, (_, partial) in zip(banks, found, strict=True):
                    report.inputs.append(_copy_members(bank, partial, writer))
            finish(
                folder, worker, writer, report, shard_bytes=shard_bytes, check=not allow_nonfinite
            )
            (folder / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
    return report


def _open(opened: ExitStack, folder: Path) -> tuple[Checkpoint, Partial]:
    if folder.is_dir() and not (folder / f"{PARTIAL}.safetensors").exists():
        raise InputError(
            f"{folder}: no {PARTIAL}.safetensors in it; give folders that estimate-fisher --part wrote"
        )
    tensors, partial = open_partial(folder)
    return opened.enter_context(tensors), partial


def _common_job(found: Sequence[tuple[Checkpoint, Partial]]) -> Job:
    """Raises InputError unless these are all parts of one job, once each."""
    (first, partial), *others = found
    job = partial.job
    for tensors, other in others:
        if (what := difference(job, other.job)) is not None:
            raise InputError(
                f"{tensors.folder}: is no part of the same estimate as {first.folder}: "
                f"they differ in {what}"
            )
    numbers = [one.progress.number for _, one in found]
    for before, (tensors, one) in zip(numbers, others, strict=False):
        if one.progress.number == before:
            raise InputError(f"{tensors.folder}: part {before + 1}/{job.workers} is given twice")
    if absent := [str(n + 1) for n in range(job.workers) if n not in numbers]:
        raise InputError(
            f"{first.folder}: one of {job.workers} parts, of which {', '.join(absent)} "
            f"{'is' if len(absent) == 1 else 'are'} not given"
        )
    return job


def _open_banks(
    opened: ExitStack, job: Job, found: Sequence[tuple[Checkpoint, Partial]]
) -> list[Checkpoint]:
    """The members of every part's bank. Raises InputError unless they make one bank, by headers."""
    members = sorted(member for _, one in found for member in one.progress.members)
    if members != list(range(-(-job.header.examples // job.header.group))):
        raise InputError(
            f"{found[0][0].folder}: its parts have not each member of the bank once; estimate them "
            "again"
        )
    banks = []
    for tensors, partial in found:
        bank = opened.enter_context(open_checkpoint(tensors.folder, stem=RANK_ONE))
        count, dtype = len(partial.progress.members), BANK_DTYPES[job.bank_dtype]
        told = {name: (dtype, (count, *shape)) for name, shape in job.shapes.items()}
        have = {name: (info.dtype, info.shape) for name, info in bank.infos().items()}
        if wrong := sorted(name for name, _ in told.items() ^ have.items()):
            raise InputError(
                f"{tensors.folder}: its bank lacks {some(list(dict.fromkeys(wrong)))}, or has it of "
                "another shape than its part says; estimate it again"
            )
        banks.append(bank)
    return banks


def _gathering(job: Job, device: str = "cpu") -> Gathering:
    """Empty sums for the weights of this job: shapes without memory stand for the weights."""
    parameters = {
        name: nn.Parameter(torch.empty(1, device=device).expand(shape), requires_grad=False)
        for name, shape in job.shapes.items()
    }
    bank = None
    if RANK_ONE in job.kinds:
        bank = GradientBank(
            parameters,
            lambda name, member, gradient: None,
            TORCH[BANK_DTYPES[job.bank_dtype]],
            job.header.group,
        )
    return Gathering(job.kinds, parameters, bank)


def _copy_members(members: Checkpoint, partial: Partial, writer: BankWriter) -> Files:
    for name in members:
        info = members.info(name)
        rows = info.rows // max(len(partial.progress.members), 1)
        for place, member in enumerate(partial.progress.members):
            writer.write(name, member, members.read(name, place * rows, (place + 1) * rows))
    return _files(members)


def _files(tensors: Checkpoint) -> Files:
    return Files.of(tensors.folder.name, "part", tensors.digests())
