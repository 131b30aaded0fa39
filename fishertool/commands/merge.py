"""`fishertool merge`: several checkpoints -> one."""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fishertool.calibration import DataOptions
from fishertool.checkpoint.dtypes import torch_name
from fishertool.checkpoint.layout import parse_size
from fishertool.checkpoint.staging import REPORT_FILE, check_output, free_bytes, staged
from fishertool.checkpoint.stream import PIECE_ELEMENTS
from fishertool.errors import UsageError
from fishertool.models.loading import check_device
from fishertool.models.sources import split_reference
from fishertool.progress import Track, silent
from fishertool.recipe.inputs import normalised
from fishertool.recipe.schema import Recipe
from fishertool.recipe.write import plain, renamed
from fishertool.registry import find_method, suggest
from fishertool.report import (
    Files,
    Output,
    Report,
    data_files,
    environment,
    options_of,
    public_name,
)
from fishertool.searching.best_weights import best_weights
from fishertool.searching.coefficients import GRID_POINTS, dirichlet, grid
from fishertool.searching.weights import Judge, agreement
from fishertool.searching.weights import search_weights as search_weights_by
from fishertool.surgery.merge_plan import MergePlan, plan_merge
from fishertool.surgery.merge_predict import check_optimal, gather_forms
from fishertool.surgery.merge_write import Written, write_merge

METHODS = "fishertool.merging"
FREE = "optimal-free"
BASE_RSS_BYTES = 400_000_000


def merge(
    recipe: Recipe,
    out: Path,
    *,
    weights: Sequence[float] | str | None = None,
    as_lora: int | None = None,
    predict: bool = False,
    search_weights: str | None = None,
    search_points: int = GRID_POINTS,
    metric: str | None = None,
    evaluate_on: DataOptions | None = None,
    batch_size: int = 8,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    dry_run: bool = False,
    allow_nonfinite: bool = False,
    trust_remote_code: bool = False,
    threads: int = 1,
    device: str = "cpu",
    track: Track = silent,
) -> Report:
    """Merge the models of a recipe into `out`, in float32 with one rounding to the stored dtypes.

    Tensors that the recipe leaves out are the first model's; so are the config and all companion
    files. `weights` replace those of the recipe.
    """
    options = {name: value for name, value in locals().items() if name != "recipe"}
    report = Report("merge", options_of(options), environment=environment(threads, device))
    method = find_method(METHODS, recipe.method)
    recipe = normalised(recipe, method)
    report.options["recipe"] = plain(renamed(recipe, _public))
    report.warnings += recipe.notes
    candidates = _candidates(recipe, weights, search_weights, search_points, evaluate_on)
    device = check_device(device)
    with ExitStack() as opened:
        with report.phase("check"):
            plan = plan_merge(opened, recipe, method, parse_size(max_shard_size), allow_nonfinite)
            if len(candidates) == 1:
                plan = plan.with_weights(candidates[0])
            optimal = weights if isinstance(weights, str) else None
            if optimal is not None:
                check_optimal(plan, optimal == FREE)
            if predict and not plan.predicts:
                raise UsageError("--predict needs a --fisher with a diagonal for each model")
            report.warnings += plan.vocabulary.warnings
            places = [source.folder for source in plan.inputs.sources]
            places += [fisher.tensors.folder for fisher in plan.fishers.values()]
            copies = 1 + bool(search_weights)
            check_output(out, places, overwrite, copies * plan.layout.nbytes)
        if dry_run:
            report.status = "dry-run"
            report.summary = _forecast(plan, threads, out)
            report.tensors = _rows(plan)
            return report
        judge = None
        if evaluate_on is not None:
            judge = Judge(plan, evaluate_on, metric, batch_size, device, trust_remote_code)
        with staged(out, overwrite) as folder:
            rows: list[dict[str, Any]] = []
            if search_weights and judge is not None:
                with report.phase("search"), track("Searching", len(candidates), "merges") as step:
                    best, rows = search_weights_by(
                        plan, candidates, judge, folder / "candidate", threads, step
                    )
                plan = plan.with_weights(best)
            total = sum(tensor.elements for tensor in plan.outputs())
            if optimal is not None:
                with report.phase("predict"), track("Predicting", total, "weights") as advance:
                    forms = gather_forms(plan, threads, advance).total()
                plan = plan.with_weights(best_weights(forms, on_simplex=optimal != FREE))
            with report.phase("merge"), track("Merging", total, "weights") as advance:
                written = write_merge(plan, folder, threads, advance)
            if judge is not None:
                with report.phase("evaluate"):
                    measured = judge.measure(folder)
                report.evaluation = {"metrics": measured, "candidates": rows}
                report.evaluation["predicted_loss_spearman"] = agreement(rows)
                report.calibration = judge.data.describe()
            with report.phase("digest"):
                report.inputs = _input_files(plan)
            if evaluate_on is not None:
                report.inputs += data_files(evaluate_on.data)
            _describe(report, plan, written, predict)
            (folder / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
    return report


def _candidates(
    recipe: Recipe,
    weights: Sequence[float] | str | None,
    search: str | None,
    points: int,
    evaluate_on: DataOptions | None,
) -> list[list[float]]:
    """The weights to merge by instead of the recipe's: those given, or those to search among."""
    models = len(recipe.slices[0].sources)
    if search is None:
        if weights is None or isinstance(weights, str):
            return []
        if len(weights) != models:
            raise UsageError(f"--weights has {len(weights)} numbers for {models} models")
        return [list(weights)]
    weighted = any("weight" in source.parameters for source in recipe.slices[0].sources)
    if weights is not None or weighted:
        raise UsageError("--weights and --search-weights exclude each other")
    if evaluate_on is None:
        raise UsageError("--search-weights needs --evaluate-on, the data to choose by")
    if search not in ("grid", "dirichlet"):
        raise UsageError(f"--search-weights {suggest(search, ('grid', 'dirichlet'))}")
    return grid(models, points) if search == "grid" else dirichlet(models, points, evaluate_on.seed)


def _forecast(plan: MergePlan, threads: int, out: Path) -> dict[str, Any]:
    read = [(number, name) for target in plan.targets.values() for number, name in target.sources]
    read += [target.base for target in plan.targets.values() if target.base is not None]
    floats = len(plan.inputs.sources) + len(plan.fishers) + 4
    return {
        "tensors": len(plan.targets),
        "bytes_to_read": sum(
            plan.inputs.sources[number].info(name).nbytes for number, name in set(read)
        ),
        "bytes_to_write": plan.layout.nbytes,
        "shards": len(plan.layout.shards),
        "free_bytes": free_bytes(out),
        "estimated_peak_bytes": BASE_RSS_BYTES + (threads + 1) * floats * 4 * PIECE_ELEMENTS,
    }


def _describe(report: Report, plan: MergePlan, written: Written, by_tensor: bool) -> None:
    report.output = Output(
        list(map(asdict, written.files)),
        plan.layout.nbytes,
        plan.layout.parameters,
        torch_name(plan.dtype),
        list(plan.companions.copied),
        list(plan.companions.left_out),
    )
    report.tensors = _rows(plan)
    if by_tensor:
        for row in report.tensors:
            row["predicted_loss"] = written.predicted.get(row["name"])
    report.summary = {
        "method": plan.method.name,
        "weights": _shared_weights(plan),
        "predicted_loss": written.predicted_loss,
        "parameters": plan.layout.parameters,
        "bytes": plan.layout.nbytes,
        "tensors": dict(Counter(target.action for target in plan.targets.values())),
        "rules": {f"{rule.place}: {rule.condition}": rule.tensors for rule in plan.rules},
    }


def _shared_weights(plan: MergePlan) -> list[float] | None:
    """The weights, where they are the same for all tensors."""
    found = {tuple(target.weights) for target in plan.targets.values()}
    return list(found.pop()) if len(found) == 1 else None


def _rows(plan: MergePlan) -> list[dict[str, Any]]:
    return [
        {
            "name": tensor.name,
            "shape": list(tensor.shape),
            "dtype": tensor.dtype,
            "action": plan.targets[tensor.name].action,
        }
        for tensor in plan.outputs()
    ]


def _public(reference: str) -> str:
    """A model's name without the folders of this machine, its adapter's too."""
    return "+".join(public_name(part) for part in split_reference(reference) if part is not None)


def _input_files(plan: MergePlan) -> list[Files]:
    found = [
        (reference, "model" if number in plan.inputs.models else "base", source)
        for number, (reference, source) in enumerate(
            zip(plan.inputs.references, plan.inputs.sources, strict=True)
        )
    ]
    found += [
        (plan.inputs.sidecars[number], "fisher", fisher.tensors)
        for number, fisher in plan.fishers.items()
    ]
    return [
        Files(_public(reference), role, list(map(asdict, source.digests())))
        for reference, role, source in found
    ]
