"""What a factorization did, in the report's terms."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from fishertool.factorization.rank import Ranks, parameters, total
from fishertool.surgery.factorize_plan import FactorizePlan
from fishertool.surgery.output import row_of


def rows_of(
    plan: FactorizePlan, ranks: Ranks, figures: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A row a matrix that was selected, and one for every other tensor, in file order.

    Shapes are those on disk. --format dense writes products of factors: no fewer parameters.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    low_rank = plan.format == "low-rank"
    for matrix in plan.matrices:
        rank = ranks[matrix.key]
        row = row_of(
            matrix.info,
            "keep" if rank is None else "factorize",
            parameters_before=matrix.elements,
            parameters_after=parameters(matrix.shape, rank if low_rank else None),
        )
        if rank is None:
            row["why"] = "at break-even: factors would have no fewer parameters"
        else:
            row |= {"rank": rank, **figures.get(matrix.key, {})}
        found.setdefault(matrix.name, []).append(row)
    for name, why in plan.kept.items():
        found[name] = [row_of(plan.checkpoint.info(name), "keep", why=why)]
    return [row for name in plan.checkpoint for row in found.get(name, [])]


def summary_of(plan: FactorizePlan, ranks: Ranks) -> dict[str, Any]:
    """Parameters that are left, as shares of four wholes: what was selected (which is what `--keep`
    is of), what of it has factors now, all linear weights, and the model; these count factors also
    where --format dense writes their products."""
    shapes = plan.shapes
    gone = {
        key: parameters(shape, None) - parameters(shape, ranks[key])
        for key, shape in shapes.items()
    }
    selected = total(shapes, dict.fromkeys(shapes))
    names = {matrix.name for matrix in plan.matrices} | set(plan.kept)
    linear = {name for name in names & plan.layers.keys() if plan.layers[name].kind != "embedding"}
    kept = {
        "selected": (selected, sum(gone.values())),
        "factorized": (
            sum(parameters(shape, None) for key, shape in shapes.items() if ranks[key] is not None),
            sum(gone.values()),
        ),
        "linear": (
            sum(plan.checkpoint.info(name).elements for name in linear),
            sum(gone[matrix.key] for matrix in plan.matrices if matrix.name in linear),
        ),
        "model": (plan.others + selected, sum(gone.values())),
    }
    before, lost = kept["model"]
    return {
        "method": plan.chosen.method.name,
        "format": plan.format,
        "matrices": dict(
            Counter("dense" if ranks[m.key] is None else "factorized" for m in plan.matrices)
        ),
        "parameters_before": before,
        "parameters_after": before - (lost if plan.format == "low-rank" else 0),
        **{
            f"kept_of_{name}": (before - lost) / before if before else 1.0
            for name, (before, lost) in kept.items()
        },
    }
