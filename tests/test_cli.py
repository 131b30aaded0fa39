"""The command line itself: help, typos, config files, signals, exit codes."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml
from conftest import Cli, ModelMaker

import fishertool
from fishertool import launcher, progress
from fishertool.checkpoint.staging import staged
from fishertool.commands import evaluate as evaluate_module
from fishertool.errors import InputError, UsageError
from fishertool.report import Report, is_report

VERBS = (
    "estimate-fisher",
    "merge",
    "search",
    "prune",
    "factorize",
    "densify",
    "evaluate",
    "inspect",
    "verify",
)


def test_version_is_in_one_place(cli: Cli) -> None:
    assert cli("--version").out == f"fishertool {fishertool.__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb_gives_an_example(cli: Cli, verb: str) -> None:
    result = cli(verb, "--help")
    assert result.code == 0
    assert f"fishertool {verb}" in " ".join(result.out.split())


@pytest.mark.parametrize(
    "arguments",
    [[verb] for verb in VERBS[1:]]
    + [
        ["combine-fisher"],
        ["estimate-fisher", "m", "--from-optimizer", "o.pt", "--out", "f"],
    ],
)
def test_what_one_process_does_is_refused_under_torchrun(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    for name, value in zip(launcher.MEETING, ("0", "localhost", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = cli(*arguments)
    assert result.code == 2
    assert "is done by one process, and WORLD_SIZE=2 in the environment" in result.err


def test_what_one_process_does_is_not_sent_to_torchrun(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = cli("merge", "m", "--out", "o")
    assert result.code == 2
    assert "start it without torchrun, or unset WORLD_SIZE" in result.err


def test_help_shows_brackets(cli: Cli) -> None:
    out = cli("evaluate", "--help").out
    assert "org/name[@revision]" in out
    assert "[default: all]" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["mrge"], "Did you mean 'merge'"),
        (["merge", "a", "b"], "--out"),
        (["merge", "a", "b", "--out", "o", "--wieghts", "1,2"], "--weights"),
        (["merge", "a", "b", "--out", "o", "--threads", "0"], "--threads"),
        (["merge", "a", "b", "--out", "o", "--weights", "x,1"], "'x' is not a number"),
        (["merge", "a", "b", "--out", "o", "--set", "power"], "write key=value"),
        (["merge", "a", "b", "--out", "o", "--power", "1", "--set", "power=2"], "say it twice"),
        (
            ["merge", "a", "b", "--out", "o", "--set", "power=1", "--set", "power=2"],
            "power: is given twice",
        ),
        (["evaluate", "a", "--data", "d.jsonl", "--min", "accuracy=high"], "is not a number"),
        (
            ["evaluate", "a", "--data", "d", "--min", "loss=1", "--min", "loss = 2"],
            "--min loss: is given twice",
        ),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(cli: Cli, arguments: list[str], told: str) -> None:
    result = cli(*arguments)
    assert result.code == 2
    assert told in result.err
    assert result.err.count("\n") == 1
    assert not result.out


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("file/new/r.json", "is no place for a file"),
        (".", "is no place for a file"),
        ("file", "is there, and is no report"),
    ],
)
def test_a_report_that_could_not_be_written_is_refused_at_once(
    cli: Cli, verb: str, place: str, told: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text('{"model_type": "bert"}')
    result = cli(verb, "--report", place)
    assert (result.code, f"--report {place}: {told}" in result.err) == (2, True)


WRITERS = {
    "estimate-fisher": ["m", "--data", "d.jsonl", "--out"],
    "combine-fisher": ["p", "--out"],
    "merge": ["a", "b", "--out"],
    "search": ["r.yml", "--out"],
    "prune": ["m", "--out"],
    "factorize": ["m", "--out"],
    "densify": ["m"],
}


@pytest.mark.parametrize("verb", WRITERS)
@pytest.mark.parametrize("place", ["o", "o/new/r.json"])
def test_a_report_is_apart_from_the_output(cli: Cli, verb: str, place: str) -> None:
    told = f"--report {place}: is in the output o, which has a report of its own"
    arguments = [*WRITERS[verb], "o"]
    Path("c.yml").write_text(f"report: {place}\n")
    for given in (["--report", place, *arguments], [*arguments, "--config", "c.yml"]):
        result = cli(verb, *given)
        assert (result.code, told in result.err) == (2, True), result.err
    assert not Path("o").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_an_outputs_own_report_is_never_replaced(cli: Cli, verb: str) -> None:
    own = Path("m/fishertool_report.json")
    own.parent.mkdir()
    own.write_text(told_by_evaluate().to_json())
    Path("link.json").symlink_to(own)
    other = Path("user/fishertool_report.json")  # it would make a model an output, to be replaced
    for place in (own, "link.json", other):
        result = cli(verb, "--report", place)
        told = f"--report {place}: is what an output's own report is called; choose another name\n"
        assert (result.code, told in result.err) == (2, True), result.err


def test_a_report_that_nobody_may_write_is_refused_at_once(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # to root nothing is forbidden
    result = cli("evaluate", "m", "--data", "d.jsonl", "--report", "r.json")
    assert (result.code, "--report r.json: no permission" in result.err) == (5, True), result.err


def told_by_evaluate(*args: object, **options: object) -> Report:
    return Report("evaluate", {"model": "modèle"}, summary={"loss": 0.5}, environment={
        "versions": {}, "system": "", "threads": 1, "device": "cpu", "world_size": 1,
    })  # fmt: skip


@pytest.mark.parametrize("flags", [["--json"], []])
def test_a_result_is_printed_though_its_report_cannot_be_written(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "r.json")

    monkeypatch.setattr(evaluate_module, "evaluate", told_by_evaluate)
    monkeypatch.setattr(Path, "write_text", fail)
    result = cli("evaluate", "m", "--data", "d.jsonl", "--report", "r.json", *flags)
    assert (result.code, "loss" in result.out, "No space" in result.err) == (5, True, True)


@pytest.mark.parametrize("empty", [True, False])
def test_a_report_is_replaced_and_its_folder_made(
    cli: Cli, make_model: ModelMaker, empty: bool
) -> None:
    model = make_model("m")
    flags = ("--method", "magnitude", "--sparsity", 0.5, "--dry-run", "--report", "new/r.json")
    if empty:  # as mktemp leaves one
        Path("new").mkdir()
        Path("new/r.json").touch()
    for _ in range(2):
        result = cli("prune", model, *flags, "--out", "o")
        assert result.code == 0, result.err
    assert is_report(Path("new/r.json"))


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        ("~nobody/x --method svd --keep 0.5", 3, "~nobody/x: no such folder"),
        ("m --method svd --keep 0.5 --seed 9999999999999999999", 2, "--seed"),
        ("m --method svd --keep 0.5 --device meta", 2, "--device meta: is none of auto, cpu"),
        ("m --method svd --keep 0.5 --learning-rate 1", 2, "--learning-rate: needs --finetune"),
        ("m --method svd --keep 0.5 --max-length 9", 2, "--max-length: without --data"),
        ("m --method svd --keep 0.5 --batch-size 9", 2, "--batch-size: without --data"),
        ("m --method svd --keep 0.5 --evaluate-on ~nobody/x.jsonl", 3, "x.jsonl: no such file"),
    ],
)
def test_what_cannot_be_meant_is_told_in_one_line(
    cli: Cli, make_model: ModelMaker, flags: str, code: int, told: str
) -> None:
    make_model("m")
    result = cli("factorize", *flags.split(), "--out", "o")
    assert (result.code, told in result.err) == (code, True), result.err
    assert result.err.count("\n") == 1 and not Path("o").exists()


def test_an_output_whose_name_is_not_utf8_is_refused(cli: Cli, make_model: ModelMaker) -> None:
    result = cli("prune", make_model("m"), "--method", "magnitude", "--sparsity", 0.5,
                 "--out", "o\udcff")  # fmt: skip
    assert (result.code, "is not UTF-8" in result.err) == (2, True), result.err


def test_yes_is_no_value_of_a_flag_that_takes_one(cli: Cli, make_model: ModelMaker) -> None:
    make_model("m")
    Path("c.yml").write_text("method: svd\nkeep: yes\nquiet: true\n")
    result = cli("factorize", "m", "--config", "c.yml", "--out", "o")
    assert (result.code, "c.yml: keep: takes a value" in result.err) == (2, True), result.err


def test_methods_lists_every_setting(cli: Cli) -> None:
    result = cli("merge", "--methods")
    assert result.code == 0
    assert "linear" in result.out
    assert "--set power=1.0" in result.out


def test_config_gives_flags_and_flags_win(cli: Cli, make_model: ModelMaker, tmp_path: Path) -> None:
    recipe = {
        "models": [str(make_model("a", seed=1)), str(make_model("b", seed=2))],
        "weights": [0.75, 0.25],
        "max_shard_size": "10KB",
        "set": {"normalize": False},
        "out": "from-config",
    }
    Path("recipe.yml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    result = cli("merge", "--config", "recipe.yml", "--out", "from-flag", "--json")
    assert result.code == 0, result.err
    assert result.report["summary"]["weights"] == [0.75, 0.25]
    assert result.report["options"]["recipe"]["parameters"] == {"normalize": False}
    assert (tmp_path / "from-flag" / "model.safetensors.index.json").exists()
    assert not (tmp_path / "from-config").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("methud: fisher", "did you mean 'method'?"),
        ("- a", "must map flag names"),
        ("a: [b", "bad.yml: line 1"),
        ("fisher: [{a: b}]", "nested too deep"),
        ("num-examples: 4\nnum_examples: 8", "num-examples: is there twice, as num_examples too"),
        ("fisher: [a, yes]", "fisher: takes a value, not yes or no"),
        ("fisher: [a, null]", "fisher: has a place with nothing in it"),
        ("models: [{model: a}, {model: b}]", "bad.yml: needs a merge_method"),
        ("models: [{model: a}]\nmethod: ties", "did you mean 'merge_method'?"),
        ("method: ties\nmethod: fisher", "is there twice"),
        ("threads: many", "threads"),
    ],
)
def test_bad_config_is_refused(cli: Cli, content: str, told: str) -> None:
    Path("bad.yml").write_text(content, encoding="utf-8")
    result = cli("merge", "a", "b", "--out", "o", "--config", "bad.yml")
    assert result.code == 2
    assert told in result.err


def test_missing_config_is_refused(cli: Cli) -> None:
    result = cli("merge", "a", "b", "--out", "o", "--config", "none.yml")
    assert result.code == 2
    assert "none.yml" in result.err


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("x"), 1, "a bug in fishertool"),
        (OSError(errno.ENOSPC, "No space left on device", "out"), 5, "free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 5, "out: Permission denied"),
        (MemoryError(), 5, "--batch-size"),
        (InputError("m: class \x1b[31m\u202e\ud800 é"), 3, r"m: class \x1b[31m\u202e\ud800 é"),
    ],
)
def test_every_failure_has_its_code(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, told: str
) -> None:
    def fail(*arguments: object, **more: object) -> None:
        raise error

    monkeypatch.setattr(evaluate_module, "evaluate", fail)
    result = cli("evaluate", "m", "--data", "d.jsonl")
    assert result.code == code
    assert told in result.err
    assert result.err.count("\n") == 1


def test_debug_shows_the_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FISHERTOOL_DEBUG", "1")
    result = cli("evaluate", "nowhere", "--data", "d.jsonl")
    assert "Traceback" in result.err
    assert result.code == 3


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_leave_nothing_behind(
    make_model: ModelMaker, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """The child stops in the middle of the writing, by a signal that it sends itself."""
    first, second = make_model("a", seed=1), make_model("b", seed=2)
    script = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # off in a background job
        "from fishertool.checkpoint.writer import CheckpointWriter as W\n"
        "from fishertool.cli import main\n"
        "write = W.write\n"
        f"def stop(*a, **k):\n    os.kill(os.getpid(), {int(number)})\n    write(*a, **k)\n"
        "W.write = stop\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["merge", str(first), str(second), "--out", str(tmp_path / "o"), "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == code, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_that_comes_back_as_another_error_is_still_one(
    number: signal.Signals,
    code: int,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """As from an import that was broken off, whose libraries report an ImportError."""
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    request.addfinalizer(partial(signal.signal, number, signal.signal(number, usual)))

    def broken_off(*args: object, **options: object) -> None:
        try:
            signal.raise_signal(number)
        except BaseException:
            raise ImportError("cannot load module more than once per process") from None

    monkeypatch.setattr(evaluate_module, "evaluate", broken_off)
    before = signal.getsignal(number)
    result = cli("evaluate", "model", "--data", "d.jsonl")
    assert result.code == code
    assert "nothing half-written is left" in result.err
    assert "bug" not in result.err
    assert signal.getsignal(number) is before


def test_a_second_interrupt_promises_nothing(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(partial(signal.signal, signal.SIGINT, usual))

    def impatient(*args: object, **options: object) -> None:
        with staged(Path("out")):
            signal.raise_signal(signal.SIGINT)

    def interrupted(*args: object, **options: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(evaluate_module, "evaluate", impatient)
    result = cli("evaluate", "model", "--data", "d.jsonl")
    assert result.code == 130 and "nothing half-written is left" in result.err
    assert not list(Path().glob(".out.*"))
    monkeypatch.setattr(shutil, "rmtree", interrupted)
    result = cli("evaluate", "model", "--data", "d.jsonl")
    assert result.code == 130 and "half-written may be left; the next run" in result.err
    assert list(Path().glob(".out.*"))


def test_an_ignored_interrupt_stays_ignored(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a job in the background."""

    def interrupted(*args: object, **options: object) -> None:
        signal.raise_signal(signal.SIGINT)
        raise UsageError("went on")

    monkeypatch.setattr(evaluate_module, "evaluate", interrupted)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert "went on" in cli("evaluate", "model", "--data", "d.jsonl").err
    finally:
        signal.signal(signal.SIGINT, before)


EVALUATE = """
import sys
from fishertool.commands import evaluate
from fishertool.cli import run
from fishertool.report import Report
def told(*args, **options):
    gate = {"rule": "min", "metric": "loss", "limit": 1.0, "value": 0.5, "met": False}
    report = Report("evaluate", {}, summary={"model": "mod\u00e8le"}, evaluation={"gates": [gate]})
    report.warnings.append("x" * 200_000)
    return report
evaluate.evaluate = told
run()
"""


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("-m fishertool --help | sleep 0", 5),
        ("-m fishertool merge --methods | sleep 0", 0),
        ("-m fishertool merge --methods >&-", 0),
        ("run.py evaluate m --data d.jsonl --json | sleep 0", 4),
        ("run.py evaluate m --data d.jsonl | sleep 0", 4),
        ("run.py evaluate m --data d.jsonl --json >&-", 4),
        ("run.py evaluate m --data d.jsonl >&- 2>&-", 4),
        ("run.py evaluate m --data d.jsonl 2>&1 | sleep 0", 4),
        ("run.py evaluate m --data d.jsonl 2>&1 >&- | sleep 0", 4),
        ("run.py evaluate m --data d.jsonl >&- 2>/dev/full", 4),
        ("-m fishertool nothing 2>&1 | sleep 0", 2),
    ],
)
def test_a_closed_stdout_or_stderr_changes_no_exit_code(
    command: str, code: int, tmp_path: Path
) -> None:
    (tmp_path / "run.py").write_text(EVALUATE)
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{sys.executable} {command}"],
        capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(fishertool.__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == code, done.stderr[-2000:]
    assert not done.stdout
    assert "Traceback" not in done.stderr and "bug" not in done.stderr


def test_progress_goes_on_when_nobody_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(sys, "stderr", Closed())
    with progress.for_stderr(False)("Merging", 2, "weights") as advance:
        advance(1)
        advance(1)


def test_an_ascii_stdout_gets_whole_results(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(EVALUATE)
    out = {}
    for flag in ("--json", "--threads=1"):
        done = subprocess.run(
            [sys.executable, "run.py", "evaluate", "m", "--data", "d.jsonl", flag],
            capture_output=True, text=True, cwd=tmp_path,
            env=os.environ | {
                "PYTHONPATH": str(Path(fishertool.__file__).parents[1]),
                "PYTHONIOENCODING": "ascii",
            },
        )  # fmt: skip
        assert done.returncode == 4, done.stderr[-2000:]
        out[flag] = done.stdout
    assert json.loads(out["--json"])["summary"] == {"model": "mod\u00e8le"}
    assert out["--threads=1"] == "model  mod\\xe8le\n"


def test_without_arguments_the_help_is_shown_and_nothing_else(cli: Cli) -> None:
    result = cli()
    assert (result.code, result.err) == (2, "")
    assert "estimate-fisher" in result.out


def test_an_interrupt_of_the_import_is_told_as_one_line() -> None:
    script = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # off in a background job
        "class Interrupting:\n"
        "    def find_spec(name, *more):\n"
        "        if name == 'typer':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting)\n"
        "from fishertool.__main__ import run\n"
        "run()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == "fishertool: interrupted; nothing half-written is left\n"


def test_public_surface_of_the_command_line(cli: Cli) -> None:
    """Names are promises: a flag that goes or changes its name fails here."""
    data = (
        "--data --split --text-column --text-pair-column --chat-column --label-column "
        "--num-examples --max-length --batch-size --shuffle --seed"
    )
    every = "--json --quiet --config --threads --device --report --trust-remote-code"
    writer = "--dry-run --overwrite --include --exclude --max-shard-size --allow-nonfinite --out"
    own = {
        "estimate-fisher": f"{data} {writer} --kind --labels --draws --task --target-column "
        "--query-column --positive-column --negative-column --in-batch-negatives --scale "
        "--mask-fraction --mask-prompt",
        "merge": f"{data.replace('--data ', '')} {writer} --method --weights --fisher --base "
        "--anchor --power --preset --set --head --search-weights --search-points --metric "
        "--evaluate-on --methods",
        "evaluate": f"{data} --against --min --max --max-drop --max-kl --task",
    }
    for verb, flags in own.items():
        text = cli(verb, "--help").out
        for flag in f"{flags} {every}".split():
            assert flag in text, f"{verb} lost {flag}"
