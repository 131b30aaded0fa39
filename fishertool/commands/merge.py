"""`fishertool merge`: several checkpoints -> one."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from fishertool.calibration import DataOptions, check_data_source
from fishertool.checkpoint.companions import digests_beside
from fishertool.checkpoint.layout import parse_size
from fishertool.checkpoint.staging import REPORT_FILE, check_output, staged
from fishertool.errors import UsageError
from fishertool.models.loading import check_device
from fishertool.models.lora_writer import LoraWriter
from fishertool.models.sources import public_reference, split_reference
from fishertool.progress import Track, silent
from fishertool.recipe.inputs import WEIGHT, normalised, spelled_alike, weighted
from fishertool.recipe.schema import Recipe
from fishertool.recipe.write import plain, renamed
from fishertool.registry import MERGING, Method, find_method, suggest
from fishertool.report import Output, Report, data_files, environment, options_of
from fishertool.searching.best_weights import best_weights
from fishertool.searching.coefficients import GRID_POINTS, dirichlet, grid
from fishertool.searching.weights import MergesJudge, agreement, judged_by
from fishertool.searching.weights import search_weights as search_weights_by
from fishertool.surgery import merge_report
from fishertool.surgery.merge_lora import open_lora, told_of_base, write_lora
from fishertool.surgery.merge_plan import MergePlan, plan_merge
from fishertool.surgery.merge_predict import check_optimal, gather_forms
from fishertool.surgery.merge_write import write_merge

FREE = "optimal-free"


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
    files. `weights` replace those of the recipe; `optimal` are those of the least predicted loss.
    """
    options = {name: value for name, value in locals().items() if name != "recipe"}
    report = Report("merge", options_of(options), environment=environment(threads, device))
    method = find_method(MERGING, recipe.method)
    recipe = spelled_alike(recipe)
    beside: list[str] = []
    if as_lora is not None:
        if predict or search_weights is not None or evaluate_on is not None:
            raise UsageError(
                "--as-lora writes no model to be measured or predicted: merge once without it for that"
            )
        recipe, base = _for_lora(recipe, method)
        beside.append(base)
    recipe = normalised(recipe, method)
    if weights is not None and not isinstance(weights, str):
        recipe = weighted(recipe, method, weights)
    report.options["recipe"] = plain(renamed(recipe, public_reference))
    report.warnings += recipe.notes
    candidates: list[list[float]] = []
    if search_weights is not None:
        candidates = _candidates(
            recipe, method, weights, search_weights, search_points, evaluate_on
        )
    device = report.environment["device"] = check_device(device)
    with ExitStack() as opened:
        with report.phase("check"):
            size = parse_size(max_shard_size)
            plan = plan_merge(
                opened, recipe, method, size, allow_nonfinite, trust_remote_code, beside
            )
            _check_asked(plan, weights, predict, candidates)
            lora = None if as_lora is None else open_lora(plan, beside[0], as_lora)
            report.warnings += plan.warnings
            if lora is not None:
                report.warnings += told_of_base(beside[0])
            needed = (1 + bool(search_weights)) * plan.layout.nbytes
            check_output(out, plan.folders, overwrite, lora.most_bytes if lora else needed)
            if evaluate_on is not None:
                check_data_source(evaluate_on)
                judged_by(plan, evaluate_on, metric)
        if dry_run:
            report.status = "dry-run"
            report.summary = (
                merge_report.forecast_adapter(plan, lora, threads, out)
                if lora
                else merge_report.forecast(plan, threads, out)
            )
            report.tensors = merge_report.rows(plan, {})
            return report
        judge = None
        if evaluate_on is not None:
            judge = MergesJudge(plan, evaluate_on, metric, batch_size, device, trust_remote_code)
        with staged(out, overwrite) as folder:
            tried: list[dict[str, Any]] = []
            if candidates and judge is not None:
                with report.phase("search"), track("Searching", len(candidates), "merges") as step:
                    best, tried = search_weights_by(
                        plan, candidates, judge, folder / "candidate", threads, step
                    )
                plan = plan.with_weights(best)
            elif isinstance(weights, str):
                plan = _with_optimal_weights(plan, weights == FREE, threads, report, track)
            _write(plan, lora, folder, predict, threads, report, track)
            if judge is not None:
                with report.phase("evaluate"):
                    measured = judge.of_folder(folder)
                report.evaluation = {"metrics": measured, "candidates": tried}
                report.evaluation["predicted_loss_spearman"] = agreement(tried)
                report.calibration = judge.data.describe()
                report.warnings += judge.warnings()
            with report.phase("digest"):
                report.inputs = merge_report.input_files(plan)
            if evaluate_on is not None:
                report.inputs += data_files(evaluate_on.data)
            (folder / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
    return report


def _check_asked(
    plan: MergePlan,
    weights: Sequence[float] | str | None,
    predict: bool,
    candidates: Sequence[Sequence[float]],
) -> None:
    """Raises UsageError for weights that cannot be found, or tried, and losses not predicted."""
    if isinstance(weights, str):
        check_optimal(plan, weights == FREE)
    if predict and not plan.predicts:
        raise UsageError(
            "--predict needs a --fisher with a diagonal for each model, of examples (an optimizer's "
            "is of batches)"
        )
    for candidate in candidates[:1]:
        plan.with_weights(candidate)


def _write(
    plan: MergePlan,
    lora: LoraWriter | None,
    folder: Path,
    predict: bool,
    threads: int,
    report: Report,
    track: Track,
) -> None:
    """Write the merge, or what it changes in a base, and tell of it."""
    total = plan.layout.parameters
    with report.phase("merge"), track("Merging", total, "weights") as advance:
        if lora is not None:
            files, told = write_lora(plan, lora, folder, advance)
            report.tensors = merge_report.rows(plan, told)
            report.output = Output.of(
                files,
                lora.parameters,
                "float32",
                digests_beside(folder, {folder / one.file for one in files}),
            )
            report.summary = merge_report.summary(plan)
            report.summary |= {"parameters": lora.parameters, "bytes": report.output.bytes}
            return
        written = write_merge(plan, folder, threads, advance)
    merge_report.tell(report, plan, written, folder, predict)


def _with_optimal_weights(
    plan: MergePlan, free: bool, threads: int, report: Report, track: Track
) -> MergePlan:
    total = plan.layout.parameters
    with report.phase("predict"), track("Predicting", total, "weights") as advance:
        forms = gather_forms(plan, threads, advance).total()
    return plan.with_weights(best_weights(forms, on_simplex=not free))


def _for_lora(recipe: Recipe, method: Method) -> tuple[Recipe, str]:
    """The recipe with its base for the method only where the method takes one; and that base."""
    base = recipe.base
    if base is None:
        raise UsageError("--as-lora needs --base, the model that the adapter is for")
    if split_reference(base)[1] is not None:
        raise UsageError(
            f"--as-lora: --base {base} is a model with an adapter, which no adapter can name as its "
            "base; write it out with --method passthrough first"
        )
    if recipe.dtype is not None:
        raise UsageError(
            f"--as-lora writes an adapter in float32; leave out the dtype {recipe.dtype}"
        )
    if recipe.tokenizer is not None or not recipe.whole:
        raise UsageError("--as-lora is for whole models that have the base's tokens and layers")
    listed = any(source.model == base for source in recipe.slices[0].sources)
    return (recipe if "base" in method.inputs or listed else replace(recipe, base=None)), base


def _candidates(
    recipe: Recipe,
    method: Method,
    weights: Sequence[float] | str | None,
    search: str,
    points: int,
    evaluate_on: DataOptions | None,
) -> list[list[float]]:
    """The weights to search among."""
    if "weights" not in method.inputs:
        raise UsageError(f"method {method.name} takes no weights to be searched")
    if weights is not None or any(WEIGHT in one.parameters for one in recipe.slices[0].sources):
        raise UsageError("--weights and --search-weights exclude each other")
    if evaluate_on is None:
        raise UsageError("--search-weights needs --evaluate-on, the data to choose by")
    counts = {len(piece.sources) for piece in recipe.slices}
    if len(counts) > 1:
        raise UsageError("--search-weights needs as many models in every slice")
    if search not in ("grid", "dirichlet"):
        raise UsageError(f"--search-weights {suggest(search, ('grid', 'dirichlet'))}")
    models = counts.pop()
    return grid(models, points) if search == "grid" else dirichlet(models, points, evaluate_on.seed)
