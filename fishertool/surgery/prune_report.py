"""What a pruning did, in the report's terms."""

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fishertool.checkpoint.reader import open_checkpoint
from fishertool.errors import some
from fishertool.pruning.parts.masks import overlap
from fishertool.surgery.output import row_of
from fishertool.surgery.prune_plan import SUMMED_STACK, UNREACHED, PrunePlan, mask_name
from fishertool.surgery.prune_run import Outcome
from fishertool.surgery.prune_stage import STEM

NOTHING_GAINED = (
    "nothing: zeros are stored and multiplied like any number; the file has the same bytes, and a "
    "dense runtime takes the same memory and time"
)
ZERO = (("unmoved", "what stays was not moved"), ("by_magnitude", "pruned by magnitude alone"))
"""Note taken of a matrix whose statistic is zero, and what it says; the last one of a matrix is told."""
MAGNITUDES = 0.99
"""Overlap with magnitude's mask from which on a method's cost was for nothing."""


def rows_of(
    plan: PrunePlan, outcome: Outcome, magnitude: Path, zeros: Mapping[str, int]
) -> list[dict[str, Any]]:
    """A row for every tensor, and for every expert of a stack, in file order. `sparsity` is the
    mask's; with what was zero before, `zeros` of the weights are."""
    by_key = {matrix.key: matrix for matrix in plan.matrices}
    rows = []
    with open_checkpoint(outcome.pruned, STEM) as pruned, open_checkpoint(magnitude, STEM) as plain:
        for info in plan.parts:
            name = info.name
            if name not in by_key:
                rows.append(row_of(info, "keep", why=plan.kept[name]))
                continue
            matrix = by_key[name]
            mask = matrix.upright(pruned[mask_name(name)])
            common, kept = overlap(mask, plain[name])
            found = {
                "kept": kept,
                "sparsity": 1 - kept / matrix.elements,
                "zeros": zeros[name] / matrix.elements,
                "overlap_with_magnitude": common / kept if kept else 1.0,
            }
            rows.append(row_of(info, "prune", **found | outcome.figures.get(name, {})))
    return rows


def summary_of(
    plan: PrunePlan, outcome: Outcome, rows: list[dict[str, Any]], zeros: Mapping[str, int]
) -> dict[str, Any]:
    pruned = [row for row in rows if row["action"] == "prune"]
    kept = sum(row["kept"] for row in pruned)
    common = sum(row["kept"] * row["overlap_with_magnitude"] for row in pruned)
    predicted = [row["predicted_loss_change"] for row in outcome.steps]
    recipe = outcome.recipe
    return {
        "method": recipe.method.name,
        "pattern": str(recipe.pattern),
        "sparsity": 1 - kept / plan.elements,
        "zeros": sum(zeros.values()) / plan.elements,
        "sparsity_of_model": (plan.elements - kept) / plan.layout.parameters,
        "sparsity_by_kind": _by_kind(plan, pruned),
        "weights_pruned": plan.elements - kept,
        "overlap_with_magnitude": common / kept if kept else 1.0,
        "damping": recipe.damping if "rank-one" in recipe.kinds else None,
        "moment_damping": recipe.moment_damping if recipe.inverts_moment else None,
        "predicted_loss_change": None if None in predicted else sum(predicted),
        "bytes": plan.layout.nbytes,
        "bytes_in_memory": sum(info.nbytes for info in plan.layout.tensors),
        "runtime_gain": NOTHING_GAINED,
    }


def updates_of(rows: list[dict[str, Any]]) -> dict[str, int]:
    """How many matrices got each update."""
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        if row["action"] == "prune":
            counts[row["update"]] += 1
    return dict(counts)


def warnings_of(plan: PrunePlan, outcome: Outcome, summary: dict[str, Any]) -> list[str]:
    found = []
    if unreached := [name for name, why in plan.kept.items() if why == UNREACHED]:
        found.append(
            f"no token of the data reached {some(unreached)}, which stay as they are; more examples "
            "reach more"
        )
    if stacks := [name for name, why in plan.kept.items() if why == SUMMED_STACK]:
        whole = sum(info.elements for info in plan.checkpoint.infos().values())
        share = sum(plan.checkpoint.info(name).elements for name in stacks) / whole
        found.append(
            f"{some(stacks)}, {100 * share:.0f} % of the model's weights, stay as they are, each "
            f"{SUMMED_STACK}; a diagonal tells of every expert"
        )
    method = outcome.recipe.method.name
    same = summary["overlap_with_magnitude"]
    if method != "magnitude" and same > MAGNITUDES and summary["sparsity"] > 0:
        found.append(
            f"the mask of {method} is magnitude's to {100 * same:.2f} %: its statistic decided next "
            "to nothing"
            + (
                "; a --block of no more weights than gradients tells more"
                if method == "mfac"
                else ""
            )
        )
    untold = {
        name: what for key, what in ZERO for row in outcome.steps for name in row.get(key, [])
    }
    for what in dict.fromkeys(untold.values()):
        names = [name for name in untold if untold[name] == what]
        found.append(
            f"the statistic of {some(names)} is zero on these examples: {what}; take other "
            "examples, or leave out with --exclude what they do not reach"
        )
    for row in outcome.steps:
        if row.get("fallbacks"):
            found.append(
                f"{row['fallbacks']} blocks of the Fisher were singular, and got more damping; "
                "take more --damping"
            )
    return found


def _by_kind(plan: PrunePlan, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Layers' numbers aside, tensors of one name are of one kind."""
    kept: dict[str, int] = defaultdict(int)
    elements: dict[str, int] = defaultdict(int)
    sizes = {matrix.key: matrix.elements for matrix in plan.matrices}
    for row in rows:
        kind = re.sub(r"(?<=[.\[])\d+(?=[.\]])", "*", row["name"])
        kept[kind] += row["kept"]
        elements[kind] += sizes[row["name"]]
    return {kind: 1 - kept[kind] / elements[kind] for kind in kept}
