"""`fishertool evaluate`: measure a model, alone or against another, with gates for CI."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from fishertool import hub
from fishertool.calibration import DataOptions
from fishertool.checkpoint.reader import open_checkpoint
from fishertool.errors import UsageError
from fishertool.evaluation.measure import (
    HIGHER_IS_BETTER,
    OF_TWO,
    check_measured,
    load,
    measure,
    prepare,
)
from fishertool.models.loading import check_device, load_model
from fishertool.models.sentence import transformer_folder
from fishertool.models.tasks import task_of
from fishertool.progress import Track, silent
from fishertool.registry import suggest
from fishertool.report import Files, Report, data_files, environment, options_of, public_name


def evaluate(
    model: str,
    data: DataOptions,
    *,
    against: str | None = None,
    task: str = "auto",
    batch_size: int = 8,
    minimum: Mapping[str, float] | None = None,
    maximum: Mapping[str, float] | None = None,
    max_drop: Mapping[str, float] | None = None,
    max_kl: float | None = None,
    threads: int = 1,
    device: str = "cpu",
    trust_remote_code: bool = False,
    track: Track = silent,
) -> Report:
    """Measure `model` on labelled texts, plain text, queries or scored pairs, and `against` likewise.

    Gates: `minimum` and `maximum` bound a metric; `max_drop` bounds how much worse than
    `against` it may be (lower accuracy, higher loss); `max_kl` bounds the mean KL to it. The
    report's `evaluation.gates` says which are met, its `status` whether all are.
    """
    report = Report("evaluate", options_of(locals()), environment=environment(threads, device))
    maximum = dict(maximum or {}) | ({} if max_kl is None else {"kl": max_kl})
    gates = {"min": dict(minimum or {}), "max": maximum, "max_drop": dict(max_drop or {})}
    _check_gates(gates, against is not None)
    device = check_device(device)
    torch.set_num_threads(threads)
    with (
        report.phase("open"),
        open_checkpoint(transformer_folder(hub.resolve(model))) as checkpoint,
    ):
        chosen = task_of(checkpoint.config(), checkpoint.folder, task)
        data = check_measured(chosen, data)
        report.inputs.append(
            Files(public_name(model), "model", list(map(asdict, checkpoint.digests())))
        )
        loaded = load_model(checkpoint, chosen, device, trust_remote_code, data.scale)
        original = None
        if against is not None:
            with open_checkpoint(transformer_folder(hub.resolve(against))) as other:
                files = list(map(asdict, other.digests()))
                report.inputs.append(Files(public_name(against), "against", files))
                original = load_model(other, chosen, device, trust_remote_code, data.scale)
        texts = load(chosen, data, loaded)
        report.inputs += data_files(data.data)
        report.warnings += texts.warnings()
        prepared = prepare(chosen, texts)
    report.calibration = texts.describe() | {"seed": data.seed}
    count = {"examples": len(texts.examples), "tokens": texts.tokens}
    others: dict[str, float] = {}
    with report.phase("evaluate"):
        passes = len(prepared.examples) * (1 if original is None else 2)
        with track("Evaluating", passes, "examples") as advance:
            metrics = measure(
                loaded,
                chosen,
                prepared,
                against=original,
                batch_size=batch_size,
                device=device,
                advance=advance,
            )
            if original is not None:
                others = measure(
                    original,
                    chosen,
                    prepared,
                    batch_size=batch_size,
                    device=device,
                    advance=advance,
                )
    report.summary = {**metrics, **count}
    report.evaluation = {"against": others or None, "gates": _gate_rows(gates, metrics, others)}
    if chosen.name == "causal-lm":
        report.evaluation["convention"] = (
            f"perplexity over non-overlapping blocks of {texts.max_length} tokens, "
            "the first token of a text unscored"
        )
    elif "ndcg_at_10" in metrics:
        report.evaluation["convention"] = (
            "retrieval among all documents of the data, equal scores counted against the model; "
            f"loss by cosines times {loaded.scale:g}"
        )
    if not all(row["met"] for row in report.evaluation["gates"]):
        report.status = "gate-not-met"
    return report


def _check_gates(gates: Mapping[str, Mapping[str, float]], has_against: bool) -> None:
    for rule, limits in gates.items():
        flag = "--" + rule.replace("_", "-")
        for metric in limits:
            if metric not in HIGHER_IS_BETTER:
                raise UsageError(f"{flag}: no metric {suggest(metric, HIGHER_IS_BETTER)}")
            if not has_against and (rule == "max_drop" or metric in OF_TWO):
                raise UsageError(
                    f"{flag} {metric}: is measured against a second model; give --against"
                )


def _gate_rows(
    gates: Mapping[str, Mapping[str, float]],
    metrics: Mapping[str, float],
    others: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Each gate with the value it looks at; a NaN meets none."""
    rows = []
    for rule, limits in gates.items():
        for metric, limit in limits.items():
            if metric not in metrics or (rule == "max_drop" and metric not in others):
                raise UsageError(f"{metric} is not measured here; measured: {', '.join(metrics)}")
            value = metrics[metric]
            if rule == "max_drop":
                sign = 1 if HIGHER_IS_BETTER[metric] else -1
                value = sign * (others[metric] - value)
            met = value >= limit if rule == "min" else value <= limit
            rows.append(
                {"rule": rule, "metric": metric, "limit": limit, "value": value, "met": bool(met)}
            )
    return rows
