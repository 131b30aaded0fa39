"""`fishertool search`: the merges that no other merge beats in every objective."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fishertool.checkpoint.digest import digest
from fishertool.checkpoint.layout import parse_size
from fishertool.checkpoint.staging import (
    REPORT_FILE,
    check_apart,
    check_free,
    check_output,
    check_writable,
)
from fishertool.errors import OutputExistsError, UsageError
from fishertool.models.loading import check_device
from fishertool.models.sources import open_source, public_reference
from fishertool.models.vocabulary import tokenizer_files
from fishertool.progress import Track, silent
from fishertool.recipe.document import Value, read_document
from fishertool.recipe.space import Space, inside, read_space, split_search
from fishertool.recipe.write import to_yaml
from fishertool.report import Report, data_files, environment, options_of
from fishertool.searching.evaluator import Evaluator, Running
from fishertool.searching.objectives import Objective, read_objectives
from fishertool.searching.results import (
    JOURNAL,
    of_a_search,
    old_one_kept,
    parse_pick,
    pick_trial,
    remove_left,
    remove_picked,
    replace_file,
    write_front,
    write_picked,
)
from fishertool.searching.sampling import BATCH, STARTUP, Sampling, check_sampling, grid
from fishertool.surgery import merge_report
from fishertool.surgery.merge_layers import layer_count
from fishertool.surgery.merge_plan import MergePlan

if TYPE_CHECKING:  # it needs what is installed for a search alone
    from fishertool.searching.study import Search


def search(
    recipe: Path,
    out: Path,
    *,
    sampler: str = "mmmo",
    evaluations: int = 30,
    startup: int = STARTUP,
    batch: int = BATCH,
    without: Sequence[str] = (),
    pick: str | None = None,
    storage: str | None = None,
    study: str | None = None,
    worker: bool = False,
    resume: bool = False,
    scratch: Path | None = None,
    seed: int = 0,
    batch_size: int = 8,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    dry_run: bool = False,
    allow_nonfinite: bool = False,
    trust_remote_code: bool = False,
    threads: int = 1,
    device: str = "cpu",
    track: Track = silent,
) -> Report:
    """Evaluate merges of a recipe with ranges, and write the front of the best ones to `out`.

    Every evaluation is kept on the storage as soon as it is made, by default a journal in `out`:
    a search that was stopped goes on with `resume`, and a `worker` in another process takes part.
    """
    options = {name: value for name, value in locals().items() if name not in ("storage", "worker")}
    report = Report("search", options_of(options), environment=environment(threads, device))
    _check_installed()
    if worker and (pick or resume or overwrite):
        raise UsageError(
            "--worker takes part in a search; --pick, --resume and --overwrite are for its leader"
        )
    if resume and overwrite:
        raise UsageError("--resume goes on with a search, --overwrite begins anew; choose one")
    sampling = check_sampling(sampler, seed, evaluations, startup, batch, without)
    device = report.environment["device"] = check_device(device)
    torch.set_num_threads(threads)
    running = Running(
        batch_size, threads, device, trust_remote_code, allow_nonfinite,
        parse_size(max_shard_size), scratch or out,
        in_memory=scratch is None,
    )  # fmt: skip
    with ExitStack() as opened:
        with report.phase("check"):
            if scratch is not None:
                check_writable(f"--scratch {scratch}", scratch)
            space, objectives, content = _read(recipe, seed)
            wanted = parse_pick(pick, objectives)
            if sampler == "grid":  # it may have fewer points than were asked for
                evaluations = len(grid(space.variables, evaluations))
            evaluator = Evaluator(opened, space, objectives, running)
            plan, data = _check_space(evaluator, sampling)
            if worker:
                _check_begun(out, storage)
            else:
                read = [recipe, *(Path(one.data.data) for one in objectives if one.data)]
                needed = plan.layout.nbytes if pick or scratch is None else 0
                _check_out(out, plan, read, needed, overwrite=overwrite, resume=resume)
        report.warnings = evaluator.warnings()
        report.summary = {"variables": len(space.variables), "objectives": len(objectives)}
        if dry_run:
            report.status = "dry-run"
            report.summary |= merge_report.forecast(plan, threads, out)
            return report
        found = _open(
            opened, out, storage, study or out.resolve().name, content,
            _what_is_read(plan, objectives), space, objectives, sampling, evaluator,
            join=worker, resume=resume, overwrite=overwrite,
        )  # fmt: skip
        with report.phase("search"), track("Searching", evaluations, "merges") as advance:
            from fishertool.searching.work import work

            work(found, evaluator, evaluations, advance, wait=not worker, hopeless_after=startup)
        report.warnings = evaluator.warnings()
        front = _front(found, evaluator, objectives, plan, sampling)
        report.summary |= _summary(front)
        names = ("objectives", "reference", "correlation")
        report.evaluation = {name: front[name] for name in names} | {"data": data}
        if worker:
            return report
        with report.phase("write"):
            if wanted is not None:
                picked = pick_trial(front, wanted)
                told = environment(threads, device)
                write_picked(out, evaluator.plan(picked["parameters"]), picked["recipe"], told)
                report.summary["picked"] = picked["number"]
            elif remove_picked(out):
                report.warnings.append(
                    "picked: was an earlier run's, and is removed; --resume --pick writes one of this "
                    "front"
                )
            report.inputs = merge_report.input_files(plan)
            sources = dict.fromkeys(one.data.data for one in objectives if one.data)
            report.inputs += [file for source in sources for file in data_files(source)]
            write_front(out, front)
            replace_file(out / REPORT_FILE, report.to_json())  # last: it says that all is there
            remove_left(out)
            found.remove_replaced()
    return report


def _check_installed() -> None:
    missing = [name for name in ("optuna", "botorch") if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"search needs {' and '.join(missing)}; install them with pip install "
            "'fishertool[search]'"
        )


def _read(recipe: Path, seed: int) -> tuple[Space, list[Objective], Any]:
    content = read_document(recipe)
    merge, listed = split_search(Value(content, str(recipe)))

    def layers_of(model: str) -> int:
        with open_source(model) as source:
            return layer_count(source)

    return read_space(merge, layers_of, seed), read_objectives(listed), content


def _check_space(
    evaluator: Evaluator, sampling: Sampling
) -> tuple[MergePlan, list[dict[str, Any]]]:
    """Plan a merge of each method and dtype, so that what is wrong with them is refused now.

    The last plan, and what is measured on.
    """
    space = evaluator.space
    point = {variable.name: inside(variable) for variable in space.variables}
    dtypes = [one.choices for one in space.variables if one.name == "dtype"]
    others = [{"dtype": dtype} for choices in dtypes for dtype in choices] or [{}]
    for method, other in product(space.methods.values(), others):
        plan = evaluator.plan(point | method | other)
        if sampling.sampler == "mmmo-weights" and not plan.predicts:
            raise UsageError(
                "--sampler mmmo-weights needs a fisher with a diagonal for each model of the "
                "recipe; mmmo does without"
            )
        data = evaluator.check(plan)
    return plan, data


def _check_begun(out: Path, storage: str | None) -> None:
    """Refuse to work for a search that is not there, before a journal is made for it."""
    if storage is None and not (out / JOURNAL).is_file():
        raise UsageError(f"--worker: there is no search in {out} yet; start it without --worker")


def _check_out(
    out: Path,
    plan: MergePlan,
    files: Sequence[Path],
    needed_bytes: int,
    *,
    overwrite: bool,
    resume: bool,
) -> None:
    """Refuse an output that is there, unless it is a search that may go on or be replaced."""
    begun, ours = (out / JOURNAL).is_file(), of_a_search(out)
    check_apart(out, [*plan.folders, *files])
    if resume and ours:
        return
    if overwrite and ours:
        check_writable(f"--out {out}", out)
        check_free(out, needed_bytes)
    elif begun:
        raise OutputExistsError(
            f"{out}: has a search; --resume goes on with it, --worker takes part in it, --overwrite "
            "begins anew"
        )
    else:
        check_output(out, plan.folders, overwrite, needed_bytes)


def _open(
    opened: ExitStack,
    out: Path,
    storage: str | None,
    name: str,
    content: Any,
    inputs: Any,
    space: Space,
    objectives: Sequence[Objective],
    sampling: Sampling,
    evaluator: Evaluator,
    *,
    join: bool,
    resume: bool,
    overwrite: bool,
) -> "Search":
    """The search on its storage, with the sampler that chooses what is tried."""
    from fishertool.searching.samplers import make_sampler
    from fishertool.searching.storage import old_study_kept, open_storage
    from fishertool.searching.study import Search

    found: Search | None = None

    def begun() -> bool:
        return found is not None and found.begun

    store = None if storage is None else open_storage(storage, out)
    if overwrite and store is not None:
        opened.enter_context(old_study_kept(store, name, begun))
    if overwrite and out.is_dir():
        opened.enter_context(old_one_kept(out, begun))
    if store is None:
        store = open_storage(None, out)
    told = json.dumps([content, sampling.identity, inputs], sort_keys=True, default=str)
    fingerprint = hashlib.sha256(told.encode()).hexdigest()
    found = Search(store, name, space.variables, objectives, fingerprint, join=join, resume=resume)
    signs = [one.sign for one in objectives]
    found.study.sampler = make_sampler(sampling, space.variables, signs, evaluator.predict)
    return found


def _what_is_read(plan: MergePlan, objectives: Sequence[Objective]) -> dict[str, Any]:
    """What tells that a search goes on with the same models, sidecars and data."""
    sources = plan.inputs.sources
    sidecars = [*plan.fishers.values(), *plan.factors.values()]
    data = dict.fromkeys(one.data.data for one in objectives if one.data)
    return {
        "models": [source.fingerprint() for source in sources],
        "configs": [source.config() for source in sources],
        "tokenizers": [
            [digest(source.folder / name).sha256 for name in tokenizer_files(source.folder)]
            for source in sources
        ],
        "sidecars": [one.tensors.fingerprint() for one in sidecars],
        "data": [one.files for source in data for one in data_files(source)],
    }


def _front(
    found: "Search",
    evaluator: Evaluator,
    objectives: Sequence[Objective],
    plan: MergePlan,
    sampling: Sampling,
) -> dict[str, Any]:
    from fishertool.searching.front import describe

    front = describe(
        found.trials,
        objectives,
        [public_reference(model) for model in plan.inputs.listed],
        lambda point: to_yaml(evaluator.recipe(point)),
    )
    told = {"sampler": sampling.sampler, "seed": sampling.seed}
    return front | told | {"evaluations": len(front["trials"])}


def _summary(front: Mapping[str, Any]) -> dict[str, Any]:
    trials = front["trials"]
    return {
        "evaluations": len(trials),
        "failed": sum(trial["state"] == "failed" for trial in trials),
        "front": sum(trial["on_front"] for trial in trials),
        "hypervolume": front["hypervolume"][-1] if front["hypervolume"] else None,
    }
