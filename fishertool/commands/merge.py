"""`fishertool merge`: several checkpoints -> one."""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fishertool.calibration import DataOptions
from fishertool.checkpoint.digest import FileDigest
from fishertool.checkpoint.dtypes import torch_name
from fishertool.checkpoint.layout import parse_size
from fishertool.checkpoint.staging import REPORT_FILE, check_output, free_bytes, staged
from fishertool.checkpoint.stream import PIECE_ELEMENTS
from fishertool.errors import UsageError
from fishertool.models.loading import check_device
from fishertool.progress import Track, silent
from fishertool.recipe.inputs import normalised
from fishertool.recipe.schema import Recipe
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
from fishertool.searching.coefficients import GRID_POINTS, dirichlet, grid
from fishertool.searching.weights import Judge
from fishertool.searching.weights import search_weights as search_weights_by
from fishertool.surgery.merge_plan import MergePlan, plan_merge
from fishertool.surgery.merge_write import write_merge

METHODS = "fishertool.merging"
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
    report = Report("merge", options_of(locals()), environment=environment(threads, device))
    method = find_method(METHODS, recipe.method)
    recipe = normalised(recipe, method)
    candidates = _candidates(recipe, weights, search_weights, search_points, evaluate_on)
    device = check_device(device)
    with ExitStack() as opened:
        with report.phase("check"):
            plan = plan_merge(opened, recipe, method, parse_size(max_shard_size), allow_nonfinite)
            if len(candidates) == 1:
                plan = plan.with_weights(candidates[0])
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
            with report.phase("merge"), track("Merging", total, "weights") as advance:
                digests = write_merge(plan, folder, threads, advance)
            if judge is not None:
                with report.phase("evaluate"):
                    measured = judge.measure(folder)
                report.evaluation = {"metrics": measured, "candidates": rows}
                report.calibration = judge.data.describe()
            with report.phase("digest"):
                report.inputs = _input_files(plan)
            if evaluate_on is not None:
                report.inputs += data_files(evaluate_on.data)
            _describe(report, plan, digests)
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
        if not all(0 <= weight < float("inf") for weight in weights) or sum(weights) <= 0:
            raise UsageError("--weights must be at least 0, and not all 0")
        return [list(weights)]
    if weights is not None:
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


def _describe(report: Report, plan: MergePlan, digests: Sequence[FileDigest]) -> None:
    report.output = Output(
        list(map(asdict, digests)),
        plan.layout.nbytes,
        plan.layout.parameters,
        torch_name(plan.dtype),
        list(plan.companions.copied),
        list(plan.companions.left_out),
    )
    report.tensors = _rows(plan)
    report.summary = {
        "method": plan.method.name,
        "weights": next(iter(plan.targets.values())).weights,
        "parameters": plan.layout.parameters,
        "bytes": plan.layout.nbytes,
        "tensors": dict(Counter(target.action for target in plan.targets.values())),
    }


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
        Files(public_name(reference), role, list(map(asdict, source.digests())))
        for reference, role, source in found
    ]
