"""Headers: safetensors reads ours, we read its own, and every hostile file is refused by name."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fishertool.checkpoint.dtypes import TORCH, as_bytes
from fishertool.checkpoint.header import (
    MAX_HEADER_BYTES,
    Header,
    TensorInfo,
    encode_header,
    read_header,
)
from fishertool.errors import InputError

NAMES = st.text(st.characters(exclude_categories=["C"]), min_size=1).filter(
    lambda name: name != "__metadata__"
)
METADATA = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), NAMES, max_size=3)
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
TENSORS = st.dictionaries(
    NAMES, st.tuples(st.sampled_from(sorted(TORCH)), SHAPES), min_size=1, max_size=6
)
thorough = settings(deadline=None, database=None, max_examples=60)


def raw(header: Any, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


def one(**changes: Any) -> bytes:
    return raw({"w": entry(**changes)})


def nothing(**changes: Any) -> bytes:
    return raw({"w": entry(data_offsets=[0, 0], **changes)}, b"")


def two(first: tuple[int, int], second: tuple[int, int]) -> bytes:
    places = {"v": first, "w": second}
    return raw(
        {
            name: {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]}
            for name, (start, stop) in places.items()
        }
    )


def random_tensor(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    size = TensorInfo("", dtype, shape).nbytes
    bits = torch.randint(0, 2, (size,), dtype=torch.uint8)
    return bits.view(TORCH[dtype]).reshape(shape)


GOOD = one()

BROKEN = {
    "empty": (b"", "truncated.*0 bytes.*fetch it again"),
    "no room for the length": (GOOD[:7], "truncated.*7 bytes.*fetch it again"),
    "header longer than the file": (GOOD[:20], "truncated.*20 bytes.*fetch it again"),
    "length of 2**64 - 1": (b"\xff" * 8 + GOOD[8:], "truncated.*fetch it again"),
    "data cut": (GOOD[:-1], "truncated; fetch it again"),
    "trailing bytes": (GOOD + b"\0", "has bytes no tensor accounts for"),
    "no header": (raw(b""), "not valid JSON"),
    "not JSON": (raw(b"{"), "not valid JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not valid JSON"),
    "nesting bomb": (raw(b'{"w":' + b"[" * 100_000), "not valid JSON"),
    "integer of 5000 digits": (raw(b'{"w":' + b"9" * 5000 + b"}"), "not valid JSON"),
    "array": (raw([]), "not a JSON object"),
    "number": (raw(3), "not a JSON object"),
    "tensor twice": (
        raw(b'{"w":%b,"w":%b}' % ((json.dumps(entry()).encode(),) * 2)),
        "duplicate key 'w'",
    ),
    "dtype twice": (
        raw(b'{"w":{"dtype":"U8","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
        "duplicate key 'dtype'",
    ),
    "metadata not an object": (raw({"__metadata__": ["a"], "w": entry()}), "__metadata__"),
    "metadata not text": (raw({"__metadata__": {"a": 1}, "w": entry()}), "__metadata__"),
    "empty name": (raw({"": entry()}), "tensor name '' is empty"),
    "newline in a name": (raw({"a\nb": entry()}), r"tensor name 'a\\nb'.*control"),
    "escape in a name": (raw({"a\x1b[2J": entry()}), r"tensor name 'a\\x1b\[2J'.*control"),
    "text direction in a name": (raw({"a\u202eb": entry()}), r"tensor name 'a\\u202eb'.*control"),
    "surrogate in a name": (raw({"a\ud800": entry()}), r"tensor name 'a\\ud800'.*control"),
    "entry not an object": (raw({"w": 3}), "tensor w: its entry must have dtype"),
    "entry lacks a key": (raw({"w": {"dtype": "F32", "shape": [2]}}), "tensor w: .*data_offsets"),
    "entry has another key": (one(device="cpu"), "tensor w: its entry must have dtype"),
    "unknown dtype": (one(dtype="F12"), "tensor w: unknown dtype 'F12'.*known: .*BF16"),
    "lower-case dtype": (one(dtype="f32"), "tensor w: unknown dtype 'f32'"),
    "dtype not text": (one(dtype=[1]), r"tensor w: unknown dtype \[1\]"),
    "shape not a list": (one(shape=2), "tensor w: shape and data_offsets must be lists"),
    "dimension negative": (one(shape=[-2]), "tensor w: .*non-negative"),
    "dimensions negative twice": (one(shape=[-2, -1]), "tensor w: .*non-negative"),
    "dimension a float": (one(shape=[2.0]), "tensor w: .*non-negative integers"),
    "dimension a bool": (one(shape=[2, True]), "tensor w: .*non-negative integers"),
    "dimension text": (one(shape=["2"]), "tensor w: .*non-negative integers"),
    "dimension huge": (one(shape=[2**62]), f"tensor w: .*{2**62}"),
    "dimension that wraps around": (one(shape=[2**63, 2, 2**63, 2]), "tensor w"),
    "dimension beyond 64 bits": (nothing(shape=[0, 2**70]), "tensor w"),
    "product beyond 64 bits, of nothing": (nothing(shape=[2**40, 2**40, 0]), "tensor w"),
    "bytes beyond 64 bits, of nothing": (nothing(shape=[2**61, 0]), "tensor w: .*beyond any"),
    "size of 6000 digits": (one(shape=[2**62] * 320), "tensor w"),
    "offset negative": (one(data_offsets=[-8, 0]), "tensor w: .*non-negative"),
    "offset a float": (one(data_offsets=[0, 8.0]), "tensor w: .*non-negative integers"),
    "offset a bool": (one(data_offsets=[False, 8]), "tensor w: .*non-negative integers"),
    "one offset": (one(data_offsets=[8]), "tensor w: "),
    "three offsets": (one(data_offsets=[0, 8, 8]), "tensor w: "),
    "offsets reversed": (one(data_offsets=[8, 0]), r"tensor w: F32 \[2\] needs 8 bytes.*hold -8"),
    "too few bytes for the shape": (
        one(shape=[3]),
        r"tensor w: F32 \[3\] needs 12 bytes, its offsets hold 8",
    ),
    "too many bytes for the shape": (
        one(shape=[]),
        r"tensor w: F32 \[\] needs 4 bytes, its offsets hold 8",
    ),
    "offset out of the file": (one(data_offsets=[2**40, 2**40 + 8]), "tensor w leaves a gap"),
    "odd count of half bytes": (one(dtype="F4", shape=[15]), r"tensor w: F4 \[15\]"),
    "odd count of half bytes, rounded up": (one(dtype="F4", shape=[17]), r"tensor w: F4 \[17\]"),
    "six bits that fill no byte": (one(dtype="F6_E2M3", shape=[11]), r"tensor w: F6_E2M3 \[11\]"),
    "overlap": (two((0, 5), (4, 8)), "tensor w overlaps"),
    "one inside another": (two((0, 8), (2, 4)), "tensor w overlaps"),
    "the same bytes twice": (two((0, 8), (0, 8)), "tensor w overlaps"),
    "empty tensor inside another": (two((0, 8), (4, 4)), "tensor w overlaps"),
    "gap": (two((0, 3), (4, 8)), "tensor w leaves a gap"),
    "gap at the start": (two((1, 3), (3, 8)), "tensor v leaves a gap"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_file_is_refused(kind: str, tmp_path: Path) -> None:
    content, message = BROKEN[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as refusal:
        read_header(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert re.search(r"[\x00-\x1f]", str(refusal.value)) is None
    assert refusal.value.exit_code == 3


def test_the_good_file_the_broken_ones_are_made_from(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD)
    start = len(GOOD) - 8
    assert read_header(path) == Header({"w": TensorInfo("w", "F32", (2,), start)}, {}, start)


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_what_is_not_a_regular_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    if kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(InputError, match=re.escape(f"{path}: not a regular file")):
        read_header(path)


def test_header_over_the_cap_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
    os.truncate(path, MAX_HEADER_BYTES + 9)
    with pytest.raises(InputError, match=f"{MAX_HEADER_BYTES + 1} bytes.*{MAX_HEADER_BYTES} all"):
        read_header(path)


CAP = "fishertool.checkpoint.header.MAX_HEADER_BYTES"


def test_cap_is_inclusive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD)
    cap = len(GOOD) - 16
    monkeypatch.setattr(CAP, cap)
    assert "w" in read_header(path).tensors
    monkeypatch.setattr(CAP, cap - 1)
    with pytest.raises(InputError, match=f"has {cap} bytes, more than the {cap - 1} allowed"):
        read_header(path)


def test_half_bytes_that_fill_bytes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(one(dtype="F4", shape=[2, 8]))
    assert read_header(path).tensors["w"].nbytes == 8


def test_empty_tensor_may_start_where_another_does(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(two((0, 8), (0, 0)))
    assert {name: info.nbytes for name, info in read_header(path).tensors.items()} == {
        name: len(found["data"])
        for name, found in safetensors.deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    }


@thorough
@given(TENSORS, METADATA)
def test_safetensors_reads_an_encoded_header(
    tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    infos = [TensorInfo(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
    header, end = encode_header(infos, metadata), 0
    data = torch.randint(0, 2, (sum(info.nbytes for info in infos),), dtype=torch.uint8)
    read = dict(safetensors.deserialize(header + bytes(data.tolist())))  # type: ignore[no-untyped-call]
    assert set(read) == set(tensors)
    for info in infos:
        found, stop = read[info.name], end + info.nbytes
        assert (found["dtype"], tuple(found["shape"])) == (info.dtype, info.shape)
        assert bytes(found["data"]) == bytes(data[end:stop].tolist())
        end = stop


@thorough
@given(TENSORS, METADATA)
def test_header_that_safetensors_wrote_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, tuple[str, tuple[int, ...]]],
    metadata: dict[str, str],
) -> None:
    values = {name: random_tensor(*kind) for name, kind in tensors.items()}
    path = tmp_path_factory.getbasetemp() / "written.safetensors"
    save_file(values, path, metadata)
    header, content = read_header(path), path.read_bytes()
    assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == tensors
    assert header.metadata == metadata
    for name, info in header.tensors.items():
        assert content[info.start : info.start + info.nbytes] == bytes(as_bytes(values[name]))


@thorough
@given(TENSORS, METADATA)
def test_encoded_header_is_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, tuple[str, tuple[int, ...]]],
    metadata: dict[str, str],
) -> None:
    infos = [TensorInfo(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
    encoded = encode_header(infos, metadata)
    path = tmp_path_factory.getbasetemp() / "encoded.safetensors"
    path.write_bytes(encoded + bytes(sum(info.nbytes for info in infos)))
    header, end = read_header(path), len(encoded)
    assert len(encoded) % 8 == 0
    assert (header.nbytes, header.metadata, list(header.tensors)) == (end, metadata, list(tensors))
    for info in infos:
        assert header.tensors[info.name] == TensorInfo(info.name, info.dtype, info.shape, end)
        end += info.nbytes


@pytest.mark.parametrize(
    ("shape", "elements", "rows", "width"),
    [((), 1, 1, 1), ((5,), 5, 5, 1), ((3, 4), 12, 3, 4), ((2, 3, 4), 24, 6, 4), ((0, 4), 0, 0, 4)],
)
def test_rows_and_width(shape: tuple[int, ...], elements: int, rows: int, width: int) -> None:
    info = TensorInfo("w", "BF16", shape)
    assert (info.elements, info.rows, info.width) == (elements, rows, width)
    assert info.nbytes == 2 * elements
    assert str(info) == f"BF16 {list(shape)}"


def test_hostile_sizes_are_refused_at_once(tmp_path: Path) -> None:
    """Each would take hours if it were looked at pair by pair, or multiplied out."""
    names = ",".join(f'"{number}":1' for number in range(60_000))
    shape = ",".join(["9"] * 200_000)
    entry = f'{{"dtype":"F32","shape":[{shape}],"data_offsets":[0,4]}}'
    for text in (f'{{{names},"59999":1}}', f'{{"w":{entry}}}'):
        path = tmp_path / "model.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text.encode())
        with pytest.raises(InputError):
            read_header(path)
