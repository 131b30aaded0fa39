"""Staged outputs: at every instant absent, the old one whole, or the new one whole."""

import errno
import fcntl
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fishertool.checkpoint import staging
from fishertool.checkpoint.header import TensorInfo
from fishertool.checkpoint.layout import lay_out
from fishertool.checkpoint.staging import REPORT_FILE, check_output, free_bytes, staged
from fishertool.checkpoint.writer import CheckpointWriter
from fishertool.errors import OutputExistsError, StorageError, UsageError

TENSORS = [TensorInfo("v", "F32", (2, 3)), TensorInfo("w", "F32", (2, 3))]
KILLED = 9


def write_checkpoint(out: Path, value: float) -> None:
    """Two shards, an index and a report."""
    layout = lay_out(TENSORS, 24)
    with staged(out) as folder, CheckpointWriter(folder, layout) as writer:
        for tensor in TENSORS:
            for row in range(2):
                writer.write(tensor.name, torch.full((1, 3), value), row)
        writer.finish()
        (folder / "nested").mkdir()
        (folder / "nested" / REPORT_FILE).write_bytes(b"{}\n")
        (folder / REPORT_FILE).write_bytes(b"{}\n")


def contents(folder: Path) -> dict[str, bytes] | None:
    if not folder.exists():
        return None
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if path != out)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "place" / "out"


@pytest.fixture
def old(out: Path) -> dict[str, bytes]:
    """What an older run wrote to `out`."""
    write_checkpoint(out, 1.0)
    return contents(out) or {}


def test_output_appears_whole_in_place_of_nothing_or_an_empty_folder(out: Path) -> None:
    write_checkpoint(out, 1.0)
    first = contents(out)
    assert first is not None
    assert len(first) == 5
    assert beside(out) == []
    shutil.rmtree(out)
    out.mkdir()
    write_checkpoint(out, 1.0)
    assert contents(out) == first


def test_nothing_is_in_place_before_the_block_ends(out: Path, old: dict[str, bytes]) -> None:
    with staged(out) as folder:
        (folder / "new").write_text("new")
        assert folder.parent == out.parent
        assert contents(out) == old
    assert contents(out) == {"new": b"new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("overwrite", [False, True])
def test_block_that_raises_leaves_nothing(
    overwrite: bool, error: type[BaseException], out: Path
) -> None:
    if overwrite:
        write_checkpoint(out, 1.0)
    before = contents(out)
    with pytest.raises(error), staged(out) as folder:
        (folder / "nested").mkdir()
        (folder / "nested" / "new").write_text("new")
        raise error
    assert contents(out) == before
    assert beside(out) == []


@pytest.mark.parametrize("exchange", [True, False])
def test_new_output_replaces_the_old_one(
    exchange: bool, out: Path, old: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
    write_checkpoint(out, 2.0)
    new = contents(out)
    assert new is not None
    assert new.keys() == old.keys()
    assert new != old
    assert beside(out) == []


def test_old_output_returns_when_the_new_one_cannot_take_its_place(
    out: Path, old: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rename(source: Any, target: Any) -> None:
        if ".staged-" in Path(source).name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        whole(source, target)

    whole = os.rename
    monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_checkpoint(out, 2.0)
    assert contents(out) == old
    assert beside(out) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_full_disk_leaves_the_old_output(
    call: str, code: int, out: Path, old: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match=os.strerror(code)):
        write_checkpoint(out, 2.0)
    assert contents(out) == old
    assert beside(out) == []


def test_everything_is_on_disk_before_the_rename(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    at_rename: list[set[int]] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def note_rename(source: Path, target: Path) -> None:
        at_rename.append(set(synced))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    write_checkpoint(out, 1.0)
    written = {path.stat().st_ino for path in [out, *out.rglob("*")]}
    assert at_rename == [written]
    assert synced[-1] == out.parent.stat().st_ino


def test_modes_follow_the_umask(out: Path) -> None:
    before = os.umask(0o027)
    try:
        write_checkpoint(out, 1.0)
        assert staging._umask() == 0o027
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()}
    assert modes == {0o640}
    assert [path.stat().st_mode & 0o777 for path in (out, out / "nested")] == [0o750, 0o750]


@pytest.mark.parametrize("name", ["out", "model[1]", "a*", "q?"])
def test_what_a_dead_run_left_is_removed(name: str, out: Path) -> None:
    out = out.with_name(name)
    kept = [".m.staged-x", ".model1.staged-x", ".ab.staged-x", f".{name}.old-x", f"{name}.staged-x"]
    for left in [f".{name}.staged-dead", *kept]:
        (out.parent / left).mkdir(parents=True)
        (out.parent / left / "file").touch()
    write_checkpoint(out, 1.0)
    assert beside(out) == sorted(kept)


HOLD = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_what_a_live_run_writes_is_kept_until_it_ends(out: Path) -> None:
    live = out.parent / ".out.staged-live"
    live.mkdir(parents=True)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, live], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        write_checkpoint(out, 1.0)
        assert beside(out) == [live.name]
        holder.communicate()
    write_checkpoint(out, 2.0)
    assert beside(out) == []


def test_staged_folder_is_locked_while_it_is_written(out: Path) -> None:
    with staged(out) as folder:
        descriptor = os.open(folder, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)


CALLS: list[tuple[Any, str]] = [
    (os, "posix_fallocate"), (os, "pwrite"), (os, "fsync"), (os, "rename"), (os, "unlink"),
    (os, "rmdir"), (Path, "write_bytes"), (staging, "_exchange"),
]  # fmt: skip


def die_at(moment: int, after: bool) -> None:
    """Kill this process before or after the call of that number among CALLS."""
    numbers = itertools.count(1)

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            number = next(numbers)
            if number == moment and not after:
                os._exit(KILLED)
            result = function(*arguments, **named)
            if number == moment:
                os._exit(KILLED)
            return result

        return call

    for owner, name in CALLS:
        setattr(owner, name, dying(getattr(owner, name)))


class Crash(NamedTuple):
    """What one killed run left, and what lies beside the output of the run that followed."""

    out: dict[str, bytes] | None
    aside: list[dict[str, bytes] | None]
    following: dict[str, bytes] | None
    stray: list[str]


def crash_at_every_call(place: Path, overwrite: bool, exchange: bool, after: bool) -> list[Crash]:
    crashes = []
    os.fsync = lambda fd: None  # what a killed process wrote is not lost, only a machine's is
    for moment in itertools.count(1):
        out = place / str(moment) / "out"
        out.parent.mkdir(parents=True)
        if overwrite:
            write_checkpoint(out, 1.0)
        child = os.fork()
        if child == 0:
            try:
                if not exchange:
                    staging._exchange = lambda first, second: False
                die_at(moment, after)
                write_checkpoint(out, 2.0)
                os._exit(0)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code not in (0, KILLED):
            raise RuntimeError(f"call {moment}: exit code {code}")
        aside = [contents(path) for path in out.parent.glob(".out.old-*")]
        left = contents(out)
        write_checkpoint(out, 2.0)
        crashes.append(Crash(left, aside, contents(out), beside(out)))
        if code == 0:
            break
    return crashes


@pytest.fixture(scope="module")
def apart() -> Iterator[ProcessPoolExecutor]:
    """A process without pytest's threads and patches, that may fork."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("overwrite", "exchange"), [(False, True), (True, True), (True, False)])
def test_run_killed_at_any_call_leaves_an_output_whole(
    overwrite: bool, exchange: bool, after: bool, tmp_path: Path, apart: ProcessPoolExecutor
) -> None:
    write_checkpoint(tmp_path / "new", 2.0)
    write_checkpoint(tmp_path / "old", 1.0)
    new, old = contents(tmp_path / "new"), contents(tmp_path / "old") if overwrite else None
    *crashes, completed = apart.submit(
        crash_at_every_call, tmp_path / "runs", overwrite, exchange, after
    ).result()
    assert len(crashes) > 15
    assert completed == Crash(new, [], new, [])
    assert [crash for crash in crashes if crash.out == new]
    assert [crash for crash in crashes if crash.out == old]
    for crash in crashes:
        assert crash.following == new
        assert crash.out in ((old, new) if exchange else (old, new, None))
        assert crash.out is not None or old is None or old in crash.aside
        assert not [name for name in crash.stray if exchange or ".staged-" in name]


def refused(error: type[Exception], out: Path, match: str, **options: Any) -> None:
    arguments: dict[str, Any] = {"inputs": [], "overwrite": False, "needed_bytes": 0} | options
    with pytest.raises(error, match=match) as caught:
        check_output(out, **arguments)
    assert str(out) in str(caught.value)


def test_output_that_can_be_written_passes(tmp_path: Path, out: Path) -> None:
    out.mkdir(parents=True)
    for place in (tmp_path / "absent", tmp_path / "absent" / "deep" / "out", out):
        check_output(place, [tmp_path / "model", tmp_path / "outer"], False, 1)
    assert not (tmp_path / "absent").exists()


def test_output_that_exists_is_refused(out: Path, old: dict[str, bytes]) -> None:
    refused(OutputExistsError, out, "exists; --overwrite replaces it")
    check_output(out, [], True, 0)
    assert contents(out) == old
    assert OutputExistsError.exit_code == 7


def test_folder_not_written_here_is_never_replaced(out: Path) -> None:
    out.mkdir(parents=True)
    (out / "thesis.tex").touch()
    refused(OutputExistsError, out, f"has no {REPORT_FILE}.*remove it yourself", overwrite=True)
    (out / REPORT_FILE).mkdir()
    refused(OutputExistsError, out, f"has no {REPORT_FILE}.*remove it yourself", overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["file", "fifo", "link to a folder", "link to a file", "dangling"])
def test_what_is_not_a_folder_is_refused(kind: str, overwrite: bool, out: Path) -> None:
    out.parent.mkdir()
    write_checkpoint(out.parent / "folder", 1.0)
    (out.parent / "file").touch()
    if kind == "file":
        out.touch()
    elif kind == "fifo":
        os.mkfifo(out)
    else:
        out.symlink_to(out.parent / kind.split()[-1])
    refused(OutputExistsError, out, "not a folder; choose another name", overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "place", ["model", "model/sub/out", ".", "link", "link/out", "other/../model"]
)
def test_output_that_overlaps_an_input_is_refused(
    place: str, overwrite: bool, tmp_path: Path
) -> None:
    model, other = tmp_path / "model", tmp_path / "other"
    for folder in (model, other):
        folder.mkdir()
        (folder / REPORT_FILE).touch()
    (tmp_path / "link").symlink_to(model)
    out = tmp_path / place
    refused(UsageError, out, "choose another folder", inputs=[other, model], overwrite=overwrite)


def test_input_through_a_link_overlaps_too(tmp_path: Path, out: Path) -> None:
    out.mkdir(parents=True)
    (tmp_path / "link").symlink_to(out)
    refused(UsageError, out, "overlaps the input", inputs=[tmp_path / "link"])
    check_output(out.with_name("out2"), [out], False, 0)


def test_output_that_does_not_fit_is_refused(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(out.parent.parent)._replace(free=2_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert free_bytes(out) == 2_000_000
    check_output(out, [], False, 2_000_000)
    refused(
        StorageError, out, r"needs 2\.1 MB, 2\.0 MB are free; free some", needed_bytes=2_100_000
    )
    assert StorageError.exit_code == 5


def test_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(
        StorageError, tmp_path / "file" / "deep" / "out", f"{tmp_path / 'file'} is not a folder"
    )


def test_output_that_may_not_be_written_is_refused(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def access(path: Path, mode: int) -> bool:
        return not (path == tmp_path and mode & os.W_OK)

    monkeypatch.setattr(os, "access", access)
    refused(StorageError, out, f"no permission to write in {tmp_path}")


def test_output_that_appears_during_the_run_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputExistsError, match="appeared"), staged(out, overwrite=False):
        out.mkdir()
        (out / "theirs").write_text("1")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


@pytest.mark.parametrize("place", ["", "below"])
def test_the_current_folder_is_not_replaced(
    place: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is in it would stay in the old one."""
    (out / place).mkdir(parents=True)
    monkeypatch.chdir(out / place)
    with pytest.raises(UsageError, match="is the current folder, or holds it"), staged(out):
        pass
    assert beside(out) == []


def test_a_mount_point_is_refused_before_any_work(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out.mkdir(parents=True)
    monkeypatch.setattr(Path, "is_mount", lambda path: path == out)
    with pytest.raises(UsageError, match="is a mount point; choose another"), staged(out):
        pass
    assert beside(out) == []


def test_a_run_leaves_the_folder_of_another_alone(out: Path) -> None:
    """Nothing is saved in it yet, which is when a run that fails removes its own."""
    with staged(out, keep="saved-*") as folder:
        (folder / "file").write_bytes(b"at work")
        told = "another run works there"
        with pytest.raises(OutputExistsError, match=told), staged(out, keep="saved-*"):
            pass
    assert contents(out) == {"file": b"at work"}
