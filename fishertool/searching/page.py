"""The result of a search as one HTML page that asks for nothing from elsewhere."""

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any


def front_page(front: Mapping[str, Any]) -> str:
    """The page of a front, as `front.json` holds it: charts, recipes and a table of all trials.

    The charts are drawn by the page's own script from the front embedded in it; the tables are
    plain HTML and need no script. The same front gives the same page.
    """
    trials: list[dict[str, Any]] = front["trials"]
    completed = any(trial["state"] == "complete" for trial in trials)
    parts = {
        "summary": escape(_summary(front)),
        "unless_completed": "hidden" if completed else "",
        "if_completed": "" if completed else "hidden",
        "reference": escape(_reference(front)),
        "correlation": _correlation(front["correlation"] or []),
        "failed": _failed([trial for trial in trials if trial["state"] == "failed"]),
        "trials": _trials(front),
        "front": _embedded(front),
    }
    template = resources.files("fishertool.searching").joinpath("page.html")
    # One pass, so that what looks like a place to fill in a name or an error stays as it is.
    return re.sub(
        r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template.read_text(encoding="utf-8")
    )


def _summary(front: Mapping[str, Any]) -> str:
    """The figures of the search, in a line."""
    trials = front["trials"]
    figures = [
        f"evaluations: {front['evaluations']}",
        f"failed: {sum(trial['state'] == 'failed' for trial in trials)}",
        f"on the front: {sum(trial['on_front'] for trial in trials)}",
        f"sampler: {front['sampler']}, seed {front['seed']}",
    ]
    if front["hypervolume"]:
        figures.append(f"hypervolume: {_text(front['hypervolume'][-1])}")
    return " · ".join(figures)


def _reference(front: Mapping[str, Any]) -> str:
    """The reference point of the hypervolume."""
    named = zip(front["objectives"], front["reference"], strict=True)
    return ", ".join(f"{objective['name']} {_text(value)}" for objective, value in named)


def _correlation(rows: Sequence[Mapping[str, Any]]) -> str:
    """Predicted against measured, or nothing where nothing was predicted."""
    if not rows:
        return ""
    columns = ["objective", "model", "spearman"]
    cells = [[row[column] for column in columns] for row in rows]
    return _table("correlation", "Predicted loss against what was measured", columns, cells)


def _failed(trials: Sequence[Mapping[str, Any]]) -> str:
    """The failed trials and why they failed, or nothing."""
    if not trials:
        return ""
    cells = [[trial["number"], trial["error"]] for trial in trials]
    return _table("failed", "Failed trials", ["trial", "error"], cells)


def _trials(front: Mapping[str, Any]) -> str:
    """Every trial, in the order of their numbers in the front."""
    objectives, variables = front["objectives"], front["variables"]
    named = [f"{objective['name']} ({objective['direction']})" for objective in objectives]
    predicted = any(trial["predicted_loss"] for trial in front["trials"])
    cells = [
        [
            trial["number"],
            _standing(trial),
            *(trial["values"] or [None] * len(objectives)),
            *([trial["predicted_loss"]] if predicted else []),
            *(trial["parameters"].get(variable) for variable in variables),
            trial["seconds"],
            trial["recipe"],
        ]
        for trial in front["trials"]
    ]
    losses = ["predicted loss"] if predicted else []
    columns = ["trial", "standing", *named, *losses, *variables, "seconds", "recipe"]
    return _table("trials", "All trials", columns, cells)


def _standing(trial: Mapping[str, Any]) -> str:
    """One word, the same as in the charts."""
    if trial["state"] == "failed":
        return "failed"
    if trial["picked"]:
        return "picked"
    return "front" if trial["on_front"] else "dominated"


def _table(name: str, caption: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table whose first column names its rows; sorting goes by `data-value`, not rounded."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "\n".join(
        f'<tr><th scope="row">{escape(_text(first))}</th>{"".join(map(_cell, rest))}</tr>'
        for first, *rest in rows
    )
    return (
        f'<div class="wide"><table id="{name}">\n<caption>{escape(caption)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _cell(value: Any) -> str:
    exact = f' data-value="{value!r}"' if isinstance(value, float) else ""
    return f"<td{exact}>{escape(_text(value))}</td>"


def _text(value: Any) -> str:
    """A value as it is read: five digits of a number, nothing for none."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return value if isinstance(value, str) else json.dumps(value)


def _embedded(front: Mapping[str, Any]) -> str:
    """Strict JSON in ASCII in which nothing ends a script element or begins a comment."""
    text = json.dumps(dict(front), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
