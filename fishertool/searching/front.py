"""What a search found: the front, and what a page and a program need to know of every trial."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from fishertool.evaluation.correlation import spearman
from fishertool.searching.objectives import Objective
from fishertool.searching.pareto import hypervolumes, non_dominated, reference_of
from fishertool.searching.study import WHY, counts, point_of

SCHEMA = "fishertool.front/1"


def describe(
    trials: Sequence[FrozenTrial],
    objectives: Sequence[Objective],
    models: Sequence[str],
    recipe_text: Callable[[Mapping[str, Any]], str],
) -> dict[str, Any]:
    """The front and all trials of the search as plain data, trials renumbered without those lost.

    models       names of those whose losses are predicted
    recipe_text  the recipe at a point, for the points of the front
    """
    ended = [trial for trial in trials if counts(trial) and trial.state.is_finished()]
    done = [trial for trial in ended if trial.state == TrialState.COMPLETE]
    values = signed_values(done, objectives)
    on_front: set[int] = set()
    curve: list[float] = []
    reference: list[float] = []
    if done:
        front = non_dominated(values)
        first = {tuple(row): i for i, row in reversed(list(enumerate(values.tolist())))}
        on_front = {done[i].number for i in first.values() if front[i]}
        signs = torch.tensor([one.sign for one in objectives], dtype=torch.float64)
        worst = reference_point(values, objectives)
        reference = (worst * signs).tolist()
        curve = hypervolumes(values, worst)
    rows = []
    for number, trial in enumerate(ended):
        complete, best = trial.state == TrialState.COMPLETE, trial.number in on_front
        row: dict[str, Any] = {
            "number": number,
            "state": "complete" if complete else "failed",
            "values": list(trial.values) if complete else None,
            "parameters": point_of(trial),
            "on_front": best,
            "picked": False,
            "predicted_loss": trial.user_attrs.get("predicted_loss"),
            "distance": trial.user_attrs.get("distance"),
            "seconds": trial.user_attrs.get("seconds"),
            "recipe": f"front/{number:04}.yml" if best else None,
            "recipe_text": recipe_text(point_of(trial)) if best else None,
        }
        if not complete:
            row["error"] = trial.user_attrs.get(WHY, "")
        rows.append(row)
    return {
        "schema": SCHEMA,
        "objectives": [
            {"name": one.name, "metric": one.metric, "direction": one.direction}
            for one in objectives
        ],
        "variables": list(rows[0]["parameters"]) if rows else [],
        "models": list(models),
        "reference": reference,
        "hypervolume": curve,
        "correlation": correlations(done, objectives, models),
        "trials": rows,
    }


def signed_values(done: Sequence[FrozenTrial], objectives: Sequence[Objective]) -> Tensor:
    """[trial, objective], larger is better."""
    signs = torch.tensor([one.sign for one in objectives], dtype=torch.float64)
    rows = [trial.values for trial in done]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(signs)) * signs


def reference_point(values: Tensor, objectives: Sequence[Objective]) -> Tensor:
    """The worst that counts for the hypervolume, larger is better: what the recipe says, or inferred."""
    given = [one.reference for one in objectives]
    if None in given:
        return reference_of(values)
    signs = [one.sign for one in objectives]
    return torch.tensor(
        [sign * (worst or 0.0) for sign, worst in zip(signs, given, strict=True)],
        dtype=torch.float64,
    )


def correlations(
    done: Sequence[FrozenTrial], objectives: Sequence[Objective], models: Sequence[str]
) -> list[dict[str, Any]] | None:
    """Spearman's, over trials, of each model's predicted loss with each objective measured on data.

    None without predictions, or for fewer than three trials.
    """
    known = [trial for trial in done if trial.user_attrs.get("predicted_loss") is not None]
    if len(known) < 3:
        return None
    return [
        {
            "objective": objective.name,
            "model": model,
            "spearman": spearman(
                [trial.user_attrs["predicted_loss"][m] for trial in known],
                [trial.values[k] for trial in known],
            ),
        }
        for k, objective in enumerate(objectives)
        if objective.data is not None
        for m, model in enumerate(models)
    ]
