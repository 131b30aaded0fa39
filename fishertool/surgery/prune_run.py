"""From a plan to pruned weights on disk: all steps, with the Fisher and the damping of each."""

import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from math import inf, isinf, isnan
from pathlib import Path
from typing import Any

from fishertool.checkpoint.companions import write_json
from fishertool.checkpoint.json_files import load_json
from fishertool.checkpoint.reader import open_checkpoint
from fishertool.errors import InputError, UsageError
from fishertool.progress import Track
from fishertool.surgery.prune_plan import PrunePlan
from fishertool.surgery.prune_recipe import Recipe
from fishertool.surgery.prune_stage import STEM, Step
from fishertool.surgery.prune_statistics import Statistics, open_kind
from fishertool.surgery.prune_step import run_step
from fishertool.surgery.prune_trial import Trial

DAMPINGS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""What `--damping auto` tries."""
JOB = "job.json"


@dataclass
class Outcome:
    """What all steps came to."""

    plan: PrunePlan
    """With what was pruned indeed."""
    pruned: Path
    """New weights and masks, by name on disk; see `prune_step`."""
    recipe: Recipe
    """With the damping that was chosen."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    dampings: list[dict[str, float]] = field(default_factory=list)
    """The held-out loss of each that was tried."""
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of the last step, by matrix."""
    recovery: dict[str, Any] | None = None
    """What training after the last step did."""


def run_prune(
    plan: PrunePlan, trial: Trial | None, place: Path, job: dict[str, Any], seed: int, track: Track
) -> Outcome:
    """Prune step by step in `place`, going on with what an earlier run of the same job left there."""
    _check_job(place, job)
    recipe = plan.recipe
    outcome = Outcome(plan, place, recipe)
    count = len(recipe.schedule)
    for number in range(1, count + 1):
        here = place / f"step-{number}"
        here.mkdir(exist_ok=True)
        with ExitStack() as opened:
            before = (
                None if number == 1 else opened.enter_context(open_checkpoint(outcome.pruned, STEM))
            )
            statistics = plan.statistics if number == 1 else None
            if statistics is None and recipe.kinds and not (here / "pruned").exists():
                assert trial is not None
                statistics = _estimated(opened, trial, recipe, here, track)
                unreached = set(statistics.unreached(plan.matrices))
                if number == 1:
                    plan = plan.without(unreached)
                reached = [one for one in plan.matrices if one.key not in unreached]
                statistics.check(reached, trial.calibration.texts.name)
            now = outcome.recipe.schedule[number - 1]
            step = Step(plan, now, statistics, before, seed, trial)
            if recipe.has_damping and recipe.damping is None and number == 1:
                assert trial is not None
                outcome.dampings = _try_dampings(step, trial, here, track)
                best = min(outcome.dampings, key=lambda row: row["held_out_loss"])
                outcome.recipe = outcome.recipe.with_damping(best["damping"])
                step.recipe = now.with_damping(best["damping"])
            with track(
                f"Pruning, step {number} of {count}", 2 * plan.elements, "weights"
            ) as advance:
                outcome.pruned = run_step(step, here, advance)
        with open_checkpoint(outcome.pruned, STEM) as pruned:  # if an earlier run left it
            plan = plan.without([one.key for one in plan.matrices if one.key not in pruned])
        shutil.rmtree(here / "fisher", ignore_errors=True)
        outcome.figures = step.figures
        predicted = [row["predicted_loss_change"] for row in step.figures.values()]
        outcome.steps.append(
            {
                "sparsity": now.sparsity,
                "pattern": str(now.pattern),
                "predicted_loss_change": None if None in predicted else sum(predicted),
                **step.counts,
            }
        )
        if trial is not None:
            with open_checkpoint(outcome.pruned, STEM) as pruned:
                trial.put_all(pruned, plan.matrices)
            outcome.steps[-1]["held_out_loss"] = trial.loss()
    outcome.plan = plan
    return outcome


def _check_job(place: Path, job: dict[str, Any]) -> None:
    path = place / JOB
    if path.is_file() and load_json(path) != job:
        raise UsageError(
            f"{place}: a killed run with other options or sidecars left its work there; "
            "repeat it with those, or remove the folder"
        )
    write_json(path, job)


def _estimated(
    opened: ExitStack, trial: Trial, recipe: Recipe, here: Path, track: Track
) -> Statistics:
    folder, partial = here / "fisher", here / "fisher.partial"
    if not folder.exists():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        count = len(trial.calibration.texts.examples)
        with track("Estimating", count, "examples") as advance:
            trial.estimate(partial, recipe.kinds, advance)
        partial.rename(folder)
    return Statistics({kind: open_kind(opened, folder, kind) for kind in recipe.kinds})


def _try_dampings(step: Step, trial: Trial, here: Path, track: Track) -> list[dict[str, float]]:
    """Prune by each, with the update that is asked for; where updates are gated without, or, if
    nothing else is damped, with the last of them."""
    recipe, kept = step.recipe, here / "dampings.json"
    if kept.is_file():
        return list(load_json(kept)["dampings"])
    rows: list[dict[str, float]] = []
    with track("Trying dampings", len(DAMPINGS), "models") as advance:
        for damping in DAMPINGS:
            tried = recipe.with_damping(damping)
            if recipe.gated:
                updates = () if recipe.damps_saliency else recipe.updates[-1:]
                tried = replace(tried, updates=updates, gated=False)
            place = here / f"damping-{damping:g}"
            place.mkdir(exist_ok=True)
            one = Step(step.plan, tried, step.statistics, step.before, step.seed)
            try:
                with open_checkpoint(run_step(one, place, lambda count: None), STEM) as pruned:
                    trial.put_all(pruned, step.plan.matrices)
                loss = trial.loss()
            except InputError:
                if damping == DAMPINGS[-1] and all(isinf(row["held_out_loss"]) for row in rows):
                    raise
                loss = inf  # too little for a matrix or its dtype; another may do
            rows.append({"damping": damping, "held_out_loss": loss})
            shutil.rmtree(place)
            advance(1)
    if all(isnan(row["held_out_loss"]) for row in rows):
        raise InputError(
            f"{trial.calibration.texts.name}: --damping auto is chosen on held-out examples, and "
            "nothing is scored in these; give other data, or a number"
        )
    write_json(kept, {"dampings": rows})
    return rows
