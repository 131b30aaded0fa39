"""What the file of a Fisher, or of one part of an estimate, says of itself."""

from collections.abc import Mapping, Sequence
from typing import Any

from fishertool.checkpoint.contents import Contents
from fishertool.checkpoint.shards import PARTIAL
from fishertool.estimation.partial import Partial, partial_of
from fishertool.fisher.header import FisherHeader, relative_errors
from fishertool.inspection.place import Place
from fishertool.sidecar import header_of

About = FisherHeader | Partial | None
WORST = 3
"""Tensors whose standard errors are told."""


def about_of(place: Place, stem: str, tensors: Contents) -> About:
    """None of files that say nothing, as a bank beside the part of its estimate.

    Raises InputError for what says another thing than its name, or than its tensors.
    """
    if stem == PARTIAL:
        return partial_of(tensors)
    return header_of(tensors, stem) if place.what == "sidecar" else None


def figures_of_fisher(place: Place, opened: Mapping[str, Contents]) -> dict[str, Any]:
    found = [about_of(place, stem, tensors) for stem, tensors in opened.items()]
    if isinstance(found[0], Partial):
        return _of_part(found[0])
    return _of_sidecar([one for one in found if isinstance(one, FisherHeader)])


def _of_sidecar(headers: Sequence[FisherHeader]) -> dict[str, Any]:
    return {
        **_of_header(headers[0]),
        "kinds": {header.kind: _of_kind(header) for header in headers},
        "largest_relative_errors": next(filter(None, map(_errors, headers)), {}),
    }


def _of_header(header: FisherHeader) -> dict[str, Any]:
    return {
        "model": header.model,
        "fingerprint": header.fingerprint,
        "task": header.task,
        "labels": header.labels,
        "estimator": header.estimator,
        "examples": header.examples,
        "tokens": header.tokens,
        "seed": header.seed,
    }


def _of_kind(header: FisherHeader) -> dict[str, Any]:
    """Weights that the kind tells of, their elements, and the model's tensors that it leaves out."""
    return {
        "weights": len(header.statistics),
        "parameters": sum(one.elements for one in header.statistics.values()),
        "without": len(header.without),
        "group": header.group if header.kind == "rank-one" else None,
    }


def _errors(header: FisherHeader) -> dict[str, float]:
    """Relative standard errors of the totals that are known worst, by weight."""
    errors = relative_errors(header.statistics)
    worst = sorted(errors, key=lambda name: -errors[name])
    return {name: errors[name] for name in worst[:WORST]}


def _of_part(partial: Partial) -> dict[str, Any]:
    job, progress = partial.job, partial.progress
    return {
        **_of_header(job.header),
        "part": f"{progress.number + 1}/{job.workers}",
        "units": progress.units,
        "units_of_all_parts": job.units,
        "kinds": list(job.kinds),
    }
