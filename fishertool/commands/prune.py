"""`fishertool prune`: dense -> sparse."""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fishertool.calibration import DataOptions
from fishertool.checkpoint.digest import FileDigest
from fishertool.checkpoint.layout import parse_size
from fishertool.checkpoint.reader import open_checkpoint
from fishertool.checkpoint.staging import REPORT_FILE, check_output, free_bytes, staged
from fishertool.errors import UsageError
from fishertool.estimation.settings import Settings
from fishertool.models.loading import check_device
from fishertool.models.units import PATTERNS
from fishertool.progress import Track, silent
from fishertool.pruning.parts.masks import kept_of_all
from fishertool.report import (
    Files,
    Report,
    data_files,
    environment,
    options_of,
    public_name,
)
from fishertool.surgery.output import (
    BASE_RSS_BYTES,
    checkpoint_output,
    code_left_out,
    row_of,
)
from fishertool.surgery.prune_plan import PrunePlan, check_bank, mask_name, plan_prune
from fishertool.surgery.prune_recipe import resolve_recipe
from fishertool.surgery.prune_report import rows_of, summary_of, updates_of, warnings_of
from fishertool.surgery.prune_run import Outcome, run_prune
from fishertool.surgery.prune_stage import STEM
from fishertool.surgery.prune_step import magnitude_masks
from fishertool.surgery.prune_trial import UNMEASURED, open_trial, plan_trial
from fishertool.surgery.prune_write import write_mask, write_pruned
from fishertool.surgery.shrink_job import Examples, shrink
from fishertool.surgery.shrink_plan import check_structured, structured_recipe

WORK = "work"
DOUBLES = 8
"""Matrices of the largest layer's size that a step holds at once."""


def prune(
    model: str,
    out: Path,
    *,
    method: str = "magnitude",
    sparsity: float | None = None,
    pattern: str = "unstructured",
    fisher: str | None = None,
    general_fisher: str | None = None,
    settings: Mapping[str, Any] | None = None,
    budget: str | None = None,
    normalize: str = "none",
    compensate: str | None = None,
    block: str | None = None,
    damping: str | None = None,
    steps: int = 1,
    recover_steps: int = 0,
    recover_learning_rate: float = 1e-4,
    data: DataOptions | None = None,
    held_out: float = 0.2,
    labels: str = "auto",
    group: int = 1,
    task: str = "auto",
    save_mask: bool = False,
    resume: bool = False,
    seed: int = 0,
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
    """Write `model` into `out` with a share `sparsity` of its selected weights zero.

    Selected are the linear weights inside the blocks, unless `include` says otherwise. What the
    method asks of a Fisher is in the sidecar `fisher`, or is estimated on `data`; of these, a share
    `held_out` is only measured on. With `pattern` heads or neurons, a share of these is left out of
    every block, and the model is smaller.
    """
    given = dict(locals())
    report = Report("prune", options_of(given), environment=environment(threads, device))
    if not 0 < recover_learning_rate < float("inf"):
        raise UsageError(f"--recover-learning-rate {recover_learning_rate:g}: a number above 0")
    if pattern in PATTERNS:
        check_structured(given)
        device = report.environment["device"] = check_device(device)
        torch.set_num_threads(threads)
        examples = None
        if data is not None:
            examples = Examples(data, held_out, labels, task, recover_steps, recover_learning_rate)
        return shrink(
            report,
            model,
            out,
            structured_recipe(pattern, sparsity, method, compensate, settings or {}),
            examples,
            max_shard_bytes=parse_size(max_shard_size),
            seed=seed,
            overwrite=overwrite,
            dry_run=dry_run,
            allow_nonfinite=allow_nonfinite,
            trust_remote_code=trust_remote_code,
            device=device,
            track=track,
        )
    recipe = resolve_recipe(
        method, settings or {}, sparsity=sparsity, pattern=pattern, budget=budget,
        normalize=normalize, compensate=compensate, block=block, damping=damping, steps=steps,
        recover_steps=recover_steps,
    )  # fmt: skip
    device = report.environment["device"] = check_device(device)
    torch.set_num_threads(threads)
    report.options["set"] = recipe.settings
    report.options["budget"] = None if recipe.pattern.m else recipe.budget
    report.warnings += recipe.warnings
    with ExitStack() as opened:
        with report.phase("check"):
            plan = plan_prune(
                opened, model, fisher, general_fisher, recipe, include, exclude,
                parse_size(max_shard_size), allow_nonfinite, trust_remote_code, data is not None,
            )  # fmt: skip
            folders = plan.statistics.folders() if plan.statistics else []
            needed = _needed_bytes(plan, data)
            check_output(out, [plan.folders.top, *folders], overwrite, sum(needed.values()))
            trial_plan = None
            if data is not None:
                asked = Settings(",".join(recipe.kinds or ["diagonal"]), labels, group=group)
                trial_plan = plan_trial(
                    opened, model, task, data, asked, held_out, trust_remote_code
                )
        if dry_run:
            return _forecast(report, plan, needed, out)
        trial = None
        before: float | None = None
        if trial_plan is not None:
            with report.phase("open"):
                trial = open_trial(
                    opened, trial_plan, list(plan.by_name), device, not allow_nonfinite
                )
                if plan.statistics is None and "rank-one" in recipe.kinds:
                    check_bank(recipe, -(-len(trial.calibration.texts.examples) // group))
                before = trial.loss()
        with staged(out, overwrite, WORK if resume else None) as folder:
            work = folder / WORK
            work.mkdir(exist_ok=True)
            with report.phase("prune"):
                job = {
                    "options": report.options,
                    "fingerprint": plan.checkpoint.fingerprint(),
                    "sidecars": plan.statistics and plan.statistics.fingerprints(),
                    "calibration": trial and trial.calibration.texts.describe(),
                }
                outcome = run_prune(plan, trial, work, job, seed, track)
                plan = outcome.plan
                plain = magnitude_masks(plan, outcome.recipe, work)
            trained: Mapping[str, Tensor] = {}
            if recover_steps and trial is not None:
                with report.phase("recover"), open_checkpoint(outcome.pruned, STEM) as pruned:
                    masks = [(trial.part(one), pruned[mask_name(one.key)]) for one in plan.matrices]
                    outcome.recovery = trial.recover(
                        masks, recover_steps, recover_learning_rate, track
                    )
                trained = trial.parameters
            with report.phase("write"):
                digests, zeros = _write(plan, outcome, trained, folder, save_mask, threads, track)
            report.tensors = rows_of(plan, outcome, plain, zeros)
            report.summary = summary_of(plan, outcome, report.tensors, zeros)
            report.summary["updates"] = updates_of(report.tensors)
            report.warnings += warnings_of(plan, outcome, report.summary)
            if trial is None or before is None:
                report.warnings.append(UNMEASURED)
            else:
                after = (outcome.recovery or outcome.steps[-1])["held_out_loss"]
                told = {name: getattr(outcome, name) for name in ("steps", "dampings", "recovery")}
                trial.tell(report, before, after, told)
            with report.phase("digest"):
                report.inputs = _input_files(plan, model, fisher, general_fisher)
            if data is not None:
                report.inputs += data_files(data.data)
            report.output = checkpoint_output(
                plan.layout, digests, plan.folders.of_top, folder, plan.folders.place(folder), work
            )
            report.warnings += code_left_out(plan.checkpoint, plan.folders.companions)
            (folder / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
            shutil.rmtree(work)
    return report


def _write(
    plan: PrunePlan,
    outcome: Outcome,
    trained: Mapping[str, Tensor],
    folder: Path,
    save_mask: bool,
    threads: int,
    track: Track,
) -> tuple[list[FileDigest], dict[str, int]]:
    with (
        track("Writing", plan.layout.parameters, "weights") as advance,
        open_checkpoint(outcome.pruned, STEM) as pruned,
    ):
        digests, zeros = write_pruned(plan, pruned, trained, folder, threads, advance)
        return digests + (write_mask(plan, pruned, folder) if save_mask else []), zeros


def _needed_bytes(plan: PrunePlan, data: DataOptions | None) -> dict[str, int]:
    """At most: the checkpoint again, what every step prunes once more with its masks, and
    saliencies."""
    stored = sum(matrix.info.nbytes for matrix in plan.matrices)
    steps = len(plan.recipe.schedule)
    work = steps * (stored + plan.elements) + 6 * plan.elements
    found = {"output": plan.layout.nbytes, "work": work}
    if data is not None and plan.statistics is None and "rank-one" in plan.recipe.kinds:
        found["bank"] = 2 * plan.elements * (data.num_examples or 1)
    return found


def _forecast(report: Report, plan: PrunePlan, needed: Mapping[str, int], out: Path) -> Report:
    report.status = "dry-run"
    report.tensors = [row_of(matrix.info, "prune") for matrix in plan.matrices]
    largest = max(matrix.elements for matrix in plan.matrices)
    recipe, shapes = plan.recipe, [matrix.shape for matrix in plan.matrices]
    kept = kept_of_all(shapes, recipe.pattern, recipe.sparsity, recipe.budget)
    report.summary = {
        "selected": len(plan.matrices),
        "weights": plan.elements,
        "weights_to_prune": plan.elements - kept,
        "bytes_to_write": needed["output"],
        "bytes_of_working_files": sum(needed.values()) - needed["output"],
        "free_bytes": free_bytes(out),
        "estimated_peak_bytes": BASE_RSS_BYTES + DOUBLES * 8 * largest,
    }
    return report


def _input_files(
    plan: PrunePlan, model: str, fisher: str | None, general: str | None
) -> list[Files]:
    found = [Files.of(public_name(model), "model", plan.checkpoint.digests())]
    if plan.statistics is not None:
        for source, kinds in ((fisher, plan.statistics.kinds), (general, plan.statistics.general)):
            if source is not None:
                digests = [one for tensors, _ in kinds.values() for one in tensors.digests()]
                found.append(Files.of(public_name(source), "fisher", digests))
    return found
