"""What a search leaves behind: the front as JSON, as recipes and as a page, and one merge of it."""

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fishertool.checkpoint.staging import REPORT_FILE, staged
from fishertool.errors import UsageError
from fishertool.report import Report
from fishertool.searching.evaluator import CANDIDATE
from fishertool.searching.objectives import Objective
from fishertool.searching.page import front_page
from fishertool.searching.pareto import chosen, knee
from fishertool.surgery import merge_report
from fishertool.surgery.merge_plan import MergePlan
from fishertool.surgery.merge_write import write_merge

PICKED, RECIPES, KNEE = "picked", "front", "knee"
FRONT, PAGE = "front.json", "front.html"
JOURNAL = "search.journal"
OWN = (JOURNAL, f"{JOURNAL}.lock", REPORT_FILE, PICKED, RECIPES, FRONT, PAGE)
REPLACED = ".replaced-"


def of_a_search(out: Path) -> bool:
    """Whether a search wrote what is in the folder, to its end or not."""
    if (out / JOURNAL).is_file() or any(out.glob(f"{REPLACED}*")):
        return True
    try:
        report = json.loads((out / REPORT_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return out.is_dir() and len(_of_the_search(out)) == len(list(out.iterdir()))
    except (OSError, ValueError):
        return False
    return isinstance(report, dict) and report.get("command") == "search"


def _of_the_search(out: Path) -> list[Path]:
    """What a search wrote in its folder, which may have other files too."""
    return [one for one in out.iterdir() if one.name in OWN or one.name.startswith(CANDIDATE)]


@contextmanager
def old_one_kept(out: Path, begun: Callable[[], bool]) -> Iterator[None]:
    """Move an older output aside, in its folder, until the block has ended well: then remove it.

    Of a search its own files, else all there are. Where the block raises and the new search has not
    `begun`, the old output comes back; where it has, it stays aside until the search is resumed
    and ends well.
    """
    old = _of_the_search(out) if of_a_search(out) else list(out.iterdir())
    aside = Path(tempfile.mkdtemp(prefix=REPLACED, dir=out))
    try:
        for one in old:
            one.rename(aside / one.name)
        yield
    except BaseException:
        if not begun():
            _put_back(aside, out, {one.name for one in old})
        raise


def _put_back(aside: Path, out: Path, old: Collection[str]) -> None:
    """Undo a move, of which a signal may have left some undone."""
    moved = list(aside.iterdir())
    unmoved = {*old} - {one.name for one in moved}
    for one in _of_the_search(out):
        if one.name not in unmoved:
            shutil.rmtree(one) if one.is_dir() else one.unlink()
    for one in moved:
        one.rename(out / one.name)
    aside.rmdir()


def remove_left(out: Path) -> None:
    """Remove what searches before this one left in its folder, and workers that were killed, now
    that it has results and nobody measures for it."""
    for prefix in (REPLACED, CANDIDATE):
        for left in out.glob(f"{prefix}*"):
            shutil.rmtree(left, ignore_errors=True)


def remove_picked(out: Path) -> bool:
    """Remove the merge that an earlier run picked, of a front that is no more; whether there was one."""
    there = (out / PICKED / REPORT_FILE).is_file()
    if there:
        shutil.rmtree(out / PICKED)
    return there


def parse_pick(pick: str | None, objectives: Sequence[Objective]) -> list[float] | str | None:
    """`knee`, or a weight for each objective."""
    if pick is None or pick == KNEE:
        return pick
    names = [one.name for one in objectives]
    weights: dict[str, float] = {}
    for item in pick.split(","):
        name, equals, text = item.rpartition("=")
        name = name.strip()
        if not equals or name not in names:
            known = f"known: {', '.join(names)}"
            raise UsageError(f"--pick {item!r}: write {KNEE}, or OBJECTIVE=WEIGHT,...; {known}")
        if name in weights:
            raise UsageError(f"--pick {pick!r}: {name} is given twice")
        try:
            weights[name] = float(text)
        except ValueError:
            raise UsageError(f"--pick {item!r}: {text!r} is not a number") from None
    found = [weights.get(name, 0.0) for name in names]
    if not all(0 <= weight < math.inf for weight in found) or not any(found):
        raise UsageError(f"--pick {pick!r}: weights are at least 0, and not all 0")
    return found


def pick_trial(front: Mapping[str, Any], wanted: Sequence[float] | str) -> dict[str, Any]:
    """The trial at the knee, or the one that suits a weight for each objective; marked as picked."""
    done = [trial for trial in front["trials"] if trial["state"] == "complete"]
    signs = [1 if one["direction"] == "maximize" else -1 for one in front["objectives"]]
    values = torch.tensor([trial["values"] for trial in done], dtype=torch.float64)
    values *= torch.tensor(signs)
    place = knee(values) if isinstance(wanted, str) else chosen(values, wanted)
    best: dict[str, Any] = done[place]
    best["picked"] = True
    return best


def write_picked(out: Path, plan: MergePlan, recipe: str, environment: Mapping[str, Any]) -> None:
    """Write the merge of one trial, as `fishertool merge --config` of its recipe does."""
    report = Report("merge", {"recipe": recipe}, environment=dict(environment))
    with staged(out / PICKED) as folder:
        written = write_merge(plan, folder, environment["threads"], lambda _: None)
        report.warnings += plan.warnings
        merge_report.tell(report, plan, written, folder)
        report.inputs = merge_report.input_files(plan)
        (folder / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")


def write_front(out: Path, front: Mapping[str, Any]) -> None:
    with staged(out / RECIPES) as folder:
        for trial in front["trials"]:
            if trial["on_front"]:
                name = Path(trial["recipe"]).name
                (folder / name).write_text(trial["recipe_text"], encoding="utf-8")
    replace_file(out / FRONT, json.dumps(front, indent=2, allow_nan=False) + "\n")
    replace_file(out / PAGE, front_page(front))


def replace_file(path: Path, text: str) -> None:
    """Write a file that is whole at every instant."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
