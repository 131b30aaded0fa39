"""`fishertool evaluate`: measure a model, alone or against another, with gates for CI."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from fishertool import hub
from fishertool.calibration import DataOptions, check_data_source
from fishertool.checkpoint.reader import Checkpoint, open_checkpoint
from fishertool.errors import UsageError, some
from fishertool.evaluation.comparison import check_same_tokens, reader_for_both
from fishertool.evaluation.measure import (
    HIGHER_IS_BETTER,
    OF_TWO,
    check_measured,
    load,
    measure,
    metrics_of,
    metrics_of_two,
    prepare,
)
from fishertool.models.loading import LoadedModel, check_device, load_model
from fishertool.models.sentence import transformer_folder
from fishertool.models.tasks import task_of
from fishertool.progress import Track, silent
from fishertool.registry import suggest
from fishertool.report import Files, Report, data_files, environment, options_of, public_name

Gates = Mapping[str, Mapping[str, float]]
"""Limits of metrics, by rule."""


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
    report = Report("evaluate", options_of(locals()))
    gates = {
        "min": dict(minimum or {}),
        "max": dict(maximum or {}),
        "max_drop": dict(max_drop or {}),
    }
    if max_kl is not None:
        if "kl" in gates["max"]:
            raise UsageError("--max-kl and --max kl are the same; give one of them")
        gates["max"]["kl"] = max_kl
    _check_gates(gates, against is not None)
    device = check_device(device)
    report.environment = environment(threads, device)
    check_data_source(data)
    torch.set_num_threads(threads)

    def load_one(checkpoint: Checkpoint, source: str, role: str) -> LoadedModel:
        report.inputs.append(Files.of(public_name(source), role, checkpoint.digests()))
        loaded = load_model(checkpoint, chosen, device, trust_remote_code, data.scale)
        report.warnings += [told for told in loaded.warnings if told not in report.warnings]
        return loaded

    with report.phase("open"):
        with open_checkpoint(transformer_folder(hub.resolve(model))) as checkpoint:
            chosen = task_of(checkpoint.config(), checkpoint.folder, task)
            data = check_measured(chosen, data)
            _check_measured_gates(gates, metrics_of(chosen, data) + metrics_of_two(chosen))
            loaded = load_one(checkpoint, model, "model")
        original = None
        if against is None:
            texts = load(chosen, data, loaded)
        else:
            with open_checkpoint(transformer_folder(hub.resolve(against))) as other:
                original = load_one(other, against, "against")
            names = f"{checkpoint.folder} and {other.folder}"
            texts = load(chosen, data, reader_for_both(loaded, original, names))
            check_same_tokens(texts, loaded, original, names)
        report.inputs += data_files(data.data)
        report.warnings += texts.warnings()
        prepared = prepare(chosen, texts)
    report.calibration = texts.describe() | {"seed": data.seed}
    count = {"examples": len(texts.examples), "tokens": texts.tokens}
    others: dict[str, float] = {}
    told: list[str] = []
    with report.phase("evaluate"):
        passes = len(prepared.examples) * (1 if original is None else 2)
        with track("Evaluating", passes, "examples") as advance:
            measured = partial(
                measure, task=chosen, data=prepared, labels=loaded.labels, batch_size=batch_size,
                advance=advance, warn=told.append,
            )  # fmt: skip
            metrics = measured(loaded, against=original)
            if original is not None:
                others = measured(original)
    report.warnings += dict.fromkeys(told)
    report.warnings += _broken(model, loaded, metrics)
    if against is not None and original is not None:
        report.warnings += _broken(against, original, others)
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


def _check_gates(gates: Gates, has_against: bool) -> None:
    """What can be told without a model."""
    for rule, limits in gates.items():
        option = "--" + rule.replace("_", "-")
        for metric, limit in limits.items():
            if metric not in HIGHER_IS_BETTER:
                raise UsageError(f"{option}: no metric {suggest(metric, HIGHER_IS_BETTER)}")
            flag = "--max-kl" if (rule, metric) == ("max", "kl") else f"{option} {metric}"
            if math.isnan(limit):
                raise UsageError(f"{flag}: {limit} is no limit")
            if rule == "max_drop" and metric in OF_TWO:
                instead = "--max-kl" if metric == "kl" else f"--min {metric}"
                raise UsageError(f"{flag}: is between the two models already; use {instead}")
            if not has_against and (rule == "max_drop" or metric in OF_TWO):
                raise UsageError(f"{flag}: is measured against a second model; give --against")


def _check_measured_gates(gates: Gates, measured: Sequence[str]) -> None:
    for metric in (metric for limits in gates.values() for metric in limits):
        if metric not in measured:
            raise UsageError(f"{metric} is not measured here; measured: {', '.join(measured)}")


def _broken(source: str, loaded: LoadedModel, metrics: Mapping[str, float]) -> list[str]:
    """Which weights may be why a metric is NaN."""
    if not any(map(math.isnan, metrics.values())) or not (broken := loaded.nonfinite()):
        return []
    return [f"{public_name(source)}: {some(broken)} has NaN or Inf"]


def _gate_rows(
    gates: Gates, metrics: Mapping[str, float], others: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Each gate with the value it looks at; a NaN meets none."""
    rows = []
    for rule, limits in gates.items():
        for metric, limit in limits.items():
            value = metrics[metric]
            if rule == "max_drop":
                sign = 1 if HIGHER_IS_BETTER[metric] else -1
                value = sign * (others[metric] - value)
            met = value >= limit if rule == "min" else value <= limit
            met = met or math.isclose(value, limit, rel_tol=1e-9, abs_tol=1e-12)  # but for rounding
            rows.append(
                {"rule": rule, "metric": metric, "limit": limit, "value": value, "met": met}
            )
    return rows
