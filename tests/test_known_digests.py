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
from fishertool.errors import InputError


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(known.FOLDER, str(tmp_path / "cache"))
    monkeypatch.setattr(known, "SMALLEST", 10)
    monkeypatch.setattr(known, "_BEGAN", time.time_ns() + 10**12)
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
    with file.open("rb") as opened:
        again = RunningDigest(file, opened.fileno())
    again.feed(0, memoryview(b"some"))
    assert again.finish() == first == again.finish()
    assert first.sha256 == sha256(file)
    hash_ahead([file], 1)
    assert hashed_ahead(identity(file.stat())) is None
    assert len((file.parent / "cache" / known.NAME).read_text().splitlines()) == 2


@pytest.mark.parametrize("keep_mtime", [False, True])
def test_a_changed_file_is_hashed_anew(keep_mtime: bool, file: Path) -> None:
    stat = file.stat()
    digest(file)
    time.sleep(0.05)  # a tick of the file system's clock
    file.write_bytes(file.read_bytes()[::-1])
    if keep_mtime:
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert digest(file).sha256 == sha256(file)


@pytest.mark.parametrize("known_before", [False, True])
@pytest.mark.parametrize("how", ["written", "replaced"])
def test_a_file_that_changes_while_it_is_read_is_refused(
    how: str, known_before: bool, file: Path
) -> None:
    if known_before:
        digest(file)
    with file.open("rb") as opened:
        running = RunningDigest(file, opened.fileno())
        time.sleep(0.05)
        other = file if how == "written" else file.with_name("other")
        other.write_bytes(file.read_bytes()[::-1])
        other.replace(file)
        with pytest.raises(InputError, match="file: changed while it was read"):
            running.finish()


def test_a_new_link_to_a_file_changes_nothing(file: Path) -> None:
    with file.open("rb") as opened:
        running = RunningDigest(file, opened.fileno())
        file.with_name("link").hardlink_to(file)
        assert running.finish().sha256 == sha256(file)


def test_a_copy_is_not_known(file: Path) -> None:
    remember(identity(file.stat()), "f" * 64)
    copy = file.with_name("copy")
    copy.write_bytes(file.read_bytes())
    assert recall(identity(file.stat())) == "f" * 64
    assert recall(identity(copy.stat())) is None


def test_small_and_unsettled_files_are_not_remembered(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = known._BEGAN
    monkeypatch.setattr(known, "_BEGAN", file.stat().st_ctime_ns + 10**9)
    digest(file)
    monkeypatch.setattr(known, "_BEGAN", began)
    monkeypatch.setattr(known, "SMALLEST", 1000)
    digest(file)
    assert not (file.parent / "cache").exists()


def test_what_is_written_is_not_taken_for_what_was_read(file: Path) -> None:
    remember(identity(file.stat()), "f" * 64)
    writing = RunningDigest(file)
    writing.feed(0, memoryview(file.read_bytes()))
    assert writing.finish().sha256 == sha256(file)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\x00",
        b"zz\n",
        "{header}{short} {told}",
        "{header}{right}{right}{told}",
        "{header}x{right}{told}",
        "{header}{right}",
        "{right}{told}",
    ],
)
def test_a_broken_memory_is_none(content: str | bytes, file: Path) -> None:
    place = file.parent / "cache" / known.NAME
    place.parent.mkdir()
    if isinstance(content, str):
        told = known._told(identity(file.stat()))
        content = content.format(
            header=known.HEADER, short="f" * 63, right="f" * 64, told=told
        ).encode()
    place.write_bytes(content)
    assert digest(file).sha256 == sha256(file)


def test_it_is_forgotten_before_it_grows_large(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = file.parent / "cache" / known.NAME
    monkeypatch.setattr(known, "MOST_BYTES", 1000)
    for number in range(100):
        remember(identity(file.stat())._replace(inode=number), "f" * 64)
        assert place.stat().st_size < 1200
    assert recall(identity(file.stat())._replace(inode=99)) == "f" * 64
    assert place.read_text().startswith(known.HEADER)


@pytest.mark.parametrize("link", [False, True])
def test_what_is_not_ours_is_left_alone(link: bool, file: Path) -> None:
    place = file.parent / "cache" / known.NAME
    place.parent.mkdir()
    theirs = place.with_name("theirs") if link else place
    theirs.write_bytes(b"e3b0c442  something else\n" * 60_000)
    if link:
        place.symlink_to(theirs)
    before = theirs.read_bytes()
    digest(file)
    assert theirs.read_bytes() == before


@pytest.mark.parametrize("place", ["", "{file}", "{file}/below", "/proc/none"])
def test_nowhere_to_remember(place: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(known.FOLDER, place.format(file=file))
    assert digest(file) == digest(file)
    assert recall(identity(file.stat())) is None


def test_where_it_is_kept(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(known.FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(file.parent / "xdg"))
    digest(file)
    assert (file.parent / "xdg" / "fishertool" / known.NAME).stat().st_mode & 0o777 == 0o600
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(file.parent / "home"))
    digest(file)
    assert (file.parent / "home" / ".cache" / "fishertool" / known.NAME).is_file()
