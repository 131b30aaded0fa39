"""A digest is remembered for as long as its file is what it was, and never in the way."""

import hashlib
import os
import time
from pathlib import Path

import pytest

from fishertool.checkpoint import known_digests as known
from fishertool.checkpoint.digest import RunningDigest, digest
from fishertool.checkpoint.hash_ahead import hash_ahead, hashed_ahead
from fishertool.checkpoint.known_digests import identity, recall, remember


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(known.FOLDER, str(tmp_path / "cache"))
    monkeypatch.setattr(known, "SMALLEST", 10)
    monkeypatch.setattr(known, "SETTLED_SECONDS", -1)
    path = tmp_path / "file"
    path.write_bytes(b"some of a model's weights")
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def never(self: RunningDigest, data: bytes) -> None:
    raise AssertionError("hashed again")


def test_a_file_is_hashed_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = digest(file)
    monkeypatch.setattr(RunningDigest, "_update", never)
    again = RunningDigest(file)
    again.feed(0, memoryview(b"some"))
    assert again.finish() == first == again.finish()
    assert first.sha256 == sha256(file)
    hash_ahead([file], 1)
    assert hashed_ahead(identity(file.stat())) is None
    assert len((file.parent / "cache" / "sha256").read_text().splitlines()) == 1


@pytest.mark.parametrize("keep_mtime", [False, True])
def test_a_changed_file_is_hashed_anew(keep_mtime: bool, file: Path) -> None:
    stat = file.stat()
    digest(file)
    opened = RunningDigest(file)
    time.sleep(0.05)  # a tick of the file system's clock
    file.write_bytes(file.read_bytes()[::-1])
    if keep_mtime:
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert opened.finish().sha256 == digest(file).sha256 == sha256(file)


def test_a_copy_is_not_known(file: Path) -> None:
    remember(identity(file.stat()), "f" * 64)
    copy = file.with_name("copy")
    copy.write_bytes(file.read_bytes())
    assert recall(identity(file.stat())) == "f" * 64
    assert recall(identity(copy.stat())) is None


def test_small_and_unsettled_files_are_not_remembered(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "SETTLED_SECONDS", 2)
    digest(file)
    monkeypatch.setattr(known, "SETTLED_SECONDS", -1)
    monkeypatch.setattr(known, "SMALLEST", 1000)
    digest(file)
    assert not (file.parent / "cache").exists()


def test_what_is_written_is_not_taken_for_what_was_read(file: Path) -> None:
    remember(identity(file.stat()), "f" * 64)
    writing = RunningDigest(file)
    file.write_bytes(b"other weights")
    writing.feed(0, memoryview(b"other weights"))
    assert writing.finish().sha256 == sha256(file)


@pytest.mark.parametrize(
    "content",
    [b"\xff\x00", b"zz\n", "{short} {told}", "{right}{right}{told}", "x{right}{told}", "{right}"],
)
def test_a_broken_memory_is_none(content: str | bytes, file: Path) -> None:
    place = file.parent / "cache" / "sha256"
    place.parent.mkdir()
    if isinstance(content, str):
        told = known._told(identity(file.stat()))
        content = content.format(short="f" * 63, right="f" * 64, told=told).encode()
    place.write_bytes(content)
    assert digest(file).sha256 == sha256(file)


def test_it_is_forgotten_before_it_grows_large(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = file.parent / "cache" / "sha256"
    monkeypatch.setattr(known, "MOST_BYTES", 1000)
    for number in range(100):
        remember(identity(file.stat())._replace(inode=number), "f" * 64)
        assert place.stat().st_size < 1200
    assert recall(identity(file.stat())._replace(inode=99)) == "f" * 64


@pytest.mark.parametrize("place", ["", "{file}", "{file}/below", "/proc/none"])
def test_nowhere_to_remember(place: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(known.FOLDER, place.format(file=file))
    assert digest(file) == digest(file)
    assert recall(identity(file.stat())) is None


def test_where_it_is_kept(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(known.FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(file.parent / "xdg"))
    digest(file)
    assert (file.parent / "xdg" / "fishertool" / "sha256").stat().st_mode & 0o777 == 0o600
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(file.parent / "home"))
    digest(file)
    assert (file.parent / "home" / ".cache" / "fishertool" / "sha256").is_file()
