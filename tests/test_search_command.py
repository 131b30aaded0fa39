"""`fishertool search`: fronts of merges, resumed, shared among workers, and refused."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Cli, Estimate, ModelMaker, make_text, write_rows
from safetensors.torch import load_file, save_file

pytest.importorskip("optuna", reason="needs fishertool[search]")

import optuna

from fishertool.cli.search import search as search_flags
from fishertool.commands.search import search
from fishertool.recipe.space import Variable
from fishertool.searching import study
from fishertool.searching.evaluator import Evaluator
from fishertool.searching.objectives import Objective
from fishertool.searching.study import Search

RANGE = {"low": 0.0, "high": 1.0}
LOSS = {"metric": "loss", "data": "data.jsonl"}
Recipe = Callable[..., Path]


@pytest.fixture
def models(make_model: ModelMaker) -> list[Path]:
    return [make_model(name, seed=seed, spread=0.2) for seed, name in enumerate(("base", "a", "b"))]


@pytest.fixture
def recipe(models: list[Path], data: Path, tmp_path: Path) -> Recipe:
    """A search's file: a merge of `a` and `b` on `base`, with what a test changes in it."""

    def write(**more: Any) -> Path:
        own = {"weight": RANGE, "density": {"low": 0.2, "high": 1.0}}
        content = {
            "merge_method": "dare_ties",
            "base_model": "base",
            "models": [{"model": name, "parameters": dict(own)} for name in "ab"],
            "objectives": [
                {"metric": "accuracy", "data": "data.jsonl"},
                {"metric": "distance"},
            ],
        } | more
        path = tmp_path / "search.yml"
        kept = {key: value for key, value in content.items() if value is not None}
        path.write_text(yaml.safe_dump(kept), encoding="utf-8")
        return path

    return write


def front_of(out: Path) -> dict[str, Any]:
    front: dict[str, Any] = json.loads((out / "front.json").read_text())
    return front


def told(front: Mapping[str, Any]) -> list[Any]:
    """What a search found, without the time it took."""
    return [
        [trial[key] for key in ("number", "state", "values", "parameters", "on_front")]
        for trial in front["trials"]
    ]


@pytest.mark.parametrize("sampler", ["mmmo", "gp", "tpe", "nsga2", "random", "grid"])
def test_a_search_finds_a_front_whose_recipes_rebuild_it(
    cli: Cli, recipe: Recipe, sampler: str, tmp_path: Path
) -> None:
    count = 16 if sampler == "grid" else 8
    flags = ["--sampler", sampler, "--evaluations", count]
    flags += [] if sampler in ("random", "grid") else ["--startup", 4]
    result = cli("search", recipe(), "--out", "o", *flags, "--json", "-q")
    assert result.code == 0, result.err
    front = front_of(tmp_path / "o")
    assert [trial["number"] for trial in front["trials"]] == list(range(count))
    best = [trial for trial in front["trials"] if trial["on_front"]]
    for trial in front["trials"]:
        accuracy, distance = trial["values"]
        beaten = any(
            a >= accuracy and d <= distance and (a, d) != (accuracy, distance)
            for a, d in (other["values"] for other in front["trials"])
        )
        assert trial["on_front"] != beaten or any(
            other["values"] == trial["values"] for other in best
        )
    assert result.report["summary"]["front"] == len(best) >= 1
    assert result.report["summary"]["hypervolume"] == front["hypervolume"][-1]
    assert front["hypervolume"] == sorted(front["hypervolume"])

    trial = best[0]
    built = cli("merge", "--config", f"o/{trial['recipe']}", "--out", "built", "-q")
    assert built.code == 0, built.err
    measured = cli("evaluate", "built", "--data", "data.jsonl", "--json", "-q").report["summary"]
    assert measured["accuracy"] == trial["values"][0]
    merged, base = (load_file(f"{name}/model.safetensors") for name in ("built", "base"))
    apart = sum(float((merged[name].double() - base[name]).abs().sum()) for name in base)
    count = sum(tensor.numel() for tensor in base.values())
    assert trial["values"][1] == pytest.approx(apart / count, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "more", "metric"),
    [("llama", {}, "perplexity"), ("bert", {"head": "Model"}, "ndcg_at_10")],
)
def test_every_task_that_is_measured_can_be_searched(
    cli: Cli, make_model: ModelMaker, tmp_path: Path, kind: str, more: dict[str, str], metric: str
) -> None:
    for seed, name in enumerate("ab"):
        make_model(name, kind, seed, spread=0.2, **more)
    rows = [
        {"text": make_text(n, 6), "query": make_text(n, 2), "positive": make_text(n, 5)}
        for n in range(9)
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    objective = {"metric": metric, "data": "rows.jsonl", "num-examples": 8}
    content = {
        "merge_method": "linear",
        "models": [
            {"model": name, "parameters": {"weight": {"low": 0.1, "high": 1}}} for name in "ab"
        ],
        "objectives": [objective, {"metric": "loss", "data": "rows.jsonl"}],
    }
    (tmp_path / "search.yml").write_text(yaml.safe_dump(content), encoding="utf-8")
    flags = ("--sampler", "random", "--evaluations", 3, "--pick", "knee", "--json", "-q")
    result = cli("search", "search.yml", "--out", "o", *flags)
    assert result.code == 0, result.err
    trial = front_of(tmp_path / "o")["trials"][result.report["summary"]["picked"]]
    few = ("--num-examples", 8, "--json", "-q")
    told = cli("evaluate", "o/picked", "--data", "rows.jsonl", *few).report["summary"]
    assert told[metric] == pytest.approx(trial["values"][0], rel=1e-6)


def test_merges_in_memory_and_from_a_folder_measure_the_same(
    cli: Cli, recipe: Recipe, tmp_path: Path
) -> None:
    flags = ["--sampler", "random", "--evaluations", 3, "-q"]
    assert cli("search", recipe(), "--out", "memory", *flags).code == 0
    assert cli("search", recipe(), "--out", "folder", *flags, "--scratch", "merged").code == 0
    assert told(front_of(tmp_path / "memory")) == told(front_of(tmp_path / "folder"))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("sampler", ["mmmo", "tpe", "nsga2", "gp"])
def test_a_search_that_goes_on_finds_what_one_run_finds(
    cli: Cli, recipe: Recipe, sampler: str, tmp_path: Path
) -> None:
    flags = ["--sampler", sampler, "--startup", 3, "-q"]
    flags += ["--batch", 2, "--without", "screening"] if sampler == "mmmo" else []
    assert cli("search", recipe(), "--out", "o", *flags, "--evaluations", 7).code == 0
    for evaluations in (2, 4, 7):
        resume = ["--resume"] if evaluations > 2 else []
        more = ["--evaluations", evaluations, *resume]
        assert cli("search", recipe(), "--out", "p", *flags, *more).code == 0
    assert told(front_of(tmp_path / "o")) == told(front_of(tmp_path / "p"))


@pytest.mark.parametrize("part", ["recombination", "screening", "sparsity"])
def test_each_part_of_mmmo_can_be_left_out(
    cli: Cli, recipe: Recipe, part: str, tmp_path: Path
) -> None:
    flags = ["--evaluations", 5, "--startup", 4, "-q"]
    path = recipe(objectives=[{"metric": m, "data": "data.jsonl"} for m in ("loss", "accuracy")])
    assert cli("search", path, "--out", "o", *flags).code == 0
    assert cli("search", path, "--out", "p", *flags, "--without", part).code == 0
    whole, less = (
        [trial["parameters"] for trial in front_of(tmp_path / out)["trials"]] for out in "op"
    )
    assert whole[:4] == less[:4]
    assert whole[4] != less[4]


def test_a_distance_that_is_an_objective_is_not_one_twice(
    cli: Cli, recipe: Recipe, tmp_path: Path
) -> None:
    flags = ["--evaluations", 5, "--startup", 4, "-q"]
    assert cli("search", recipe(), "--out", "o", *flags).code == 0
    assert cli("search", recipe(), "--out", "p", *flags, "--without", "sparsity").code == 0
    assert told(front_of(tmp_path / "o")) == told(front_of(tmp_path / "p"))


def test_a_batch_is_chosen_from_what_is_known_before_it(
    cli: Cli, recipe: Recipe, tmp_path: Path
) -> None:
    flags = ["--evaluations", 6, "--startup", 4, "--without", "screening", "-q"]
    for batch in (1, 2):
        out = f"o{batch}"
        assert cli("search", recipe(), "--out", out, *flags, "--batch", batch).code == 0
    one, two = (told(front_of(tmp_path / out)) for out in ("o1", "o2"))
    assert [row[3] for row in one[:4]] == [row[3] for row in two[:4]]
    assert one[5][3] != two[5][3]


def test_predicted_losses_screen_and_are_held_against_what_was_measured(
    cli: Cli, recipe: Recipe, estimated: Estimate, models: list[Path], tmp_path: Path
) -> None:
    sidecars = [estimated(model, "diagonal").name for model in models[1:]]
    objectives = [
        {"metric": "loss", "data": "data.jsonl"},
        {"metric": "predicted_loss", "model": "a"},
        {"metric": "predicted-loss", "name": "both"},
    ]
    given = [
        {"model": name, "fisher": fisher, "parameters": {"weight": RANGE}}
        for name, fisher in zip("ab", sidecars, strict=True)
    ]
    path = recipe(models=given, objectives=objectives)
    flags = ["--evaluations", 5, "--startup", 3, "--json", "-q"]
    result = cli("search", path, "--out", "o", "--sampler", "mmmo-weights", *flags)
    assert result.code == 0, result.err
    front = front_of(tmp_path / "o")
    for trial in front["trials"]:
        assert trial["values"][1] == trial["predicted_loss"][0]
        assert trial["values"][2] == pytest.approx(sum(trial["predicted_loss"]))
    pairs = {(row["objective"], row["model"]) for row in front["correlation"]}
    assert pairs == {("loss of data", "a"), ("loss of data", "b")}
    assert all(-1 <= row["spearman"] <= 1 for row in front["correlation"])

    refused = cli("search", recipe(), "--out", "p", "--sampler", "mmmo-weights")
    assert refused.code == 2
    assert "mmmo-weights needs a fisher" in refused.err


def test_losses_are_predicted_for_a_model_that_is_listed_twice(
    cli: Cli, recipe: Recipe, estimated: Estimate, models: list[Path], tmp_path: Path
) -> None:
    weight = {"weight": {"low": 0.1, "high": 1}}
    a, b = (
        {"model": model.name, "fisher": estimated(model, "diagonal").name, "parameters": weight}
        for model in models[1:]
    )
    objectives = [{"metric": "predicted_loss"}, {"metric": "predicted_loss", "model": "b"}, LOSS]
    given = {"merge_method": "linear", "base_model": None, "objectives": objectives}
    path = recipe(models=[a, a, b], **given)
    result = cli("search", path, "--out", "o", "--sampler", "random", "--evaluations", 3, "-q")
    assert result.code == 0, result.err
    front = front_of(tmp_path / "o")
    assert [row["model"] for row in front["correlation"]] == ["a", "a", "b"]
    for trial in front["trials"]:
        first, second, last = trial["predicted_loss"]
        assert first == second != last
        assert trial["values"][:2] == [pytest.approx(first + second + last), last]


def test_methods_dtypes_and_layers_can_be_searched(
    cli: Cli, recipe: Recipe, tmp_path: Path
) -> None:
    given: list[dict[str, Any]] = [
        {"model": "a", "parameters": {"weight": RANGE | {"groups": 2}, "density": 0.5}},
        {
            "model": "b",
            "parameters": {
                "weight": [
                    {"filter": "attention", "value": RANGE | {"points": 2}},
                    {"value": {"low": 0.1, "high": 1, "log": True}},
                ],
                "density": {"low": 0.25, "high": 1, "step": 0.25},
            },
        },
    ]
    path = recipe(
        merge_method={"choices": ["linear", "ties", "task_arithmetic"]},
        models=given,
        dtype={"choices": ["float32", "bfloat16"]},
        objectives=[{"metric": "loss", "data": "data.jsonl"}, {"metric": "size"}],
    )
    flags = ["--evaluations", 12, "--sampler", "tpe", "--startup", 8]
    result = cli("search", path, "--out", "o", *flags, "-q")
    assert result.code == 0, result.err
    trials = front_of(tmp_path / "o")["trials"]
    assert {trial["parameters"]["merge_method"] for trial in trials} >= {"linear", "ties"}
    sizes = {trial["parameters"]["dtype"]: trial["values"][1] for trial in trials}
    assert sizes["float32"] > 1.5 * sizes["bfloat16"]
    densities = {trial["parameters"]["models[1].parameters.density"] for trial in trials}
    assert densities <= {0.25, 0.5, 0.75, 1.0}
    for trial in trials:
        if trial["recipe"]:
            built = yaml.safe_load((tmp_path / "o" / trial["recipe"]).read_text())
            assert ("base_model" in built) == (built["merge_method"] != "linear")


@pytest.mark.parametrize(("pick", "place"), [("knee", None), ("accuracy of data=1", 0)])
def test_pick_writes_one_merge_of_the_front(
    cli: Cli, recipe: Recipe, pick: str, place: int | None, tmp_path: Path
) -> None:
    flags = ["--sampler", "random", "--evaluations", 6, "--json", "-q"]
    assert cli("search", recipe(), "--out", "o", *flags).code == 0
    result = cli("search", recipe(), "--out", "o", *flags, "--resume", "--pick", pick)
    assert result.code == 0, result.err
    front = front_of(tmp_path / "o")
    [picked] = [trial for trial in front["trials"] if trial["picked"]]
    assert picked["number"] == result.report["summary"]["picked"]
    if place is not None:
        assert picked["values"][place] == max(t["values"][place] for t in front["trials"])
    built = cli("merge", "--config", f"o/{picked['recipe']}", "--out", "built", "-q")
    assert built.code == 0, built.err
    reports = [
        json.loads((tmp_path / folder / "fishertool_report.json").read_text())
        for folder in ("built", "o/picked")
    ]
    assert reports[0]["summary"] == reports[1]["summary"]
    files = [tmp_path / folder / "model.safetensors" for folder in ("built", "o/picked")]
    assert files[0].read_bytes() == files[1].read_bytes()
    result = cli("search", recipe(), "--out", "o", *flags, "--resume")  # which picks none
    assert result.code == 0, result.err
    assert not (tmp_path / "o" / "picked").exists()
    assert any(one.startswith("picked: was") for one in result.report["warnings"])
    assert "picked" not in result.report["summary"]


@pytest.mark.parametrize("changed", ["data.jsonl", "a/config.json", "a/model.safetensors"])
def test_a_search_of_other_inputs_is_not_gone_on_with(
    cli: Cli, recipe: Recipe, make_model: ModelMaker, changed: str
) -> None:
    flags = ["--sampler", "random", "--evaluations", 2, "-q"]
    assert cli("search", recipe(), "--out", "o", *flags).code == 0
    path = Path(changed)
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
        case ".json":
            path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_norm_eps": 1e-3}))
        case _:
            path.write_bytes((make_model("other", seed=9) / path.name).read_bytes())
    result = cli("search", recipe(), "--out", "o", *flags, "--resume")
    assert result.code == 2, result.err
    assert "or what models, sidecars or data hold, differ" in result.err


def start(out: Path, *flags: object, slow: float = 0.0) -> subprocess.Popen[str]:
    """A search in a process of its own, whose every merge takes so many seconds longer."""
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job's may be ignored
        "from fishertool.searching import evaluator\n"
        "merge = evaluator.Evaluator.evaluate\n"
        "def slower(self, point):\n"
        f"    time.sleep({slow})\n"
        "    return merge(self, point)\n"
        "evaluator.Evaluator.evaluate = slower\n"
        "from fishertool.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    line = [sys.executable, "-c", code, "search", "search.yml", "--out", str(out), *map(str, flags)]
    return subprocess.Popen(
        [*line, "-q"], cwd=out.parent, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )


def wait_for_trials(out: Path, count: int) -> None:
    """Until so many trials are begun."""
    journal = out / "search.journal"
    deadline = time.monotonic() + 120
    while not journal.exists() or journal.read_text().count('"owner"') < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_search_goes_on_as_if_it_had_not_been(
    cli: Cli, recipe: Recipe, how: signal.Signals, tmp_path: Path
) -> None:
    path = recipe()
    flags = ["--evaluations", 7, "--startup", 4, "--sampler", "tpe", "-q"]
    assert cli("search", path, "--out", "whole", *flags).code == 0
    killed = start(tmp_path / "o", *flags[:-1], slow=1.0)
    wait_for_trials(tmp_path / "o", 5)
    killed.send_signal(how)
    _, err = killed.communicate(timeout=60)
    codes = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
    assert killed.returncode == codes[how], err
    assert not (tmp_path / "o" / "front.json").exists()
    refused = cli("search", path, "--out", "o", *flags)
    assert refused.code == 7
    assert "--resume" in refused.err
    result = cli("search", path, "--out", "o", *flags, "--resume")
    assert result.code == 0, result.err
    assert told(front_of(tmp_path / "o")) == told(front_of(tmp_path / "whole"))


@pytest.mark.parametrize("url", [None, "sqlite:///trials.db"])
def test_two_workers_lose_and_repeat_no_trial(
    recipe: Recipe, url: str | None, tmp_path: Path
) -> None:
    recipe()
    flags = ["--sampler", "random", "--evaluations", 12]
    flags += ["--storage", url] if url else []
    out = tmp_path / "o"
    leader = start(out, *flags, slow=0.3)
    if url:
        deadline = time.monotonic() + 60
        while not (tmp_path / "trials.db").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(3)
    else:
        wait_for_trials(out, 1)
    worker = start(out, *flags, "--worker", slow=0.3)
    for process in (worker, leader):
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    front = front_of(out)
    assert len(front["trials"]) == 12
    points = [json.dumps(trial["parameters"], sort_keys=True) for trial in front["trials"]]
    assert len(set(points)) == 12
    [study] = optuna.get_all_study_names(url.replace("///", f"///{tmp_path}/")) if url else ["o"]
    assert study == "o"


def test_a_trial_that_was_given_to_another_is_not_told_twice() -> None:
    objectives = [Objective("loss", "loss", False, None)]
    made = Search(optuna.storages.InMemoryStorage(), "s", [Variable("x")], objectives, "")
    first = made.take(1)
    assert first is not None
    made.release(first)
    made.finish(first, [1.0], distance=2.0)
    second = made.take(1)
    assert second is not None
    assert second.params == first.params
    made.finish(second, [3.0])
    assert [trial.values for trial in made.trials] == [None, [3.0]]
    assert made.take(1) is None


def test_a_trial_whose_worker_was_gone_before_its_point_was_whole_is_chosen_anew() -> None:
    objectives = [Objective("loss", "loss", False, None)]
    storage = optuna.storages.InMemoryStorage()
    made = Search(storage, "s", [Variable("x"), Variable("y")], objectives, "")
    half = made.study.ask()
    half.suggest_float("x", 0.0, 1.0)
    made.release(half)
    taken = made.take(1)
    assert taken is not None
    assert taken.params.keys() == {"x", "y"}
    made.finish(taken, [1.0])
    assert made.take(1) is None


@pytest.mark.parametrize("whose", ["another user", "another container"])
def test_a_live_workers_trial_is_not_taken(whose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objectives = [Objective("loss", "loss", False, None)]
    made = Search(optuna.storages.InMemoryStorage(), "s", [Variable("x")], objectives, "")
    first = made.take(2)
    assert first is not None

    def kill(pid: int, signal: int) -> None:
        raise PermissionError if whose == "another user" else ProcessLookupError

    monkeypatch.setattr(os, "kill", kill)
    if whose == "another container":  # which has its own count of processes
        monkeypatch.setattr(study, "_host", lambda: ["host", "pid:[1]"])
    second = made.take(2)
    assert second is not None
    assert first.number != second.number
    assert [trial.state for trial in made.trials] == [optuna.trial.TrialState.RUNNING] * 2


def test_an_interrupt_is_told_and_not_what_came_of_it(
    cli: Cli, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(self: Search, evaluations: int) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise FileNotFoundError("a lock that is gone")

    monkeypatch.setattr(Search, "take", take)
    result = cli("search", recipe(), "--out", "o")
    assert result.code == 130
    assert "lock" not in result.err
    assert "--resume goes on" in result.err


def test_a_killed_workers_trial_is_taken_up(cli: Cli, recipe: Recipe, tmp_path: Path) -> None:
    flags = ["--sampler", "random", "--evaluations"]
    path, out = recipe(), tmp_path / "o"
    assert cli("search", path, "--out", "whole", *flags, 4, "-q").code == 0
    assert cli("search", path, "--out", "o", *flags, 1, "-q").code == 0
    worker = start(out, *flags, 4, "--worker", slow=600)
    wait_for_trials(out, 2)
    worker.kill()
    worker.communicate()
    result = cli("search", path, "--out", "o", *flags, 4, "--resume", "-q")
    assert result.code == 0, result.err
    journal = (out / "search.journal").read_text()
    assert f'"pid":{worker.pid}' in journal.replace(" ", "")
    assert '"lost"' in journal
    assert told(front_of(out)) == told(front_of(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objectives": None}, "needs objectives"),
        ({"objectives": [{"metric": "acuracy", "data": "data.jsonl"}]}, "did you mean 'accuracy'?"),
        ({"objectives": [{"metric": "accuracy"}]}, "needs data"),
        ({"objectives": [{"metric": "perplexity", "data": "data.jsonl"}]}, "is not measured here"),
        ({"objectives": [{"metric": "distance", "data": "data.jsonl"}]}, "is not measured on data"),
        ({"objectives": [{"metric": "predicted_loss"}]}, "needs a fisher"),
        (
            {
                "merge_method": {"choices": ["ties", "linear"]},
                "objectives": [{"metric": "distance"}],
            },
            "needs a base_model, and methods that take one",
        ),
        ({"objectives": [{"metric": "size"}, {"metric": "size"}]}, "two objectives are called"),
        ({"objectives": [{"metric": "size", "referense": 1}]}, "did you mean 'reference'?"),
        ({"objectives": [{"metric": "size", "reference": 1}, {"metric": "distance"}]}, "to none"),
        ({"objectives": [{"metric": "loss", "data": "no.jsonl"}]}, "no.jsonl"),
        ({"objectives": [LOSS | {"max-length": 1}]}, "max-length: 1 is not a whole number of"),
        ({"objectives": [LOSS | {"num-examples": 0}]}, "num-examples: 0 is not a whole number of"),
        (
            {"objectives": [LOSS | {"max-length": 9, "max_length": 8}]},
            "there twice, with - and with _",
        ),
        ({"seed": RANGE}, "a range can only stand in"),
        ({"merge_method": {"low": 0, "high": 1}}, "choices of names"),
        ({"merge_method": {"choices": ["ties", "tiess"]}}, "did you mean 'ties'?"),
        ({"dtype": {"choices": ["bfloat16", "flaot32"]}}, "flaot32"),
        ({"models": [{"model": "a"}, {"model": "b"}]}, "nothing to search"),
        ({"parameters": {"lambda": {"low": 1, "high": 0}}}, "must be less than high"),
        ({"parameters": {"lambda": {"low": 0, "high": 1, "log": True}}}, "must be above 0"),
        ({"parameters": {"lambda": {"low": 0, "high": 1, "step": 2}}}, "step 2"),
        ({"parameters": {"lambda": {"low": 0}}}, "a range needs high"),
        ({"parameters": {"lambda": {"choices": [1]}}}, "two or more different"),
        (
            {"parameters": {"lambda": RANGE | {"groups": 50}}},
            "50 groups of layers; the models have",
        ),
        ({"parameters": {"lamda": RANGE}}, "did you mean 'lambda'?"),
    ],
)
def test_a_wrong_search_is_refused_in_one_line(
    cli: Cli, recipe: Recipe, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    result = cli("search", recipe(**change), "--out", "o")
    assert result.code in (2, 3), result.err
    assert message in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sampler", "mmo"], "did you mean 'mmmo'?"),
        (["--without", "screning"], "did you mean 'screening'?"),
        (["--sampler", "tpe", "--without", "screening"], "leaves out parts of mmmo"),
        (["--sampler", "tpe", "--batch", 3], "--batch is for mmmo"),
        (["--sampler", "random", "--startup", 3], "--startup is for samplers"),
        (["--sampler", "grid"], "two values of each of 4 variables are 16 merges; --evaluations"),
        (["--pick", "knees"], "write knee, or OBJECTIVE=WEIGHT"),
        (["--pick", "distance=much"], "is not a number"),
        (["--pick", "distance=2,distance=3"], "distance is given twice"),
        (["--pick", "distance=-1"], "weights are at least 0"),
        (["--pick", "distance=0"], "not all 0"),
        (["--worker"], "there is no search"),
        (["--worker", "--pick", "knee"], "are for its leader"),
        (["--resume", "--overwrite"], "choose one"),
        (["--storage", "nothing://here"], "--storage: cannot be opened"),
        (["--max-shard-size", "big"], "--max-shard-size"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(
    cli: Cli, recipe: Recipe, flags: list[object], message: str, tmp_path: Path
) -> None:
    few = ["--evaluations", 15] if "grid" in flags else []
    result = cli("search", recipe(), "--out", "o", *flags, *few)
    assert result.code in (2, 5), result.err
    assert message in result.err
    assert not (tmp_path / "o").exists()


def test_what_a_search_reads_is_not_in_what_it_replaces(
    cli: Cli, recipe: Recipe, tmp_path: Path
) -> None:
    flags = ["--sampler", "random", "--evaluations", 2, "-q"]
    assert cli("search", recipe(), "--out", "o", *flags, "--pick", "knee").code == 0
    own = {"parameters": {"weight": RANGE, "density": 0.5}}
    path = recipe(models=[{"model": "o/picked", **own}, {"model": "b", **own}])
    result = cli("search", path, "--out", "o", *flags, "--overwrite")
    assert result.code == 2
    assert "overlaps the input" in result.err
    inside = recipe().rename(tmp_path / "o" / "search.yml")
    result = cli("search", inside, "--out", "o", *flags, "--overwrite")
    assert result.code == 2
    assert "overlaps the input" in result.err
    assert (tmp_path / "o/picked/model.safetensors").is_file()


def test_a_storage_that_cannot_be_opened_costs_nothing(
    cli: Cli, recipe: Recipe, tmp_path: Path
) -> None:
    flags = ["--sampler", "random", "--evaluations", 2, "-q"]
    assert cli("search", recipe(), "--out", "o", *flags).code == 0
    more = ["--overwrite", "--storage", "nothing://here"]
    assert cli("search", recipe(), "--out", "o", *flags, *more).code != 0
    assert front_of(tmp_path / "o")["evaluations"] == 2


@pytest.mark.parametrize("content", [b"no\njournal\n", b'{"op_code": 0}\n', b"\xff\xfe\n"])
def test_a_journal_that_cannot_be_read_is_told(
    cli: Cli, recipe: Recipe, content: bytes, tmp_path: Path
) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "search.journal").write_bytes(content)
    result = cli("search", recipe(), "--out", "o", "--resume")
    if content.startswith(b"{"):
        assert result.code == 5
        assert "search.journal: cannot be opened" in result.err
    else:
        assert result.code == 3
        assert "search.journal: line 1: is no line of a journal" in result.err
    assert (tmp_path / "o" / "search.journal").read_bytes() == content


@pytest.mark.parametrize("content", [b"not JSON\n", b'{"op_code": 4, "worker\n', b"[]\n"])
def test_a_journal_whose_last_line_is_none_is_refused_by_line(
    cli: Cli, recipe: Recipe, content: bytes, tmp_path: Path
) -> None:
    flags = ["--sampler", "random", "-q", "--evaluations", 2]
    assert cli("search", recipe(), "--out", "o", *flags).code == 0
    journal = tmp_path / "o" / "search.journal"
    lines = journal.read_bytes().count(b"\n")
    journal.write_bytes(journal.read_bytes() + content)
    for more in ("--resume", "--worker"):
        result = cli("search", recipe(), "--out", "o", *flags, more)
        assert (result.code, f"search.journal: line {lines + 1}: is no" in result.err) == (3, True)
    assert journal.read_bytes().endswith(content)


def test_a_search_goes_on_from_a_journal_whose_last_line_was_cut(
    cli: Cli, recipe: Recipe, tmp_path: Path
) -> None:
    flags = ["--sampler", "random", "-q", "--evaluations"]
    assert cli("search", recipe(), "--out", "whole", *flags, 4).code == 0
    started = start(tmp_path / "o", *flags[:2], "--evaluations", 2)  # its last trial is then lost
    started.communicate(timeout=120)
    journal = tmp_path / "o" / "search.journal"
    journal.write_bytes(journal.read_bytes()[:-20])
    for _ in range(2):
        assert cli("search", recipe(), "--out", "o", *flags, 4, "--resume").code == 0
        assert told(front_of(tmp_path / "o")) == told(front_of(tmp_path / "whole"))


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("storage", [[], ["--storage", "sqlite:///s.db"]])
def test_a_new_search_removes_the_old_one_alone_and_only_once_it_has_ended(
    cli: Cli, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, storage: list[str], tmp_path: Path
) -> None:
    out, flags = tmp_path / "o", ["--sampler", "random", "--evaluations", 2, "-q", *storage]
    assert cli("search", recipe(), "--out", "o", *flags, "--pick", "knee").code == 0
    (out / "notes.txt").write_text("mine")
    (tmp_path / "file").touch()
    before, anew = contents(out), [*flags, "--overwrite", "--seed", 1]
    result = cli("search", recipe(), "--out", "o", *anew, "--scratch", "file/scratch")
    assert (result.code, "--scratch file/scratch: file is not a folder" in result.err) == (5, True)
    assert contents(out) == before
    evaluate, told = Evaluator.evaluate, iter([0, 0, 1])

    def interrupted(self: Evaluator, point: Mapping[str, Any]) -> Any:
        if not next(told, 0):
            raise KeyboardInterrupt
        return evaluate(self, point)

    with monkeypatch.context() as patched:
        patched.setattr(Evaluator, "evaluate", interrupted)
        for _ in range(2):  # as nothing was measured, all is as it was
            assert cli("search", recipe(), "--out", "o", *anew).code == 130
            assert contents(out) == before
    assert cli("search", recipe(), "--out", "o", *flags, "--resume", "--pick", "knee").code == 0
    with monkeypatch.context() as patched:
        patched.setattr(Evaluator, "evaluate", interrupted)
        assert cli("search", recipe(), "--out", "o", *anew).code == 130
    aside = next(out.glob(".replaced-*"))
    assert contents(aside).keys() | {"notes.txt"} == before.keys()
    flags += ["--resume", "--seed", 1]
    assert cli("search", recipe(), "--out", "o", *flags).code == 0
    assert not aside.exists() and not (out / "picked").exists()
    assert (out / "notes.txt").read_text() == "mine"
    assert front_of(out)["seed"] == 1


def test_a_search_replaces_the_whole_output_of_another_command(cli: Cli, recipe: Recipe) -> None:
    path = recipe()
    assert cli("merge", "a", "b", "--out", "o", "-q").code == 0
    flags = ["--sampler", "random", "--evaluations", 1, "-q"]
    assert cli("search", path, "--out", "o", *flags).code == 7
    assert cli("search", path, "--out", "o", *flags, "--overwrite").code == 0
    assert not Path("o/config.json").exists() and not list(Path("o").glob(".*"))


def test_a_search_is_resumed_by_its_name_only(
    cli: Cli, recipe: Recipe, models: list[Path], tmp_path: Path
) -> None:
    flags = ["--sampler", "random", "--evaluations", 3, "-q"]
    assert cli("search", recipe(), "--out", "o", *flags).code == 0
    (tmp_path / "o").rename(tmp_path / "p")
    result = cli("search", recipe(), "--out", "p", *flags, "--resume")
    assert result.code == 2
    assert "others are, as o: name it by --study" in result.err
    assert cli("search", recipe(), "--out", "p", *flags, "--resume", "--study", "o").code == 0
    assert len(front_of(tmp_path / "p")["trials"]) == front_of(tmp_path / "p")["evaluations"] == 3
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "fishertool_report.json").write_text('{"command": "merge"}')
    elsewhere = ["--storage", "sqlite:///s.db"]
    for more in ([], elsewhere):
        assert cli("search", recipe(), "--out", "c", *flags, "--resume", *more).code != 0
    assert len(list((tmp_path / "c").iterdir())) == 1


def test_a_search_on_a_storage_goes_on_over_what_a_killed_one_left(
    cli: Cli, recipe: Recipe, tmp_path: Path
) -> None:
    flags = ["--sampler", "random", "--storage", "sqlite:///s.db", "--evaluations"]
    assert cli("search", recipe(), "--out", "o", *flags, 2, "-q").code == 0
    (tmp_path / "o" / "fishertool_report.json").unlink()
    (tmp_path / "o" / ".candidate-x").mkdir()
    assert cli("search", recipe(), "--out", "o", *flags, 3, "-q", "--resume").code == 0
    assert front_of(tmp_path / "o")["evaluations"] == 3
    assert not (tmp_path / "o" / ".candidate-x").exists()


def test_a_scratch_folder_may_be_there_with_something_in_it(
    cli: Cli, recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "scratch" / ".candidate-of-one-that-was-killed").mkdir(parents=True)
    flags = ["--sampler", "random", "--evaluations", 2, "--scratch", "scratch", "-q"]
    assert cli("search", recipe(), "--out", "o", *flags).code == 0
    left = [path.name for path in (tmp_path / "scratch").iterdir()]
    assert left == [".candidate-of-one-that-was-killed"]


@pytest.mark.parametrize("startup", [2, 6])
def test_points_that_cannot_be_merged_end_no_search_by_predicted_losses(
    cli: Cli,
    recipe: Recipe,
    estimated: Estimate,
    models: list[Path],
    startup: int,
    tmp_path: Path,
) -> None:
    sidecars = [estimated(model, "diagonal").name for model in models[1:]]
    weight = {"weight": RANGE | {"step": 1}}
    given = [
        {"model": name, "fisher": fisher, "parameters": weight}
        for name, fisher in zip("ab", sidecars, strict=True)
    ]
    objectives = [{"metric": m, "data": "data.jsonl"} for m in ("loss", "accuracy")]
    path = recipe(merge_method="linear", base_model=None, models=given, objectives=objectives)
    flags = ["--sampler", "mmmo-weights", "--evaluations", startup + 1, "--startup", startup]
    result = cli("search", path, "--out", "o", *flags, "-q")
    assert result.code == 0, result.err
    tried = {tuple(trial["parameters"].values()) for trial in front_of(tmp_path / "o")["trials"]}
    assert tried >= {(0.0, 1.0), (1.0, 0.0), (1.0, 1.0)}  # both weights 0 is no merge


def test_the_function_and_the_command_have_the_same_defaults() -> None:
    flags, function = (
        {name: one.default for name, one in inspect.signature(f).parameters.items()}
        for f in (search_flags, search)
    )
    shared = ("sampler", "evaluations", "startup", "batch", "seed", "batch_size")
    assert {name: flags[name] for name in shared} == {name: function[name] for name in shared}


def test_a_search_with_other_settings_does_not_go_on(cli: Cli, recipe: Recipe) -> None:
    flags = ["--sampler", "random", "--evaluations", 2, "-q"]
    assert cli("search", recipe(), "--out", "o", *flags).code == 0
    assert cli("search", recipe(), "--out", "o", *flags).code == 7
    other = cli("search", recipe(), "--out", "o", *flags, "--resume", "--seed", 1)
    assert other.code == 2
    assert "is another one" in other.err
    assert cli("search", recipe(), "--out", "o", *flags, "--overwrite", "--seed", 1).code == 0


def test_a_search_on_a_storage_of_its_own_is_not_joined_unasked(cli: Cli, recipe: Recipe) -> None:
    flags = ["--sampler", "random", "--storage", "sqlite:///trials.db", "--study", "s", "-q"]
    assert cli("search", recipe(), "--out", "o", *flags, "--evaluations", 1).code == 0
    again = cli("search", recipe(), "--out", "p", *flags, "--evaluations", 2)
    assert again.code == 7
    assert "the search 's' is there already" in again.err
    more = cli("search", recipe(), "--out", "p", *flags, "--evaluations", 2, "--resume", "--json")
    assert more.report["summary"]["evaluations"] == 2
    anew = cli(
        "search", recipe(), "--out", "p", *flags, "--evaluations", 1, "--overwrite", "--json"
    )
    assert anew.report["summary"]["evaluations"] == 1


def test_a_merge_that_fails_is_recorded_and_the_search_goes_on(
    cli: Cli, recipe: Recipe, tmp_path: Path
) -> None:
    # A weight of some thousands does not fit float16, one below does.
    given = [
        {"model": name, "parameters": {"weight": {"low": 1.0, "high": 1e8, "log": True}}}
        for name in "ab"
    ]
    path = recipe(merge_method="task_arithmetic", models=given, dtype="float16")
    result = cli(
        "search", path, "--out", "o", "--sampler", "random", "--evaluations", 8, "--json", "-q"
    )
    assert result.code == 0, result.err
    trials = front_of(tmp_path / "o")["trials"]
    failed = [trial for trial in trials if trial["state"] == "failed"]
    assert 0 < len(failed) == result.report["summary"]["failed"] < 8
    assert all("do not fit F16" in trial["error"] for trial in failed)
    assert "do not fit F16" in (tmp_path / "o" / "front.html").read_text()


def test_a_search_without_any_success_ends_with_the_reason(cli: Cli, recipe: Recipe) -> None:
    given = [{"model": n, "parameters": {"weight": {"low": 1e8, "high": 1e9}}} for n in "ab"]
    path = recipe(merge_method="task_arithmetic", models=given, dtype="float16")
    result = cli("search", path, "--out", "o", "--evaluations", 8, "--startup", 3, "-q")
    assert result.code == 3
    assert "none of 3 merges could be measured; the first: " in result.err
    assert "do not fit F16" in result.err


def test_dry_run_checks_and_writes_nothing(cli: Cli, recipe: Recipe, tmp_path: Path) -> None:
    result = cli("search", recipe(), "--out", "o", "--dry-run", "--json")
    assert result.code == 0, result.err
    assert result.report["status"] == "dry-run"
    assert result.report["summary"]["variables"] == 4
    assert not (tmp_path / "o").exists()


def test_flags_from_a_file_and_the_report_where_it_is_wanted(
    cli: Cli, recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "flags.yml").write_text("sampler: random\nevaluations: 2\nseed: 5\n")
    flags = ("--config", "flags.yml", "--report", "told.json", "-q")
    assert cli("search", recipe(), "--out", "o", *flags).code == 0
    report = json.loads((tmp_path / "told.json").read_text())
    assert report["options"]["sampler"] == "random"
    assert front_of(tmp_path / "o")["seed"] == 5
    assert len(front_of(tmp_path / "o")["trials"]) == 2
    assert (
        json.loads((tmp_path / "o" / "fishertool_report.json").read_text())["command"] == "search"
    )


def test_weights_that_are_not_finite_fail_the_merges(
    cli: Cli, recipe: Recipe, models: list[Path]
) -> None:
    weights = load_file(models[1] / "model.safetensors")
    weights["bert.pooler.dense.bias"][0] = float("nan")
    save_file(weights, models[1] / "model.safetensors", {"format": "pt"})
    path = recipe(objectives=[{"metric": "sparsity"}])
    flags = ("--sampler", "random", "--evaluations", 2, "-q")
    refused = cli("search", path, "--out", "o", *flags)
    assert refused.code == 3
    assert "has NaN or Inf" in refused.err
    assert cli("search", path, "--out", "p", *flags, "--allow-nonfinite").code == 0


def test_a_search_warns_as_merging_and_measuring_do(
    cli: Cli, recipe: Recipe, models: list[Path], tmp_path: Path
) -> None:
    config = json.loads((models[2] / "config.json").read_text())
    (models[2] / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-3}))
    write_rows(tmp_path / "long.jsonl", [{"text": make_text(0, 60), "label": 0}])
    objectives = [{"metric": "loss", "data": "long.jsonl"}]
    given = [{"model": name, "parameters": {"weight": RANGE}} for name in "ab"]
    path = recipe(merge_method="model_stock", models=given, objectives=objectives)
    flags = ("--sampler", "random", "--evaluations", 2, "--pick", "knee", "--json", "-q")
    for more in ((), ("--dry-run",)):
        warnings = cli("search", path, "--out", f"o{len(more)}", *flags, *more).report["warnings"]
        for told in ("layer_norm_eps", "cut at 32 tokens", "weight has no effect"):
            assert sum(told in warning for warning in warnings) == 1, warnings
    picked = json.loads((tmp_path / "o0" / "picked" / "fishertool_report.json").read_text())
    [warning] = picked["warnings"]
    assert "layer_norm_eps" in warning
