"""From complete sums to a sidecar, or to one part of it: the files, and what the report says."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from fishertool.checkpoint.digest import FileDigest
from fishertool.checkpoint.layout import Layout
from fishertool.errors import InputError, UsageError, some
from fishertool.estimation.partial import Job, write_partial
from fishertool.estimation.settings import BANK_DTYPES
from fishertool.estimation.work import Share
from fishertool.estimation.worker import Worker
from fishertool.fisher.header import FisherHeader, relative_errors
from fishertool.fisher.kinds import NO_FISHER, Gathering, Stored
from fishertool.fisher.sums import Complete, all_here, flattened
from fishertool.report import Output, Report
from fishertool.sidecar import BankWriter, write_sidecar


def finish(
    folder: Path,
    worker: Worker,
    bank: BankWriter | None,
    report: Report,
    *,
    shard_bytes: int,
    check: bool,
    complete: Complete = all_here,
) -> None:
    """Write every kind of the sidecar into `folder` (the bank's members are there), and report.

    `complete` gives all rows of a weight whose shard is here.
    Raises InputError if nothing was scored, or, to `check`, if an entry is not finite, and
    UsageError for a kind that none of the weights has.
    """
    done, gathering = worker.done, worker.gathering
    if not done.scored:
        raise InputError(
            f"nothing is predicted in the data ({done.skipped} examples were skipped): "
            "give texts of two tokens or more"
        )
    header = replace(worker.job.header, examples=done.examples, tokens=done.tokens_read)
    job = replace(worker.job, header=header)
    stored = gathering.stored(done.examples, complete)
    _check_filled(stored)
    if check:
        _check_finite(stored, gathering.groups.get("bank-traces", {}), header.model)
    transposed = set() if gathering.inputs is None else gathering.inputs.transposed
    layouts, files = write_kinds(
        folder, job.header, job.shapes, job.wanted, stored, shard_bytes, report, transposed,
        done.tokens,
    )  # fmt: skip
    if bank is not None:
        layouts.append(bank.layout)
        files += bank.finish()
        report.tensors += _bank_rows(gathering, job)
    report.output = _output(layouts, files, "float32" if bank is None else job.bank_dtype)
    report.calibration = dict(job.calibration)
    report.summary = _summary(job, worker, stored)
    untouched = sorted(set(job.shapes) - done.touched)
    if untouched and gathering.statistics:
        report.warnings.append(
            f"{some(untouched)}: no part of {job.header.task}, so the Fisher is zero"
        )
    if done.skipped:
        report.warnings.append(f"{done.skipped} examples were skipped: their loss is not finite")


def write_kinds(
    folder: Path,
    header: FisherHeader,
    shapes: Mapping[str, Sequence[int]],
    wanted: Sequence[str],
    stored: Mapping[str, Stored],
    shard_bytes: int,
    report: Report,
    transposed: Collection[str] = (),
    tokens: Mapping[str, Tensor] = MappingProxyType({}),
) -> tuple[list[Layout], list[FileDigest]]:
    """Write these kinds of a Fisher of the `wanted` tensors, and report on each tensor; `tokens` are
    those that each expert's saw."""
    layouts: list[Layout] = []
    files: list[FileDigest] = []
    for kind, one in stored.items():
        complete = replace(
            header,
            kind=kind,
            statistics=dict(one.statistics),
            leaders=dict(one.leaders),
            transposed=sorted(set(transposed) & one.leaders.keys()),
            without=[name for name in wanted if name not in one.statistics],
            group=1,
        )
        layout, digests = write_sidecar(folder, complete, one.tensors, shard_bytes)
        layouts.append(layout)
        files += digests
        report.tensors += _rows(kind, one, shapes, tokens)
    report.output = _output(layouts, files, "float32")
    return layouts, files


def write_part(
    folder: Path, worker: Worker, bank: BankWriter | None, share: Share, report: Report
) -> None:
    """Write a worker's sums into `folder`, beside the members of its bank, and report."""
    layout, files = write_partial(folder, worker.partial(), flattened(worker.groups))
    layouts = [layout]
    if bank is not None:
        files = files + bank.finish()
        layouts.append(bank.layout)
    report.output = _output(layouts, files, "float64")
    report.calibration = dict(worker.job.calibration)
    report.summary = {
        "kind": ",".join(worker.job.kinds),
        "part": str(share),
        "examples": worker.done.examples,
        "skipped": worker.done.skipped,
        "fingerprint": worker.job.header.fingerprint,
    }


def _output(layouts: Sequence[Layout], files: Sequence[FileDigest], dtype: str) -> Output:
    return Output.of(files, sum(layout.parameters for layout in layouts), dtype)


def _check_filled(stored: Mapping[str, Stored]) -> None:
    for kind, one in stored.items():
        if not one.statistics:
            raise UsageError(
                f"--kind {kind}: none of the tensors is a linear layer's matrix that has one; "
                "--include others"
            )


def _check_finite(
    stored: Mapping[str, Stored], bank_traces: Mapping[str, Tensor], where: str
) -> None:
    """Raises InputError for entries that are not; those of a bank show in its traces."""
    broken = [
        name
        for tensors in (*(one.tensors for one in stored.values()), bank_traces)
        for name, value in tensors.items()
        if not bool(value.isfinite().all())
    ]
    if broken:
        raise InputError(
            f"{where}: gradients overflow, and the Fisher of {some(broken)} has NaN or Inf; "
            "--exclude these, or go on with --allow-nonfinite"
        )


def _summary(job: Job, worker: Worker, stored: Mapping[str, Stored]) -> dict[str, Any]:
    done, header = worker.done, job.header
    statistics = next((one.statistics for one in stored.values()), {})
    return {
        "kind": ",".join(job.kinds),
        "labels": header.labels,
        "estimator": header.estimator,
        "task": header.task,
        "examples": done.examples,
        "skipped": done.skipped,
        "tokens": header.tokens,
        "loss": done.loss if job.labelled else None,
        "trace": sum(one.total for one in statistics.values()) or None,
        "largest_relative_error": max(relative_errors(statistics).values(), default=None),
        "parameters": sum(map(prod, job.shapes.values())),
        "one_example_at_a_time": done.one_by_one,
        "by_autograd": sorted(done.by_autograd),
        "expert_weights_without_tokens": sum(not int(count) for count in done.tokens.values()),
        "fingerprint": header.fingerprint,
    }


def _row(kind: str, name: str, shape: Sequence[int], dtype: str, **more: Any) -> dict[str, Any]:
    about = {"name": name, "kind": kind, "shape": list(shape), "dtype": dtype}
    return {**about, "action": "estimated", **more}


def _rows(
    kind: str,
    stored: Stored,
    shapes: Mapping[str, Sequence[int]],
    tokens: Mapping[str, Tensor],
) -> Iterator[dict[str, Any]]:
    for name, statistic in stored.statistics.items():
        more: dict[str, Any] = {}
        if kind == "mean-gradient":
            more["norm"] = statistic.squares**0.5
        if kind not in NO_FISHER:
            more["mean"] = statistic.total / max(statistic.elements, 1)
        if statistic.standard_error is not None and statistic.total > 0:
            more["relative_error"] = statistic.standard_error / statistic.total
        if kind == "diagonal":
            more["zero_fraction"] = float((stored.tensors[name] == 0).double().mean())
        if name in tokens:
            more["tokens"] = int(tokens[name])
        yield _row(kind, name, shapes[name], "F32", **more)


def _bank_rows(gathering: Gathering, job: Job) -> Iterator[dict[str, Any]]:
    """The relative error is that of rounding to the bank's dtype, in the norm of all its members.

    In float32: the last bits of these sums depend on how the work was divided.
    """
    traces, roundings = gathering.groups["bank-traces"], gathering.groups["bank-rounding"]
    members = -(-job.header.examples // job.header.group)
    for name, shape in job.shapes.items():
        total, rounding = float(traces[name].float()), float(roundings[name].float())
        yield _row(
            "rank-one",
            name,
            shape,
            BANK_DTYPES[job.bank_dtype],
            mean=total / members / max(prod(shape), 1),
            rounding_error=(rounding / (total or 1.0)) ** 0.5,
        )
