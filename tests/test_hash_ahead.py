"""Files are hashed by processes of their own, and whatever becomes of these the digests are right."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fishertool.cli.importing import shards_of

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from fishertool.checkpoint import hash_ahead as ahead
from fishertool.checkpoint.digest import RunningDigest

paths = [Path(path) for path in sys.argv[2:]]
children = lambda: [process._number for process in ahead._processes.values()]
ahead.hash_ahead(paths, int(sys.argv[1]))
assert "torch" not in sys.modules
{meanwhile}
for path in paths:
    content = path.read_bytes()
    with path.open("rb") as file:
        digest = RunningDigest(path, file.fileno())
    digest.feed(0, memoryview(content)[:1000])
    found = digest.finish()
    assert (found.file, found.bytes) == (path.name, len(content))
    print(found.sha256)
"""


def run(paths: list[Path], meanwhile: str = "", processes: int = 2, before: str = "") -> list[str]:
    script = before + SCRIPT.format(meanwhile=meanwhile)
    command = [sys.executable, "-c", script, str(processes), *map(str, paths)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{n}.safetensors" for n in range(5)]
    for n, path in enumerate(paths):
        path.write_bytes(os.urandom(n * 300_000))
    return paths


@pytest.mark.parametrize("processes", [1, 2, 9])
def test_digests_are_the_files(processes: int, files: list[Path]) -> None:
    assert run(files, processes=processes) == [sha256(path) for path in files]
    assert run([files[2], files[2]], processes=processes) == [sha256(files[2])] * 2


@pytest.mark.parametrize(
    "meanwhile",
    [
        "[os.kill(child, signal.SIGKILL) for child in children()]",
        "time.sleep(0.2); paths[2].write_bytes(b'other'); paths[3].write_bytes(b'bytes')",
        "paths[4].unlink(); paths[4].write_bytes(b'another file')",
    ],
    ids=["killed", "changed", "replaced"],
)
def test_digests_are_of_what_is_there(meanwhile: str, files: list[Path]) -> None:
    found = run(files, meanwhile)
    assert found == [sha256(path) for path in files]


def test_without_processes_all_goes_on(files: list[Path]) -> None:
    """As where there may be no more of them."""
    before = "import os\ndef fork(): raise BlockingIOError(11, 'no more')\nos.fork = fork\n"
    assert run(files, before=before) == [sha256(path) for path in files]
    assert run([*files[1:3], files[0].with_name("absent")], "paths = paths[:2]") == [
        sha256(path) for path in files[1:3]
    ]


def test_what_was_hashed_is_not_hashed_again(files: list[Path]) -> None:
    assert run(files, "RunningDigest._update = None") == [sha256(path) for path in files]


def test_none_is_left_behind(tmp_path: Path) -> None:
    """Neither at a normal end nor when the process that wants to know is killed."""
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(20 << 30)
    code = (
        "from pathlib import Path; import sys; from fishertool.checkpoint import hash_ahead as a; "
        f"a.hash_ahead([Path({str(path)!r})], 1); "
        "print([p._number for p in a._processes.values()][0], flush=True); "
    )
    for end in ("sys.exit(3)", "import time; time.sleep(60)"):
        command = [sys.executable, "-c", code + end]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            child = int(process.stdout.readline())
            if "sleep" in end:
                process.send_signal(signal.SIGKILL)
            process.stdout.read()  # until nobody holds its other end
        assert process.returncode == (3 if "exit" in end else -signal.SIGKILL)
        deadline = time.monotonic() + 10
        while not _ended(child):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def _ended(process: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return True


def test_shards_come_in_the_order_of_reading(tmp_path: Path) -> None:
    several = [f"model-0000{n}-of-00003" for n in (1, 2, 3)]
    for name in (
        "a/model",
        "a/consolidated",
        "a/rank-one",
        *(f"b/{name}" for name in several[::2]),
    ):
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    os.mkfifo(tmp_path / "b" / f"{several[1]}.safetensors")
    found = shards_of(tmp_path / name for name in ("a", "absent", "b", "x" * 300))
    names = [str(path.relative_to(tmp_path)).removesuffix(".safetensors") for path in found]
    assert names == ["a/model", f"b/{several[0]}", f"b/{several[2]}"]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_merge_reports_the_digests_of_its_inputs(threads: int, tmp_path: Path) -> None:
    models = [tmp_path / "a", tmp_path / "b"]
    for model in models:
        model.mkdir()
        (model / "config.json").write_text("{}")
        save_file({"w": torch.randn(300, 30)}, model / "model.safetensors")
    command = [sys.executable, "-m", "fishertool", "merge", *map(str, models), "--json"]
    command += ["--out", str(tmp_path / "out"), "--threads", str(threads)]
    report = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    found = [file["sha256"] for source in report["inputs"] for file in source["files"]]
    assert found == [sha256(model / "model.safetensors") for model in models]
