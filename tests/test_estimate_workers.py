"""Parts, processes, interruptions: whatever did the work, the sidecar is the one of a single run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli, ModelMaker, make_text, write_rows
from safetensors import safe_open
from safetensors.torch import save_file

from fishertool import launcher
from fishertool.estimation import subject
from fishertool.models import tasks

SUMS = "diagonal,factored,kronecker,activation,mean-gradient"
EVERY = f"{SUMS},rank-one"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    rows = [{"text": make_text(n, 2 + n % 9)} for n in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def weights_in(folder: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert found
    return found


def command(processes: int, *arguments: object) -> list[str]:
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    launcher = start if processes > 1 else []
    return [sys.executable, *launcher, "-m", "fishertool", *map(str, arguments)]


def torchrun(processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(processes, *arguments),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize(
    ("parts", "group", "batch"),
    [(1, 1, 4), (3, 1, 4), (3, 4, 2), (2, 1, "auto")],
    ids=["alone", "three", "groups", "one-idle"],
)
def test_parts_combine_to_the_same_bytes(
    cli: Cli,
    make_model: ModelMaker,
    texts: Path,
    tmp_path: Path,
    parts: int,
    group: int,
    batch: int | str,
) -> None:
    model = make_model("g", "gpt2")
    flags = ("--data", texts, "--kind", EVERY, "--group", group, "--batch-size", batch, "--quiet")
    assert cli("estimate-fisher", model, *flags, "--out", "whole").code == 0
    for n in range(1, parts + 1):
        result = cli("estimate-fisher", model, *flags, "--part", f"{n}/{parts}", "--out", f"p{n}")
        assert result.code == 0, result.err
    folders = [f"p{n}" for n in range(parts, 0, -1)]
    result = cli("combine-fisher", *folders, "--out", "sum", "--json")
    assert result.code == 0, result.err
    assert weights_in(tmp_path / "sum") == weights_in(tmp_path / "whole")
    whole = json.loads((tmp_path / "whole" / "fishertool_report.json").read_text())
    for key in ("calibration", "summary", "tensors"):
        assert result.report[key] == whole[key]


@pytest.mark.parametrize(
    ("folders", "told"),
    [
        (["p1"], "p1: one of 3 parts, of which 2, 3 are not given"),
        (["p1", "p2"], "p1: one of 3 parts, of which 3 is not given"),
        (["p1", "p2", "p2", "p3"], "p2: part 2/3 is given twice"),
        (["p1", "p2", "other"], "other: is no part of the same estimate as"),
        (["p1", "whole"], "whole: no partial.safetensors in it; give folders that"),
        (["p1", "g"], "g: no partial.safetensors in it"),
    ],
)
def test_what_is_no_set_of_parts_is_refused(
    cli: Cli, make_model: ModelMaker, texts: Path, tmp_path: Path, folders: list[str], told: str
) -> None:
    model = make_model("g", "gpt2")
    base = ("estimate-fisher", model, "--data", texts, "--include", "*ln_f*", "--quiet")
    for n in (1, 2, 3):
        assert cli(*base, "--part", f"{n}/3", "--out", f"p{n}").code == 0
    assert cli(*base, "--part", "3/3", "--seed", 1, "--out", "other").code == 0
    assert cli(*base, "--out", "whole").code == 0
    result = cli("combine-fisher", *folders, "--out", "sum")
    assert (result.code, told in result.err) == (3, True), result.err
    assert not (tmp_path / "sum").exists()


Tensors = dict[str, torch.Tensor]
Metadata = dict[str, Any]


def rewrite(path: Path, change: Callable[[Tensors, Metadata], object]) -> None:
    """Change the tensors, or what the metadata say of a part."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    told = json.loads(metadata["fishertool.partial"]) if path.stem == "partial" else {}
    change(tensors, told)
    if told:
        metadata["fishertool.partial"] = json.dumps(told)
    save_file(tensors, path, metadata)


def one_of(sums: Tensors, group: str) -> str:
    return next(name for name in sorted(sums) if name.startswith(f"{group}:"))


LINEAR = "transformer.h.0.mlp.c_fc.weight"
TAMPERED: dict[str, tuple[Callable[[Tensors, Metadata], object], str]] = {
    "traces": (lambda sums, told: sums.pop(one_of(sums, "traces")), "its sums are not those"),
    "inputs": (lambda sums, told: sums.pop(one_of(sums, "inputs")), "its sums are not those"),
    "outputs": (lambda sums, told: sums.pop(one_of(sums, "outputs")), "its sums are not those"),
    "counts": (lambda sums, told: sums.pop("pass:scored"), "its sums are not those"),
    "more": (lambda sums, told: sums.update(a=torch.zeros(1)), "its sums are not those"),
    "shape": (
        lambda sums, told: sums.update({one_of(sums, "outputs"): torch.zeros(1).double()}),
        "lacks sums of its estimate, or has others: outputs:",
    ),
    "of one": (
        lambda sums, told: sums.update({one_of(sums, "bank-traces"): torch.zeros(1).double()}),
        "lacks sums of its estimate, or has others: bank-traces:",
    ),
    "leaders": (lambda sums, told: told["progress"]["leaders"].clear(), "lacks sums"),
    "a leader": (lambda sums, told: told["progress"]["leaders"].update(a="b"), "no linear layers"),
    "leader": (lambda sums, told: told["progress"].update(leaders=[1]), "leaders: "),
    "members": (lambda sums, told: told["progress"].update(members=["1"]), "members: "),
    "twice": (
        lambda sums, told: told["progress"].update(members=[0, 0]),
        "each member of the bank",
    ),
    "number": (lambda sums, told: told["progress"].update(number=7), "out of range"),
    "shapes": (lambda sums, told: told["job"].update(shapes={LINEAR: "x"}), "shapes: "),
    "kinds": (lambda sums, told: told["job"].update(kinds=["none"]), "kinds none"),
    "workers": (lambda sums, told: told["job"].update(workers="2"), "workers: "),
    "group": (lambda sums, told: told["job"]["header"].update(group=0), "out of range"),
    "examples": (lambda sums, told: told["job"]["header"].update(examples=None), "TypeError("),
    "job": (lambda sums, told: told.update(job=[]), "not a partial result"),
}


def test_a_part_that_was_changed_is_refused_before_anything_is_added(
    cli: Cli, make_model: ModelMaker, texts: Path, tmp_path: Path
) -> None:
    model = make_model("g", "gpt2")
    kinds = ("--kind", "kronecker,diagonal,rank-one")
    flags = ("--data", texts, *kinds, "--include", "*h.0.mlp*", "--batch-size", 4)
    for n in (1, 2):
        part = ("--part", f"{n}/2", "--out", f"p{n}", "-q")
        assert cli("estimate-fisher", model, *flags, *part).code == 0
    file, bank = Path("p2/partial.safetensors"), Path("p2/rank-one.safetensors")

    def refused(told: str) -> None:
        for more in ([], ["--dry-run"]):
            result = cli("combine-fisher", "p1", "p2", "--out", "sum", *more)
            assert (result.code, told in result.err) == (3, True), result.err
            assert not (tmp_path / "sum").exists()

    whole = file.read_bytes()
    for change, told in TAMPERED.values():
        rewrite(file, change)
        refused(told)
        file.write_bytes(whole)
    whole = bank.read_bytes()
    rewrite(bank, lambda tensors, told: tensors.update({LINEAR: tensors[LINEAR][1:].clone()}))
    refused(f"p2: its bank lacks {LINEAR}, or has it of another shape")
    bank.unlink()
    refused("p2: no rank-one.safetensors in it")
    bank.write_bytes(whole)
    rewrite(file, lambda sums, told: None)
    assert cli("combine-fisher", "p1", "p2", "--out", "sum", "-q").code == 0


def test_a_part_is_no_sidecar(cli: Cli, make_model: ModelMaker, texts: Path) -> None:
    """Its bank would pass for one, and has only some of the members."""
    model = make_model("g", "gpt2")
    flags = ("--data", texts, "--kind", "rank-one", "--part", "1/2", "--out", "part", "-q")
    assert cli("estimate-fisher", model, *flags).code == 0
    more = ("--sparsity", "0.5", "--fisher", "part", "--out", "pruned")
    result = cli("prune", model, "--method", "obs", *more)
    assert result.code == 3
    assert "part: is one part of an estimate; put all of them together" in result.err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--part", "0/2"), "--part '0/2': write i/n"),
        (("--part", "3/2"), "--part '3/2': write i/n"),
        (("--part", "half"), "--part 'half': write i/n"),
        (
            ("--part", "1/2", "--until-relative-error", "0.1"),
            "--until-relative-error needs the sums",
        ),
        (("--world-size", "2"), "--world-size 2: this run has 1"),
        (("--estimator", "sign"), "--estimator 'sign'"),
        (("--estimator", "signed", "--kind", "kronecker"), "diagonal or factored Fisher, not kron"),
        (("--until-relative-error", "0.1", "--kind", "activation"), "add one to --kind"),
        (("--skip-nonfinite", "--kind", "rank-one"), "--skip-nonfinite and --until-relative-error"),
    ],
)
def test_what_does_not_go_together_is_refused(
    cli: Cli, make_model: ModelMaker, texts: Path, flags: tuple[str, ...], told: str
) -> None:
    model = make_model("g", "gpt2")
    result = cli("estimate-fisher", model, "--data", texts, *flags, "--out", "f")
    assert (result.code, told in result.err) == (2, True), result.err


@pytest.mark.parametrize(
    ("size", "told"),
    [
        ("2", "WORLD_SIZE=2 in the environment, but no RANK, MASTER_ADDR, MASTER_PORT: start"),
        ("two", "WORLD_SIZE='two' in the environment: is a number"),
        ("0", "WORLD_SIZE='0' in the environment: is a number"),
        ("", ""),
        ("1", ""),
    ],
)
def test_a_world_without_a_launcher(
    cli: Cli,
    make_model: ModelMaker,
    texts: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: str,
    told: str,
) -> None:
    for name in launcher.MEETING:
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("WORLD_SIZE", size)
    flags = ("--data", texts, "--out", "f", "--dry-run")
    result = cli("estimate-fisher", make_model("g", "gpt2"), *flags)
    assert (result.code, told in result.err) == (2 if told else 0, True), result.err


@pytest.mark.parametrize(("processes", "group"), [(2, 1), (4, 4)])
def test_processes_write_the_same_bytes(
    cli: Cli, make_model: ModelMaker, texts: Path, tmp_path: Path, processes: int, group: int
) -> None:
    model = make_model("g", "gpt2")
    flags = ("--data", texts, "--kind", EVERY, "--group", group, "--batch-size", 4, "--threads", 1)
    assert cli("estimate-fisher", model, *flags, "--out", "one").code == 0
    more = ("--world-size", processes, "--json", "--out", tmp_path / "many")
    done = torchrun(processes, "estimate-fisher", model, *flags, *more)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)  # one document: the others are silent
    assert report["environment"]["world_size"] == processes
    assert weights_in(tmp_path / "many") == weights_in(tmp_path / "one")


def test_processes_stop_together_by_the_error(
    cli: Cli, make_model: ModelMaker, tmp_path: Path
) -> None:
    model, texts = make_model("g", "gpt2"), tmp_path / "texts.jsonl"
    rows = [{"text": make_text(n, 4 + n % 3)} for n in range(400)]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = ("--data", texts, "--until-relative-error", 0.2, "--threads", 1, "--json")
    saving = ("--checkpoint-every", 4, "--out", tmp_path / "saved")
    refused = torchrun(2, "estimate-fisher", model, *flags, *saving)
    assert "processes that stop together (--until-relative-error) cannot be saved" in refused.stderr
    one = cli("estimate-fisher", model, *flags, "--out", "one")
    assert one.code == 0, one.err
    used = one.report["summary"]["examples"]
    assert used % 64 == 0 and 64 <= used < 400
    assert one.report["summary"]["largest_relative_error"] <= 0.2
    done = torchrun(2, "estimate-fisher", model, *flags, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["summary"] == one.report["summary"]
    assert weights_in(tmp_path / "two") == weights_in(tmp_path / "one")


Interrupt = Callable[[int], None]


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Interrupt:
    """Press Ctrl-C when so many batches have been made."""
    real = tasks.collate

    def after(batches: int) -> None:
        left = batches

        def collate(*arguments: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return real(*arguments)

        monkeypatch.setattr(subject, "collate", collate)

    return after


@pytest.mark.parametrize(
    "flags",
    [
        ("--kind", EVERY, "--batch-size", 2),
        ("--kind", EVERY, "--group", 4, "--batch-size", 2),
        ("--kind", SUMS, "--until-relative-error", 0.0, "--batch-size", 2),
        ("--kind", EVERY, "--part", "2/2", "--batch-size", 2),
    ],
    ids=["bank", "group", "until", "part"],
)
def test_an_interrupted_run_is_resumed_to_the_same_bytes(
    cli: Cli,
    make_model: ModelMaker,
    texts: Path,
    tmp_path: Path,
    interrupt: Interrupt,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[Any, ...],
) -> None:
    monkeypatch.setattr("fishertool.estimation.work.WINDOW", 6)
    model = make_model("g", "gpt2")
    run = ("estimate-fisher", model, "--data", texts, *flags, "--quiet")
    assert cli(*run, "--out", "whole").code == 0
    saving = (*run, "--checkpoint-every", 4, "--out", "f")
    codes: list[int] = []
    for _ in range(20):
        interrupt(9)
        result = cli(*saving, *(["--resume"] if codes else []))
        codes.append(result.code)
        if result.code == 0:
            break
        assert result.code == 130
        assert not (tmp_path / "f").exists()
        if len(codes) == 1:
            again = cli(*saving)
            assert again.code == 7 and "--resume goes on with it" in again.err
            other = cli(*saving, "--resume", "--seed", 3)
            assert other.code == 3 and "another" in other.err
    assert codes[-1] == 0 and len(codes) > 1
    assert weights_in(tmp_path / "f") == weights_in(tmp_path / "whole")
    assert not list(tmp_path.glob(".f.*"))
    assert cli(*saving, "--overwrite").code == 130  # nothing was left to go on with


def test_a_run_killed_before_its_output_has_seen_enough(
    cli: Cli, make_model: ModelMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed, it stops by the same error, and does not go on to the next window first."""
    model, texts = make_model("g", "gpt2"), tmp_path / "texts.jsonl"
    write_rows(texts, [{"text": make_text(n, 4 + n % 3)} for n in range(400)])
    run = ("estimate-fisher", model, "--data", texts, "--until-relative-error", 0.2, "--json")
    whole = cli(*run, "--out", "whole")
    assert whole.code == 0 and whole.report["summary"]["examples"] < 300

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    saving = (*run, "--checkpoint-every", 1, "--out", "f")
    with monkeypatch.context() as patched:
        patched.setattr("fishertool.commands.estimate_fisher.finish", killed)
        assert cli(*saving).code == 130
    resumed = cli(*saving, "--resume")
    assert resumed.code == 0, resumed.err
    assert resumed.report["summary"] == whole.report["summary"]
    assert weights_in(tmp_path / "f") == weights_in(tmp_path / "whole")


def test_processes_end_with_the_one_that_fails(make_model: ModelMaker, tmp_path: Path) -> None:
    """The second does not see where the bank is, as on a disk of its own."""
    (tmp_path / "texts.txt").write_text("the red cat runs\na big dog eats\n" * 4)
    code = (
        "import os, pathlib; from fishertool.estimation import bank;"
        "hidden = type('Hidden', (type(pathlib.Path()),), {'is_dir': lambda self: False});"
        "real = bank.open_bank;"
        "from fishertool.commands import estimate_fisher as command;"
        "command.open_bank = (lambda place, *more: real(hidden(place), *more))"
        " if os.environ['RANK'] == '1' else real;"
        "from fishertool.cli import run; run()"
    )
    (tmp_path / "run.py").write_text(code)
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    flags = ("--data", tmp_path / "texts.txt", "--kind", "rank-one", "--out", tmp_path / "f")
    done = subprocess.run(
        [sys.executable, *start, tmp_path / "run.py", "estimate-fisher", make_model("g", "gpt2"),
         *map(str, flags)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode != 0 and not (tmp_path / "f").exists()
    assert "the first process writes there, and this one does not see it" in done.stderr
    assert "a bug in fishertool" not in done.stderr


@pytest.mark.parametrize(
    ("processes", "death"), [(1, signal.SIGKILL), (2, signal.SIGTERM)], ids=["alone", "launched"]
)
def test_a_killed_run_is_resumed(
    cli: Cli,
    make_model: ModelMaker,
    texts: Path,
    tmp_path: Path,
    processes: int,
    death: signal.Signals,
) -> None:
    """torchrun hands SIGTERM on to the processes; killed itself it would leave them running."""
    model = make_model("g", "gpt2")
    run = ["estimate-fisher", str(model), "--data", str(texts), "--kind", EVERY, "--threads", "1"]
    run += ["--batch-size", "1", "--checkpoint-every", "1", "--out"]
    assert cli(*run, "whole").code == 0
    process = subprocess.Popen(command(processes, *run, tmp_path / "f"))
    saved = tmp_path / ".f.resumable" / f"worker-{processes - 1}.safetensors"
    deadline = time.monotonic() + 120
    while not saved.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(death)
    process.wait()
    done = torchrun(processes, *run, tmp_path / "f", "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    assert weights_in(tmp_path / "f") == weights_in(tmp_path / "whole")


def test_resume_with_nothing_to_resume_begins(
    cli: Cli, make_model: ModelMaker, texts: Path, tmp_path: Path
) -> None:
    model = make_model("g", "gpt2")
    flags = ("--data", texts, "--include", "*ln_f*", "--resume", "--out", "f")
    assert cli("estimate-fisher", model, *flags).code == 0
    assert not list(tmp_path.glob(".f.*"))


@pytest.mark.parametrize("saved", [True, False])
def test_what_a_killed_run_left_half_written_is_in_nobodys_way(
    cli: Cli,
    make_model: ModelMaker,
    texts: Path,
    tmp_path: Path,
    interrupt: Interrupt,
    saved: bool,
) -> None:
    """Killed while it saved, before it ever had, or while it wrote the sidecar."""
    model = make_model("g", "gpt2")
    run = ("estimate-fisher", model, "--data", texts, "--kind", EVERY, "--batch-size", 2, "-q")
    assert cli(*run, "--out", "whole").code == 0
    left = tmp_path / ".f.resumable"
    if saved:
        interrupt(9)
        assert cli(*run, "--checkpoint-every", 4, "--out", "f").code == 130
        interrupt(1000)
    else:
        left.mkdir()
        (left / "rank-one.safetensors").write_bytes(b"of another size")
    for name in ("worker-0.new.safetensors", "diagonal.safetensors", "fishertool_report.json"):
        (left / name).write_bytes(b"half")
    result = cli(*run, "--checkpoint-every", 4, "--resume", "--out", "f")
    assert result.code == 0, result.err
    assert weights_in(tmp_path / "f") == weights_in(tmp_path / "whole")
    assert not list(tmp_path.glob(".f.*"))
