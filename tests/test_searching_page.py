"""The search's result as a page: what is embedded, what is escaped, what its script computes."""

import itertools
import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from typing import Any

import pytest

from fishertool.searching.page import front_page

HOSTILE = "</script><script>alert('1 & 2')</script><!--\u2028\"{{trials}}"
OBJECTIVES = [
    {"name": "accuracy of a", "metric": "accuracy", "direction": "maximize"},
    {"name": "perplexity of b", "metric": "perplexity", "direction": "minimize"},
    {"name": "size", "metric": "bytes", "direction": "minimize"},
]


def completed(number: int, values: list[float], **given: Any) -> dict[str, Any]:
    return {
        "number": number,
        "state": "complete",
        "values": values,
        "parameters": {"models[0].parameters.weight": 0.25 * number, "merge_method": "ties"},
        "on_front": False,
        "picked": False,
        "predicted_loss": None,
        "seconds": 3.0,
        "recipe": None,
        "recipe_text": None,
        **given,
    }


def failed(number: int, error: str) -> dict[str, Any]:
    return {**completed(number, []), "state": "failed", "values": None, "error": error}


def a_front(trials: list[dict[str, Any]], objectives: int = 2, **given: Any) -> dict[str, Any]:
    return {
        "schema": "fishertool.front/1",
        "objectives": OBJECTIVES[:objectives],
        "variables": ["models[0].parameters.weight", "merge_method"],
        "reference": [0.0, 15.0, 1e8][:objectives],
        "hypervolume": [0.125 * i for i in range(len(trials))],
        "trials": trials,
        "correlation": None,
        "sampler": "mmmo",
        "seed": 0,
        "evaluations": len(trials),
        **given,
    }


def usual() -> dict[str, Any]:
    recipe = {"recipe": "front/0001.yml", "recipe_text": "merge_method: ties\n"}
    best = {"on_front": True, "picked": True, "predicted_loss": [0.125, 0.25]}
    return a_front(
        [
            completed(0, [0.7, 12.0]),
            completed(1, [0.8123456, 11.0], **best, **recipe),
            failed(2, "density is 0"),
        ],
        correlation=[{"objective": "accuracy of a", "model": "model-a", "spearman": -0.93}],
    )


class Page(HTMLParser):
    """The elements of a page, the cells of its tables by id, and the text of its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.scripts: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.rows = self.tables.setdefault(dict(attrs)["id"] or "", [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        tag = self.elements[-1][0] if self.elements else ""
        if tag == "script" and self.cdata_elem == "script":
            self.scripts[-1] += data
        elif tag in ("td", "th"):
            self.rows[-1][-1] += data.strip("\n")
        self.text += data

    def shown(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        """The attributes of the elements of that tag with these, unless hidden."""
        return [
            attributes
            for name, attributes in self.elements
            if name == tag and wanted.items() <= attributes.items() and "hidden" not in attributes
        ]


def test_the_front_is_embedded_as_it_is() -> None:
    front = usual()
    assert json.loads(Page(front_page(front)).scripts[0]) == front
    assert front_page(front) == front_page(usual())


def test_every_name_and_text_is_escaped() -> None:
    recipe = {"recipe": HOSTILE, "recipe_text": HOSTILE, "on_front": True}
    strange = {"parameters": {HOSTILE: HOSTILE}, **recipe}
    front = a_front(
        [completed(0, [0.5, 1.0], **strange), failed(1, HOSTILE)],
        variables=[HOSTILE],
        sampler=HOSTILE,
        correlation=[{"objective": HOSTILE, "model": HOSTILE, "spearman": None}],
    )
    front["objectives"] = [{**OBJECTIVES[i], "name": f"{HOSTILE}{i}"} for i in range(2)]
    hostile, harmless = Page(front_page(front)), Page(front_page(usual()))
    assert Counter(tag for tag, _ in hostile.elements)["script"] == 3
    assert {tag for tag, _ in hostile.elements} == {tag for tag, _ in harmless.elements}
    assert json.loads(hostile.scripts[0]) == front
    assert hostile.scripts[1:] == harmless.scripts[1:]
    assert not re.search("[<>&\u2028]", hostile.scripts[0])
    assert hostile.tables["trials"][0][2:] == [
        f"{HOSTILE}0 (maximize)",
        f"{HOSTILE}1 (minimize)",
        HOSTILE,
        "seconds",
        "recipe",
    ]
    assert hostile.tables["trials"][1][4:] == [HOSTILE, "3", HOSTILE]
    assert hostile.tables["failed"][1] == ["1", HOSTILE]
    assert hostile.tables["correlation"][1] == [HOSTILE, HOSTILE, ""]
    assert f"sampler: {HOSTILE}, seed 0" in hostile.text
    assert f"Reference point: {HOSTILE}0 0, {HOSTILE}1 15" in hostile.text


def test_nothing_is_fetched_and_no_text_becomes_markup() -> None:
    page = front_page(usual())
    for reference in ("//", "src=", "href", "url(", "@import", "fetch(", "import(", "<link"):
        assert reference not in page
    for markup in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert markup not in page
    (policy,) = Page(page).shown("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"] == (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    )


def test_the_tables_hold_all_without_the_script() -> None:
    page = Page(front_page(usual()))
    measured = ["accuracy of a (maximize)", "perplexity of b (minimize)", "predicted loss"]
    varied = ["models[0].parameters.weight", "merge_method"]
    assert page.tables == {
        "correlation": [["objective", "model", "spearman"], ["accuracy of a", "model-a", "-0.93"]],
        "failed": [["trial", "error"], ["2", "density is 0"]],
        "trials": [
            ["trial", "standing", *measured, *varied, "seconds", "recipe"],
            ["0", "dominated", "0.7", "12", "", "0", "ties", "3", ""],
            ["1", "picked", "0.81235", "11", "0.125, 0.25", "0.25", "ties", "3", "front/0001.yml"],
            ["2", "failed", "", "", "", "0.5", "ties", "3", ""],
        ],
    }
    assert page.shown("td", **{"data-value": "0.8123456"}), "sorting goes by the exact number"
    assert (
        "evaluations: 3 · failed: 1 · on the front: 1 · sampler: mmmo, seed 0 · hypervolume: 0.25"
    ) in page.text


def test_what_was_not_found_has_no_table() -> None:
    page = Page(front_page(a_front([completed(0, [0.5, 2.0], on_front=True)])))
    assert list(page.tables) == ["trials"]
    assert "predicted loss" not in page.tables["trials"][0]
    assert page.tables["trials"][1][1] == "front"


@pytest.mark.parametrize("objectives", [1, 3])
def test_any_number_of_objectives(objectives: int) -> None:
    values = [0.5, 11.0, 2e7][:objectives]
    front = a_front([completed(0, values, on_front=True)], objectives)
    assert (
        Page(front_page(front)).tables["trials"][1][2 : 2 + objectives]
        == [
            "0.5",
            "11",
            "2e+07",
        ][:objectives]
    )


def test_without_a_completed_trial_there_are_no_charts() -> None:
    page = Page(front_page(a_front([failed(0, "no memory"), failed(1, "no disk")])))
    assert page.tables["failed"][1:] == [["0", "no memory"], ["1", "no disk"]]
    assert page.shown("p") and not page.shown("section") and not page.shown("figure", hidden="")
    assert len(page.shown("figure")) == 1, "the scatter's, inside the hidden section"
    with_one = Page(front_page(usual()))
    assert with_one.shown("section") and len(with_one.shown("figure")) == 2
    empty = Page(front_page(a_front([])))
    assert len(empty.tables["trials"]) == 1 and "hypervolume:" not in empty.text


node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


def computed(expression: str) -> Any:
    """The value of an expression over the functions of the page's first script, by node."""
    arithmetic = Page(front_page(usual())).scripts[1]
    script = f"{arithmetic}\nconsole.log(JSON.stringify({expression}));"
    done = subprocess.run(["node", "-"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@node
def test_the_drawing_script_is_valid() -> None:
    script = Page(front_page(usual())).scripts[2]
    done = subprocess.run(["node", "--check", "-"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@node
@pytest.mark.parametrize("x_up", [True, False])
@pytest.mark.parametrize("y_up", [True, False])
def test_the_staircase_is_the_boundary_of_what_is_dominated(x_up: bool, y_up: bool) -> None:
    """Every other vertex is one of the front; those between are as bad as both neighbours."""
    square = itertools.product(range(-4, 5), repeat=2)
    disc = [(x, y) for x, y in square if x * x + y * y <= 20]
    points = sorted(2 * disc, key=lambda point: (7 * point[0] + 3 * point[1]) % 11)

    def dominates(one: tuple[int, int], other: tuple[int, int]) -> bool:
        gains = [a - b if up else b - a for a, b, up in zip(one, other, (x_up, y_up), strict=True)]
        return min(gains) >= 0 and max(gains) > 0

    front = {point for point in points if not any(dominates(other, point) for other in points)}
    assert len(front) == 3
    as_lists = json.dumps(points)
    steps = computed(f"staircase({as_lists}, {json.dumps(x_up)}, {json.dumps(y_up)})")
    assert [tuple(step) for step in steps[::2]] == sorted(front, reverse=x_up)
    x_worse, y_worse = min if x_up else max, min if y_up else max
    assert steps[1::2] == [
        [x_worse(x, next_x), y_worse(y, next_y)]
        for (x, y), (next_x, next_y) in itertools.pairwise(steps[::2])
    ]


@node
def test_ticks_are_round_and_within() -> None:
    assert computed("ticks(0, 1, 5)") == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert computed("ticks(-0.31, 0.29, 6)") == [-0.3, -0.2, -0.1, 0, 0.1, 0.2]
    assert computed("ticks(97, 1203, 5)") == [500, 1000]
    assert computed("ticks(0.81231, 0.81239, 4)") == [0.81232, 0.81234, 0.81236, 0.81238]


@node
def test_an_axis_has_room_even_for_one_value() -> None:
    assert computed("extent([2, 4, 3])") == pytest.approx([1.9, 4.1])
    assert computed("extent([2, 2])") == pytest.approx([1.9, 2.1])
    assert computed("extent([0])") == [-1, 1]


@node
def test_a_value_is_read_in_five_digits() -> None:
    assert computed("text([0.123456789, 1234567, 'ties', true])") == "0.12346, 1234567, ties, true"
