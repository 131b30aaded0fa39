"""Layout, writer and stream: the shards of transformers, filled in any order, to the last byte."""

import errno
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.serialization._base import parse_size_to_int
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fishertool.checkpoint import digest as digest_module
from fishertool.checkpoint import writer as writer_module
from fishertool.checkpoint.digest import FileDigest, RunningDigest, digest
from fishertool.checkpoint.dtypes import TORCH
from fishertool.checkpoint.header import TensorInfo, read_header
from fishertool.checkpoint.layout import Layout, lay_out, parse_size, show_size
from fishertool.checkpoint.reader import open_checkpoint
from fishertool.checkpoint.stored import BITS
from fishertool.checkpoint.stream import Piece, pieces, stream
from fishertool.checkpoint.writer import CheckpointWriter
from fishertool.errors import UsageError

STORED = {dtype: name for name, dtype in TORCH.items()}
SHAPES = st.lists(st.integers(0, 7), max_size=3).map(tuple)
thorough = settings(deadline=None, database=None, max_examples=100)


def state_of_every_dtype() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (), (7,), (2, 3, 2), (0, 4), (1, 63)]
    return {
        f"{dtype} {list(shape)}": torch.randint(0, 2, shape, generator=generator).to(TORCH[dtype])
        for dtype in TORCH
        for shape in shapes
    }


def infos(state: dict[str, Tensor]) -> list[TensorInfo]:
    return [TensorInfo(name, STORED[t.dtype], tuple(t.shape)) for name, t in state.items()]


def rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1) if tensor.dim() < 2 else tensor.flatten(0, -2)


def write_whole(folder: Path, layout: Layout, state: dict[str, Tensor]) -> list[FileDigest]:
    with CheckpointWriter(folder, layout) as writer:
        for name, tensor in state.items():
            writer.write(name, tensor)
        return writer.finish()


@thorough
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 60))
def test_shards_are_those_of_transformers(sizes: list[int], limit: int) -> None:
    state = {f"w{n}": torch.zeros(size, dtype=torch.uint8) for n, size in enumerate(sizes)}
    theirs = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=limit
    )
    layout = lay_out(infos(state), limit)
    ours = {shard.file: [tensor.name for tensor in shard.tensors] for shard in layout.shards}
    assert ours == theirs.filename_to_tensors
    assert (layout.index is not None) == theirs.is_sharded
    if layout.index is not None:
        assert layout.index["weight_map"] == theirs.tensor_to_filename
        assert layout.index["metadata"]["total_size"] == theirs.metadata["total_size"]


@thorough
@given(st.lists(st.tuples(st.sampled_from(sorted(TORCH)), SHAPES), max_size=8), st.integers(1, 99))
def test_layout_leaves_no_gap_and_aligns(
    kinds: list[tuple[str, tuple[int, ...]]], limit: int
) -> None:
    tensors = [TensorInfo(f"w{n}", *kind) for n, kind in enumerate(kinds)]
    layout = lay_out(tensors, limit, stem="diagonal", metadata={"kind": "diagonal"})
    placed = [tensor for shard in layout.shards for tensor in shard.tensors]
    assert sorted(tensor.name for tensor in placed) == sorted(tensor.name for tensor in tensors)
    assert layout.parameters == sum(tensor.elements for tensor in tensors)
    assert layout.index_file == "diagonal.safetensors.index.json"
    for shard in layout.shards:
        assert shard.file.startswith("diagonal")
        assert b'{"format":"pt","kind":"diagonal"}' in shard.header
        end = len(shard.header)
        for tensor in shard.tensors:
            assert tensor.start == end
            assert tensor.start % (BITS[tensor.dtype] // 8) == 0
            end += tensor.nbytes
        assert shard.nbytes == end
    assert layout.nbytes == sum(shard.nbytes for shard in layout.shards)


def test_index_counts_bytes_and_parameters(tmp_path: Path) -> None:
    state = {"b": torch.ones(3, 4), "a": torch.ones(5, dtype=torch.bfloat16)}
    layout = lay_out(infos(state), 48)
    digests = write_whole(tmp_path, layout, state)
    path = tmp_path / "model.safetensors.index.json"
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "metadata": {"total_parameters": 17, "total_size": 58},
        "weight_map": {
            "a": "model-00002-of-00002.safetensors",
            "b": "model-00001-of-00002.safetensors",
        },
    }
    assert digests[-1] == digest(path)


@pytest.mark.parametrize("text", ["5GB", "500MB", "3KB", "1 gb", "7"])
def test_size_is_read_as_transformers_reads_it(text: str) -> None:
    expected = int(text) if text.isdigit() else parse_size_to_int(text.replace(" ", ""))
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    ("text", "size"), [("2KiB", 2048), ("1.5MiB", 1572864), ("1GIB", 2**30), (" 0.5 KB ", 500)]
)
def test_size_in_other_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "", "GB", "0", "0GB", "0.0MB", "0.5", "-5GB", "+5GB", "5 TB", "1e3MB", "five", "1.2.3GB",
        "5GB5", "5,5GB", "inf", "nan", "0x10", "9" * 400,
    ],
)  # fmt: skip
def test_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="write a size such as 5GB, 500MB or 2GiB") as caught:
        parse_size(text)
    assert str(caught.value).startswith(f"--max-shard-size {text!r}: ")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 KB"), (2e6, "2.0 MB")]
)
def test_size_is_shown(size: float, text: str) -> None:
    assert show_size(size) == text


@pytest.mark.parametrize("limit", [1, 100, 10**9])
@pytest.mark.parametrize("threads", [1, 8])
def test_pieces_in_any_order_make_the_files(threads: int, limit: int, tmp_path: Path) -> None:
    state = state_of_every_dtype()
    layout = lay_out(infos(state), limit)
    work = [(name, row) for name, tensor in state.items() for row in range(len(rows(tensor)))]
    random.Random(limit).shuffle(work)
    with CheckpointWriter(tmp_path, layout) as writer, ThreadPoolExecutor(threads) as pool:

        def write(piece: tuple[str, int]) -> None:
            name, row = piece
            writer.write(name, rows(state[name])[row : row + 1], row)

        list(pool.map(write, work))
        digests = writer.finish()
    files = [tmp_path / shard.file for shard in layout.shards]
    read = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert set(read) == set(state)
    for name, tensor in state.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
    named = files + [tmp_path / layout.index_file] * (layout.index is not None)
    assert sorted(tmp_path.iterdir()) == sorted(named)
    assert digests == [
        FileDigest(path.name, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in named
    ]
    assert all(read_header(path).metadata == {"format": "pt"} for path in files)


def test_strided_values_are_written(tmp_path: Path) -> None:
    turned = torch.arange(6.0).reshape(2, 3).t()
    write_whole(tmp_path, lay_out([TensorInfo("w", "F32", (3, 2))], 10**9), {"w": turned})
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], turned)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: whole(file, data[:7], at))
    state = {"w": torch.randn(5, 3)}
    digests = write_whole(tmp_path, lay_out(infos(state), 10**9), state)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], state["w"])
    assert digests == [digest(tmp_path / "model.safetensors")]


def test_long_writes_go_to_disk_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(writer_module, "WRITE_BACK_BYTES", 100)
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(descriptor))
    state = {"w": torch.arange(100.0)}
    with CheckpointWriter(tmp_path, lay_out(infos(state), 1 << 20)) as writer:
        for start in range(0, 100, 10):
            writer.write("w", state["w"][start : start + 10], start)
        writer.finish()
    assert len(flushed) == 4  # every third piece, and the last
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], state["w"])


def test_failure_on_the_way_to_disk_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, calls = os.fsync, iter([True])

    def fail_once(descriptor: int) -> None:
        if next(calls, False):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(writer_module, "WRITE_BACK_BYTES", 100)
    monkeypatch.setattr(os, "fsync", fail_once)
    state = {"w": torch.arange(100.0)}
    with CheckpointWriter(tmp_path, lay_out(infos(state), 1 << 20)) as writer:
        for start in range(0, 100, 50):
            writer.write("w", state["w"][start : start + 50], start)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            writer.finish()


def test_values_may_be_changed_once_written(tmp_path: Path) -> None:
    buffer = torch.ones(2, 3)
    with CheckpointWriter(tmp_path, lay_out([TensorInfo("w", "F32", (4, 3))], 10**9)) as writer:
        writer.write("w", buffer, 2)
        buffer.zero_()
        writer.write("w", buffer, 0)
        digests = writer.finish()
    assert load_file(tmp_path / "model.safetensors")["w"].sum(1).tolist() == [0, 0, 3, 3]
    assert digests == [digest(tmp_path / "model.safetensors")]


@pytest.mark.parametrize("starts", [[], [0], [2], [0, 0], [0, 2, 2]])
def test_missing_or_repeated_rows_are_an_error(starts: list[int], tmp_path: Path) -> None:
    tensors = [TensorInfo("v", "F32", (1,)), TensorInfo("w", "F32", (4, 3))]
    with CheckpointWriter(tmp_path, lay_out(tensors, 10**9)) as writer:
        writer.write("v", torch.ones(1))
        for start in starts:
            writer.write("w", torch.ones(2, 3), start)
        with pytest.raises(RuntimeError, match="not every byte was written of w"):
            writer.finish()


def test_values_of_another_dtype_are_an_error(tmp_path: Path) -> None:
    with (
        CheckpointWriter(tmp_path, lay_out([TensorInfo("w", "BF16", (2,))], 10**9)) as writer,
        pytest.raises(TypeError, match=r"w is laid out as BF16, got torch\.float16"),
    ):
        writer.write("w", torch.ones(2, dtype=torch.float16))


def test_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("mine")
    with (
        pytest.raises(FileExistsError),
        CheckpointWriter(tmp_path, lay_out([TensorInfo("w", "F32", (2,))], 10**9)),
    ):
        pass
    assert (tmp_path / "model.safetensors").read_text() == "mine"


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: os.truncate(path, path.stat().st_size - 1),
        lambda path: os.truncate(path, path.stat().st_size + 1),
        lambda path: path.write_bytes(path.read_bytes().replace(b'"w"', b'"v"')),
        lambda path: path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"')),
        lambda path: path.write_bytes(path.read_bytes().replace(b"[2,3]", b"[3,2]")),
    ],
)
def test_file_that_does_not_read_back_is_an_error(
    harm: Callable[[Path], object], tmp_path: Path
) -> None:
    with CheckpointWriter(tmp_path, lay_out([TensorInfo("w", "F32", (2, 3))], 10**9)) as writer:
        writer.write("w", torch.ones(2, 3))
        harm(tmp_path / "model.safetensors")
        with pytest.raises((RuntimeError, KeyError, SafetensorError)):
            writer.finish()


@pytest.mark.parametrize("pending", [0, 5, 10**6])
def test_digest_of_bytes_in_any_order(
    pending: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest_module, "PENDING_BYTES", pending)
    path, content = tmp_path / "file", bytes(range(100))
    path.write_bytes(content)
    for seed in range(20):
        places = [(n, min(n + 7, 100)) for n in range(0, 100, 7)] + [(3, 30), (50, 50)]
        random.Random(seed).shuffle(places)
        running = RunningDigest(path)
        for start, stop in places[seed:]:
            running.feed(start, memoryview(content[start:stop]))
        assert running.finish() == FileDigest("file", 100, hashlib.sha256(content).hexdigest())


@thorough
@given(st.lists(SHAPES, max_size=4), st.integers(1, 40))
def test_pieces_cover_every_row_once(shapes: list[tuple[int, ...]], limit: int) -> None:
    tensors = [TensorInfo(f"w{n}", "F32", shape) for n, shape in enumerate(shapes)]
    cut = list(pieces(tensors, limit))
    assert [piece.name for piece in cut] == sorted(piece.name for piece in cut)
    for tensor in tensors:
        own = [piece for piece in cut if piece.name == tensor.name]
        covered = [row for piece in own for row in range(piece.start, piece.stop)]
        assert covered == list(range(tensor.rows)) or (not tensor.elements and not covered)
        assert sum(piece.elements for piece in own) == tensor.elements
        assert all(piece.elements <= max(limit, tensor.width) for piece in own)


def test_nothing_has_no_pieces() -> None:
    assert not list(islice(pieces([TensorInfo("w", "F32", (2**62, 0))]), 3))


@pytest.fixture
def intra_op_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


THREADS = pytest.mark.parametrize("threads", [1, 4])


@THREADS
@pytest.mark.usefixtures("intra_op_threads")
def test_stream_calls_for_every_piece_once(threads: int) -> None:
    work = list(pieces([TensorInfo(name, "F32", (17, 3)) for name in "abc"], 6))
    called: list[Piece] = []
    advanced: list[int] = []
    stream(work, called.append, threads, advanced.append)
    assert sorted(called, key=work.index) == work
    assert advanced == [piece.elements for piece in work]


def double(source: Path, out: Path, layout: Layout, threads: int) -> list[FileDigest]:
    """Stream twice the source's tensors into `out`; digests of the files written and read."""
    out.mkdir()
    with open_checkpoint(source) as models, CheckpointWriter(out, layout) as writer:

        def function(piece: Piece) -> None:
            values = models.read(piece.name, piece.start, piece.stop)
            writer.write(piece.name, values * 2, piece.start)

        stream(pieces(models.infos().values(), 10), function, threads, lambda _: None)
        return writer.finish() + models.digests()


def test_stream_makes_the_same_files_at_any_thread_count(tmp_path: Path) -> None:
    state = {f"w{n}": torch.randn(n + 3, 5) for n in range(9)}
    layout = lay_out(infos(state), 200)
    written = write_whole(tmp_path, layout, state)
    one = double(tmp_path, tmp_path / "one", layout, 1)
    assert one == double(tmp_path, tmp_path / "four", layout, 4)
    assert one[len(written) :] == written[:-1]
    with open_checkpoint(tmp_path / "four") as doubled:
        assert all(torch.equal(doubled[name], 2 * state[name]) for name in state)


@THREADS
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.usefixtures("intra_op_threads")
def test_stream_stops_at_the_first_error(threads: int, error: type[BaseException]) -> None:
    started: list[int] = []

    def fail(piece: Piece) -> None:
        started.append(piece.start)
        if piece.start in (3, 5):
            raise error(f"row {piece.start}")

    with pytest.raises(error, match="row 3"):
        stream(pieces([TensorInfo("w", "F32", (1000,))], 1), fail, threads, lambda _: None)
    assert max(started) <= 3 + 2 * threads


@THREADS
def test_stream_holds_few_pieces_at_once(threads: int) -> None:
    done: list[int] = []
    ahead: list[int] = []

    def work() -> Iterator[Piece]:
        for number, piece in enumerate(pieces([TensorInfo("w", "F32", (100,))], 1)):
            ahead.append(number - len(done))
            yield piece

    stream(work(), lambda piece: None, threads, done.append)
    assert len(done) == 100
    assert max(ahead) <= 2 * threads


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_a_full_disk_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    state = {"a": torch.ones(3)}
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match=r"model\.safetensors") as told:
        write_whole(tmp_path, lay_out(infos(state), parse_size("5GB")), state)
    assert told.value.filename == str(tmp_path / "model.safetensors")
