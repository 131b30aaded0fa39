"""`fishertool merge`: several checkpoints -> one."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fishertool.calibration import DataOptions
from fishertool.checkpoint.dtypes import torch_name
from fishertool.checkpoint.layout import parse_size
from fishertool.checkpoint.reader import Checkpoint
from fishertool.checkpoint.staging import REPORT_FILE, check_output, free_bytes, staged
from fishertool.checkpoint.stream import PIECE_ELEMENTS
from fishertool.errors import UsageError
from fishertool.models.loading import check_device
from fishertool.progress import Track, silent
from fishertool.registry import Method, find_method, suggest
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
PRESETS: dict[str, dict[str, Any]] = {
    "matena": {
        "normalization": "l2",
        "floor": 1e-6,
        "floor_scale": "absolute",
        "floor_models": "first",
        "power": 1.0,
    }
}
"""The options of the code released with Matena and Raffel 2022; its head stays the first model's."""
HEADS = ("error", "merge", "keep-first")
BASE_RSS_BYTES = 400_000_000


def merge(
    models: Sequence[str],
    out: Path,
    *,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    fisher: Sequence[str] = (),
    base: str | None = None,
    head: str | None = None,
    preset: str | None = None,
    settings: Mapping[str, Any] | None = None,
    search_weights: str | None = None,
    search_points: int = GRID_POINTS,
    metric: str | None = None,
    evaluate_on: DataOptions | None = None,
    batch_size: int = 8,
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
    """Merge `models` into `out`, in float32 with one rounding to the first model's dtypes.

    Tensors that `include` and `exclude` leave out are the first model's; so are the config and
    all companion files.
    """
    if len(models) < 2:
        raise UsageError("merge needs two models or more")
    report = Report("merge", options_of(locals()), environment=environment(threads, device))
    chosen, settings, head = _resolve(method, settings or {}, preset, head)
    candidates = _candidates(len(models), weights, search_weights, search_points, evaluate_on)
    device = check_device(device)
    report.options |= {"set": settings, "head": head}
    with ExitStack() as opened:
        with report.phase("check"):
            plan = plan_merge(
                opened, models, fisher, base, chosen, settings, head, include, exclude,
                parse_size(max_shard_size), allow_nonfinite,
            )  # fmt: skip
            inputs = [*plan.models, *([plan.base] if plan.base else [])]
            inputs += [tensors for tensors, _ in plan.sidecars]
            copies = 1 + bool(search_weights)
            check_output(
                out, [one.folder for one in inputs], overwrite, copies * plan.layout.nbytes
            )
        if dry_run:
            report.status = "dry-run"
            report.summary = _forecast(plan, inputs, threads, out)
            report.tensors = _rows(plan)
            return report
        judge = None
        if evaluate_on is not None:
            judge = Judge(plan, evaluate_on, metric, batch_size, device, trust_remote_code)
        with staged(out, overwrite) as folder:
            best = candidates[0]
            rows: list[dict[str, Any]] = []
            if search_weights and judge is not None:
                with report.phase("search"), track("Searching", len(candidates), "merges") as step:
                    best, rows = search_weights_by(
                        plan, candidates, judge, folder / "candidate", threads, step
                    )
            total = sum(tensor.elements for tensor in plan.outputs())
            with report.phase("merge"), track("Merging", total, "weights") as advance:
                digests = write_merge(plan, best, folder, threads, advance)
            if judge is not None:
                with report.phase("evaluate"):
                    measured = judge.measure(folder)
                report.evaluation = {"metrics": measured, "candidates": rows}
                report.calibration = judge.data.describe()
            with report.phase("digest"):
                report.inputs = _input_files(plan, models, fisher, base)
            if evaluate_on is not None:
                report.inputs += data_files(evaluate_on.data)
            files = list(map(asdict, digests))
            report.output = Output(
                files,
                plan.layout.nbytes,
                plan.layout.parameters,
                torch_name(plan.dtype),
                list(plan.companions.copied),
                list(plan.companions.left_out),
            )
            report.tensors = _rows(plan)
            report.summary = {
                "method": method,
                "weights": best,
                "parameters": plan.layout.parameters,
                "bytes": plan.layout.nbytes,
                "tensors": dict(Counter(plan.actions.values())),
            }
            (folder / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
    return report


def _resolve(
    name: str, given: Mapping[str, Any], preset: str | None, head: str | None
) -> tuple[Method, dict[str, Any], str]:
    """The method, all its settings, and the head policy, with a preset under what is given."""
    chosen = find_method(METHODS, name)
    settings = dict(given)
    if preset is not None:
        if preset not in PRESETS:
            raise UsageError(f"--preset {suggest(preset, PRESETS)}")
        if name != "fisher":
            raise UsageError(f"--preset {preset} is for --method fisher, not {name}")
        settings = {**PRESETS[preset], **settings}
        head = head or "keep-first"
    head = head or "error"
    if head not in HEADS:
        raise UsageError(f"--head {suggest(head, HEADS)}")
    parsed = chosen.parse(settings)
    for setting, value in parsed.items():
        if type(value) in (int, float) and not 0 <= value < float("inf"):
            raise UsageError(f"{name} {setting}: {value} is not a number of at least 0")
    return chosen, parsed, head


def _candidates(
    models: int,
    weights: Sequence[float] | None,
    search: str | None,
    points: int,
    evaluate_on: DataOptions | None,
) -> list[list[float]]:
    """The weights to merge by: those given, equal ones, or those to search among."""
    if search is None:
        chosen = list(weights) if weights is not None else [1.0 / models] * models
        if len(chosen) != models:
            raise UsageError(f"--weights has {len(chosen)} numbers for {models} models")
        if not all(0 <= weight < float("inf") for weight in chosen) or sum(chosen) <= 0:
            raise UsageError("--weights must be at least 0, and not all 0")
        return [chosen]
    if weights is not None:
        raise UsageError("--weights and --search-weights exclude each other")
    if evaluate_on is None:
        raise UsageError("--search-weights needs --evaluate-on, the data to choose by")
    if search not in ("grid", "dirichlet"):
        raise UsageError(f"--search-weights {suggest(search, ('grid', 'dirichlet'))}")
    return grid(models, points) if search == "grid" else dirichlet(models, points, evaluate_on.seed)


def _forecast(
    plan: MergePlan, inputs: Sequence[Checkpoint], threads: int, out: Path
) -> dict[str, Any]:
    floats = len(inputs) + 4
    return {
        "tensors": len(plan.actions),
        "bytes_to_read": sum(info.nbytes for one in inputs for info in one.infos().values()),
        "bytes_to_write": plan.layout.nbytes,
        "shards": len(plan.layout.shards),
        "free_bytes": free_bytes(out),
        "estimated_peak_bytes": BASE_RSS_BYTES + (threads + 1) * floats * 4 * PIECE_ELEMENTS,
    }


def _rows(plan: MergePlan) -> list[dict[str, Any]]:
    return [
        {
            "name": tensor.name,
            "shape": list(tensor.shape),
            "dtype": tensor.dtype,
            "action": plan.actions[tensor.name],
        }
        for tensor in plan.outputs()
    ]


def _input_files(
    plan: MergePlan, models: Sequence[str], fisher: Sequence[str], base: str | None
) -> list[Files]:
    found = [
        (source, "model", checkpoint)
        for source, checkpoint in zip(models, plan.models, strict=True)
    ]
    if base is not None and plan.base is not None:
        found.append((base, "base", plan.base))
    found += [
        (source, "fisher", tensors)
        for source, (tensors, _) in zip(fisher, plan.sidecars, strict=True)
    ]
    return [
        Files(public_name(source), role, list(map(asdict, checkpoint.digests())))
        for source, role, checkpoint in found
    ]
