"""`fishertool inspect`: what lies in a folder, by headers alone."""

from collections.abc import Sequence

from fishertool import hub
from fishertool.checkpoint.contents import read_contents
from fishertool.inspection.figures import figures_of, of_report, rows_of
from fishertool.inspection.place import place_of
from fishertool.inspection.written import read_written
from fishertool.report import Report, environment, options_of
from fishertool.selection import select


def inspect(
    path: str,
    *,
    tensors: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Report:
    """Tell what a checkpoint, adapter, Fisher sidecar or part of one is; no tensor is read.

    With `tensors`, a row for each whose name `include` and `exclude` select.
    """
    report = Report("inspect", options_of(locals()), environment=environment(1, "cpu"))
    with report.phase("inspect"):
        folder = hub.resolve(path)
        written = read_written(folder)
        if written is not None and written.command == "search":
            report.summary = {"what": "search", "report": of_report(written)}
            return report
        place = place_of(folder)
        found = {stem: read_contents(place.weights, stem) for stem in place.stems}
        report.summary = figures_of(place, found, written)
        if tensors:
            rows = rows_of(place, found.values())
            names = set(select([row["name"] for row in rows], include, exclude))
            report.tensors = [row for row in rows if row["name"] in names]
    return report
