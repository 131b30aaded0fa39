"""`fishertool prune --pattern heads|neurons`: from the model's folder to a smaller one and a report."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fishertool.calibration import DataOptions
from fishertool.checkpoint.reader import open_checkpoint
from fishertool.checkpoint.staging import REPORT_FILE, check_output, free_bytes, staged
from fishertool.estimation.measuring import loss_of
from fishertool.estimation.settings import Settings
from fishertool.models.layers import layers_of
from fishertool.models.loading import load_model
from fishertool.progress import Track
from fishertool.pruning.parts.units import features_of
from fishertool.report import Files, Report, data_files, public_name
from fishertool.surgery.output import checkpoint_output, code_left_out, row_of
from fishertool.surgery.prune_trial import UNMEASURED, Trial, open_trial, plan_trial
from fishertool.surgery.shrink import Outcome, put, run_shrink
from fishertool.surgery.shrink_plan import ShrinkPlan, ShrinkRecipe, plan_shrink
from fishertool.surgery.shrink_write import write_shrunk


@dataclass(frozen=True)
class Examples:
    """What data there are, and how they are used."""

    options: DataOptions
    held_out: float
    """Share that is only measured on."""
    labels: str
    task: str
    recover_steps: int
    learning_rate: float


def shrink(
    report: Report,
    model: str,
    out: Path,
    recipe: ShrinkRecipe,
    examples: Examples | None,
    *,
    max_shard_bytes: int,
    seed: int,
    overwrite: bool,
    dry_run: bool,
    allow_nonfinite: bool,
    trust_remote_code: bool,
    device: str,
    track: Track,
) -> Report:
    """Write `model` into `out` with fewer heads or neurons in every block; fill in the report.

    With `examples`, the loss is that of the written model, loaded again, on those held out.
    """
    with ExitStack() as opened:
        with report.phase("check"):
            plan = plan_shrink(
                opened, model, recipe, max_shard_bytes, examples is not None, trust_remote_code
            )
            check_output(out, [plan.folders.top], overwrite, plan.layout.nbytes)
            trial_plan = None
            if examples is not None:
                trial_plan = plan_trial(
                    opened, model, examples.task, examples.options,
                    Settings(labels=examples.labels), examples.held_out, trust_remote_code,
                )  # fmt: skip
        report.summary = _summary(plan, trust_remote_code)
        if dry_run:
            report.status = "dry-run"
            report.tensors = _rows(plan, None)
            report.summary |= {"bytes_to_write": plan.layout.nbytes, "free_bytes": free_bytes(out)}
            return report
        trial = None
        if trial_plan is not None:
            with report.phase("open"):
                joins = [block.join.name for block in plan.units.blocks]
                trial = open_trial(opened, trial_plan, joins, device, not allow_nonfinite)
        with report.phase("prune"):
            outcome = _run(plan, trial, seed, track)
        trained: Mapping[str, Tensor] = {}
        recovery = None
        if examples is not None and trial is not None and examples.recover_steps:
            with report.phase("recover"):
                recovery = _recover(plan, outcome, trial, examples, track)
            trained = trial.parameters
        total = plan.layout.parameters
        with staged(out, overwrite) as folder:
            with report.phase("write"), track("Writing", total, "weights") as advance:
                digests = write_shrunk(
                    plan, outcome, trained, folder, allow_nonfinite=allow_nonfinite, advance=advance
                )
            report.tensors = _rows(plan, outcome)
            if trial is not None:
                with report.phase("measure"):
                    after = _loss_of_output(plan, trial, folder, device, trust_remote_code)
                report.summary["compensate"] = outcome.compensate
                told = {"losses": outcome.losses, "recovery": recovery}
                trial.tell(report, outcome.losses["dense"], after, told)
            else:
                report.warnings.append(UNMEASURED)
            report.inputs = _inputs(plan, model, examples)
            report.output = checkpoint_output(
                plan.layout, digests, plan.folders.of_top, folder, plan.folders.place(folder)
            )
            report.warnings += code_left_out(plan.checkpoint, plan.folders.companions)
            (folder / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
    return report


def _run(plan: ShrinkPlan, trial: Trial | None, seed: int, track: Track) -> Outcome:
    if trial is None:
        return run_shrink(plan, None, None, seed)
    count = len(trial.calibration.texts.examples) if plan.recipe.needs_data else 0
    with track("Estimating", count, "examples") as advance:
        return run_shrink(plan, trial.calibration, trial.loss, seed, advance)


def _recover(
    plan: ShrinkPlan, outcome: Outcome, trial: Trial, examples: Examples, track: Track
) -> dict[str, Any]:
    """Train what stays, with what is left out silent behind the joining layers."""
    put(plan, trial.calibration, outcome.kept, outcome.joining)
    masks = []
    for block in plan.units.blocks:
        parameter = trial.calibration.parameters[block.join.name]
        mask = torch.zeros_like(parameter, dtype=torch.bool)
        kept = features_of(outcome.kept[block.join.name], block.join.features).to(mask.device)
        masks.append((parameter, mask.index_fill_(block.join.dimension, kept, True)))
    return trial.recover(masks, examples.recover_steps, examples.learning_rate, track)


def _loss_of_output(
    plan: ShrinkPlan, trial: Trial, folder: Path, device: str, trust_remote_code: bool
) -> float:
    held, subject = trial.held_out, trial.held_out.subject
    with open_checkpoint(plan.folders.place(folder)) as written:
        small = load_model(written, subject.task, device, trust_remote_code, subject.data.scale)
    return loss_of(replace(held, model=small))


def _summary(plan: ShrinkPlan, trust_remote_code: bool) -> dict[str, Any]:
    """Sizes before and after; multiplications are those of the layers inside the blocks."""
    checkpoint, recipe = plan.checkpoint, plan.recipe
    shapes = plan.units.shapes(checkpoint, plan.kept)
    infos = [checkpoint.info(info.name) for info in plan.layout.tensors]
    small = [replace(info, shape=shapes.get(info.name, info.shape)) for info in infos]
    layers = layers_of(checkpoint, trust_remote_code)
    inside = {
        name for name, layer in layers.items() if layer.in_block and layer.kind != "embedding"
    }
    found: dict[str, Any] = {
        "method": recipe.method,
        "pattern": recipe.pattern,
        "sparsity": 1 - plan.kept / plan.units.number,
        "blocks": len(plan.units.blocks),
        "units": plan.units.number,
        "kept": plan.kept,
        "config": plan.units.changes(plan.kept),
    }
    for when, tensors in (("before", infos), ("after", small)):
        found |= {
            f"parameters_{when}": sum(info.elements for info in tensors),
            f"bytes_{when}": sum(info.nbytes for info in tensors),
            f"multiplications_per_token_{when}": sum(
                info.elements for info in tensors if info.name in inside
            ),
        }
    return found


def _rows(plan: ShrinkPlan, outcome: Outcome | None) -> list[dict[str, Any]]:
    """A row for every tensor that is written."""
    cut = plan.units.shapes(plan.checkpoint, plan.kept)
    figures = {} if outcome is None else outcome.figures
    rows = []
    for info in plan.layout.tensors:
        if info.name not in cut:
            rows.append(row_of(info, "keep"))
            continue
        before = list(plan.checkpoint.info(info.name).shape)
        rows.append(row_of(info, "prune", shape_before=before, **figures.get(info.name, {})))
    return rows


def _inputs(plan: ShrinkPlan, model: str, examples: Examples | None) -> list[Files]:
    found = [Files.of(public_name(model), "model", plan.checkpoint.digests())]
    return found + ([] if examples is None else data_files(examples.options.data))
