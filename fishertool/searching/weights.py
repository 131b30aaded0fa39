"""The coefficient search: merge by every candidate's weights, measure each, keep the best."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf, isnan
from pathlib import Path
from typing import Any

from fishertool.calibration import DataOptions
from fishertool.checkpoint.reader import open_checkpoint
from fishertool.errors import UsageError
from fishertool.evaluation.correlation import spearman
from fishertool.evaluation.measure import HIGHER_IS_BETTER, check_measured, metrics_of
from fishertool.models.loading import load_model
from fishertool.models.tasks import Task, task_of
from fishertool.progress import Advance
from fishertool.registry import suggest
from fishertool.searching.judge import Judge
from fishertool.surgery.merge_plan import MergePlan
from fishertool.surgery.merge_write import write_merge


def judged_by(
    plan: MergePlan, options: DataOptions, metric: str | None
) -> tuple[Task, DataOptions, str]:
    """What merges are measured as, on what, and by which metric; known from headers."""
    first = plan.first
    task = task_of(first.config(), first.folder)
    options = check_measured(task, options)
    metric = metric or ("accuracy" if task.has_labels else "loss")
    offered = metrics_of(task, options)
    if metric not in offered:
        raise UsageError(f"--metric {suggest(metric, offered)}")
    return task, options, metric


class MergesJudge(Judge):
    """Measures merged folders on the validation data and knows which metric decides."""

    def __init__(
        self,
        plan: MergePlan,
        options: DataOptions,
        metric: str | None,
        batch_size: int,
        device: str,
        trust_remote_code: bool,
    ):
        task, options, self.metric = judged_by(plan, options, metric)
        with open_checkpoint(plan.first.folder) as checkpoint:
            loaded = load_model(checkpoint, task, device, trust_remote_code)
        if plan.vocabulary.tokenizer:
            loaded = replace(loaded, tokenizer=plan.vocabulary.tokenizer)
        super().__init__(task, options, loaded, batch_size, device, trust_remote_code)

    def key(self, metrics: Mapping[str, float]) -> tuple[float, float]:
        """Sorts best first: by the metric, then by the loss; a NaN last."""
        sign = -1 if HIGHER_IS_BETTER[self.metric] else 1
        value, loss = sign * metrics[self.metric], metrics["loss"]
        return (inf if isnan(value) else value), (inf if isnan(loss) else loss)


def search_weights(
    plan: MergePlan,
    candidates: Sequence[list[float]],
    judge: MergesJudge,
    scratch: Path,
    threads: int,
    advance: Advance,
) -> tuple[list[float], list[dict[str, Any]]]:
    """Merge and measure every candidate; the first of the best wins."""
    rows: list[dict[str, Any]] = []
    for weights in candidates:
        scratch.mkdir()
        written = write_merge(plan.with_weights(weights), scratch, threads, lambda count: None)
        row = {"weights": weights, **judge.of_folder(scratch)}
        if written.passed.predicted_loss is not None:
            row["predicted_loss"] = written.passed.predicted_loss
        rows.append(row)
        shutil.rmtree(scratch)
        advance(1)
    best = min(rows, key=judge.key)
    return best["weights"], rows


def agreement(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Spearman's correlation over candidates of the predicted loss, all models' together, with the
    loss measured; None without predictions, or for too few candidates to tell."""
    known = [row for row in rows if "predicted_loss" in row]
    if len(known) < 3:
        return None
    return spearman([sum(row["predicted_loss"]) for row in known], [row["loss"] for row in known])
