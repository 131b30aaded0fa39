"""The reader: the same tensors as safetensors, no byte more than asked for, nothing taken on trust."""

import hashlib
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from fishertool.checkpoint import digest as digest_module
from fishertool.checkpoint.dtypes import TORCH
from fishertool.checkpoint.header import TensorInfo, encode_header
from fishertool.checkpoint.reader import Checkpoint, open_checkpoint
from fishertool.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHAPES: list[tuple[int, ...]] = [
    (), (1,), (7,), (3, 5), (2, 3, 4), (2, 1, 3, 2), (0,), (0, 4), (4, 0), (2, 0, 3), (63, 2),
]  # fmt: skip


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def save(folder: Path, tensors: dict[str, Tensor], file: str = SINGLE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / file, {"format": "pt"})
    return folder


def save_sharded(folder: Path, tensors: dict[str, Tensor], max_bytes: int) -> Path:
    folder.mkdir(parents=True)
    save_torch_state_dict(tensors, folder, max_shard_size=max_bytes)
    assert (folder / INDEX).exists()
    return folder


def refusal(folder: Path, match: str | None = None) -> str:
    with pytest.raises(InputError, match=match) as caught:
        open_checkpoint(folder).close()
    assert str(folder) in str(caught.value)
    assert caught.value.exit_code == 3
    return str(caught.value)


def model_state() -> dict[str, Tensor]:
    return {f"layer.{n}.weight": noise(n, 4, n + 1) for n in range(12)}


def counted(monkeypatch: pytest.MonkeyPatch, most: int = sys.maxsize) -> list[int]:
    """Sizes of all positioned reads from here on, none of them above `most` bytes."""
    sizes: list[int] = []

    def preadv(file: int, buffers: list[memoryview], offset: int) -> int:
        data = os.pread(file, min(most, len(buffers[0])), offset)
        buffers[0][: len(data)] = data
        sizes.append(len(data))
        return len(data)

    monkeypatch.setattr(os, "preadv", preadv)
    return sizes


@pytest.mark.parametrize("dtype", TORCH)
def test_every_dtype_is_read_as_safetensors_reads_it(dtype: str, tmp_path: Path) -> None:
    size = 6 * torch.empty((), dtype=TORCH[dtype]).element_size()
    high = 2 if dtype == "BOOL" else 256
    bits = torch.randint(high, (size,), generator=torch.Generator().manual_seed(1))
    tensor = bits.to(torch.uint8).view(TORCH[dtype]).reshape(2, 3)
    with open_checkpoint(save(tmp_path, {"w": tensor})) as checkpoint:
        ours, theirs = checkpoint["w"], load_file(tmp_path / SINGLE)["w"]
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) == (TORCH[dtype], (2, 3))
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_slices_of_the_reshaped_tensor(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = {"before": noise(1, 3), "w": noise(2, *shape), "x": noise(3, 2, 2)}
    with open_checkpoint(save(tmp_path, tensors)) as checkpoint:
        rows = checkpoint.info("w").rows
        assert rows == math.prod(shape[:-1] or shape)
        expected = tensors["w"].reshape(rows, *shape[1:][-1:])
        for start in range(0, rows + 1, max(1, rows // 7)):
            for stop in range(start, rows + 1, max(1, rows // 5)):
                assert torch.equal(checkpoint.read("w", start, stop), expected[start:stop])
        assert torch.equal(checkpoint.read("w"), expected)
        assert torch.equal(checkpoint["w"], tensors["w"])


def test_only_the_bytes_asked_for_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": noise(0, 1000, 8), "b": noise(1, 2, 5, 3).to(torch.bfloat16)}
    save_sharded(tmp_path / "model", tensors, 100)
    sizes = counted(monkeypatch)
    with open_checkpoint(tmp_path / "model") as checkpoint:
        assert checkpoint.infos()["a"].shape == (1000, 8)
        assert sizes == []
        checkpoint.read("a", 10, 13)
        assert sum(sizes) == 3 * 8 * 4
        checkpoint.read("b", 2, 9)
        assert sum(sizes) == 3 * 8 * 4 + 7 * 3 * 2


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = noise(0, 5, 3)
    save(tmp_path, {"w": tensor})
    counted(monkeypatch, most=7)
    with open_checkpoint(tmp_path) as checkpoint:
        assert torch.equal(checkpoint["w"], tensor)


def test_file_cut_while_open_is_refused(tmp_path: Path) -> None:
    with open_checkpoint(save(tmp_path, {"w": noise(0, 5, 3)})) as checkpoint:
        os.truncate(tmp_path / SINGLE, (tmp_path / SINGLE).stat().st_size - 1)
        with pytest.raises(InputError, match=re.escape(f"{tmp_path / SINGLE}: truncated")):
            checkpoint["w"]


def test_dtype_that_torch_lacks_is_refused_when_read(tmp_path: Path) -> None:
    info = TensorInfo("w", "F6_E2M3", (4,))
    (tmp_path / SINGLE).write_bytes(encode_header([info], {}) + bytes(3))
    with (
        open_checkpoint(tmp_path) as checkpoint,
        pytest.raises(InputError, match=re.escape(f"{tmp_path / SINGLE}: tensor w: F6_E2M3")),
    ):
        checkpoint["w"]


def test_names_come_in_file_order(tmp_path: Path) -> None:
    infos = [TensorInfo(name, "U8", (1,)) for name in ("z", "m", "a", "k")]
    for file, part in {"b": infos[:2], "a": infos[2:]}.items():
        content = encode_header(part, {"format": "pt"}) + bytes(2)
        (tmp_path / f"{file}.safetensors").write_bytes(content)
    weight_map = {"a": "a", "k": "a", "m": "b", "z": "b"}
    write_index(tmp_path, {name: f"{file}.safetensors" for name, file in weight_map.items()})
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint) == list(checkpoint.infos()) == ["a", "k", "z", "m"]
        assert len(checkpoint) == 4
        assert "z" in checkpoint
        assert "y" not in checkpoint
        assert checkpoint.where("z") == f"{tmp_path / 'b.safetensors'}: tensor z"
        assert checkpoint.metadata == {"format": "pt"}


def test_shards_and_one_file_hold_the_same(tmp_path: Path) -> None:
    state = model_state()
    single = save(tmp_path / "single", state)
    sharded = save_sharded(tmp_path / "sharded", state, 200)
    with open_checkpoint(single) as one, open_checkpoint(sharded) as many:
        assert len(many.shards) > 3
        assert set(one) == set(many) == set(state)
        for name, tensor in state.items():
            assert torch.equal(one[name], tensor)
            assert torch.equal(many[name], tensor)
        assert one.fingerprint() == many.fingerprint()


def shifted(state: dict[str, Tensor], name: str, index: int) -> dict[str, Tensor]:
    changed = state[name].clone()
    changed.view(-1)[index] += 1
    return state | {name: changed}


CHANGES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "first weight of a small tensor": lambda state: shifted(state, "small", 0),
    "last weight of a small tensor": lambda state: shifted(state, "small", -1),
    "middle weight of a large tensor": lambda state: shifted(state, "large", 2000),
    "all weights": lambda state: {name: tensor + 1 for name, tensor in state.items()},
    "name": lambda state: {"tiny": state["small"], "large": state["large"]},
    "shape": lambda state: state | {"small": state["small"].reshape(8, 4)},
    "dtype": lambda state: state | {"small": state["small"].view(torch.int32)},
    "one tensor more": lambda state: state | {"more": noise(9, 1)},
    "one tensor less": lambda state: {"small": state["small"]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_fingerprint_changes_with(change: str, tmp_path: Path) -> None:
    state = {"small": noise(0, 4, 8), "large": noise(1, 40, 100)}
    save(tmp_path / "before", state)
    save(tmp_path / "after", CHANGES[change](state))
    with (
        open_checkpoint(tmp_path / "before") as before,
        open_checkpoint(tmp_path / "after") as after,
    ):
        assert before.fingerprint() != after.fingerprint()


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


@pytest.mark.parametrize(
    "file",
    [
        "../outside.safetensors", "sub/inside.safetensors", "./here.safetensors", "/", "..", "",
        "..\\outside.safetensors", "C:\\outside.safetensors", "C:outside.safetensors",
        "\\\\server\\share\\outside.safetensors", "pytorch_model.bin", "model.safetensors.bin",
        "here.safetensors/", "ABSOLUTE", 3, None, ["model.safetensors"],
    ],
)  # fmt: skip
def test_index_may_name_only_files_beside_it(file: Any, tmp_path: Path) -> None:
    if file == "ABSOLUTE":
        file = str(tmp_path / "absolute.safetensors")
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    if isinstance(file, str) and file.strip("./"):
        save(tmp_path / "made", {"w": noise(0, 2)})
        shutil.copyfile(tmp_path / "made" / SINGLE, folder / file.rstrip("/"))
    write_index(folder, {"w": file})
    message = refusal(folder, "only plain .safetensors file names in the same folder are read")
    assert message.startswith(f"{folder / INDEX}: tensor w is said to be in {file!r}; ")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "not a JSON object"),
        ("{}", "weight_map must map"),
        ('{"weight_map": {}}', "weight_map must map"),
        ('{"weight_map": null}', "weight_map must map"),
        ('{"weight_map": ["a.safetensors"]}', "weight_map must map"),
        ('{"weight_map": "a.safetensors"}', "weight_map must map"),
        ('{"weight_map": {"w": "missing.safetensors"}}', "names missing.safetensors.*fetch it"),
        ('{"weight_map": {"w": "a.safetensors"}}', "does not name v in a.safetensors"),
        ('{"weight_map": {"v": "a.safetensors", "x": "a.safetensors"}}', "tensor x is not in a.s"),
        ('{"weight_map": {"v": "a.safetensors", "w": "c.safetensors"}}', "tensor w is not in c.s"),
        ('{"weight_map": {"v": "a.safetensors", "w": "b.safetensors"}}', "tensor v is also in a.s"),
        ('{"weight_map": {"u": "b.safetensors", "w": "b.safetensors"}}', "tensor u is not in b.s"),
    ],
)
def test_index_that_does_not_fit_its_shards_is_refused(
    index: str, message: str, tmp_path: Path
) -> None:
    save(tmp_path, {"v": noise(0, 2), "w": noise(1, 2)}, "a.safetensors")
    save(tmp_path, {"v": noise(0, 2), "x": noise(1, 2)}, "b.safetensors")
    save(tmp_path, {"y": noise(0, 2)}, "c.safetensors")
    (tmp_path / INDEX).write_text(index, encoding="utf-8")
    assert refusal(tmp_path, message).startswith(f"{tmp_path}{os.sep}")


@pytest.mark.parametrize(
    "weight_map",
    [
        {"\x1b[2J": "../a.safetensors"},
        {"\x1b[2J": "a.safetensors"},
        {"v": "\x1b.safetensors"},
    ],
)
def test_refusal_of_an_index_shows_no_control_characters(
    weight_map: dict[str, str], tmp_path: Path
) -> None:
    save(tmp_path, {"v": noise(0, 2)}, "a.safetensors")
    write_index(tmp_path, weight_map)
    assert "\x1b" not in refusal(tmp_path)


def test_one_file_beside_an_index_is_refused(tmp_path: Path) -> None:
    save(tmp_path, {"w": noise(0, 2)})
    write_index(tmp_path, {"w": SINGLE})
    assert refusal(tmp_path, f"both {SINGLE} and {INDEX}; remove the one that is stale")


def test_shard_with_a_broken_header_is_named(tmp_path: Path) -> None:
    save(tmp_path, {"w": noise(0, 2)}, "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"{}")
    write_index(tmp_path, {"w": "a.safetensors", "x": "b.safetensors"})
    assert refusal(tmp_path).startswith(f"{tmp_path / 'b.safetensors'}: truncated")


def test_file_without_tensors_is_refused(tmp_path: Path) -> None:
    assert refusal(save(tmp_path, {}), f"{SINGLE}: holds no tensors")


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_what_is_not_a_file_is_refused_by_its_own_name(kind: str, tmp_path: Path) -> None:
    if kind == "folder":
        (tmp_path / SINGLE).mkdir()
    else:
        os.mkfifo(tmp_path / SINGLE)
    assert refusal(tmp_path).startswith(f"{tmp_path / SINGLE}: ")


def test_link_inside_the_folder_is_read(tmp_path: Path) -> None:
    save(tmp_path, {"w": noise(0, 2)}, "weights.safetensors")
    (tmp_path / SINGLE).symlink_to("weights.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert torch.equal(checkpoint["w"], noise(0, 2))


@pytest.mark.parametrize("name", [SINGLE, INDEX, "a.safetensors"])
def test_link_out_of_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "model"
    save(folder, {"w": noise(0, 2)}, SINGLE if name == SINGLE else "a.safetensors")
    if name != SINGLE:
        write_index(folder, {"w": "a.safetensors"})
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    assert refusal(folder, "links out of its folder; copy").startswith(f"{folder / name}: ")


def cached(root: Path, target: str) -> Path:
    """A snapshot as the Hub cache lays it out, with weights that link to `target`."""
    snapshot = root / "models--org--x" / "snapshots" / "rev"
    snapshot.mkdir(parents=True)
    (root / "models--org--x" / "blobs").mkdir()
    (snapshot / SINGLE).symlink_to(target)
    save((snapshot / target).resolve().parent, {"w": noise(0, 2)}, Path(target).name)
    return snapshot


def test_snapshot_of_the_hub_cache_is_read(tmp_path: Path) -> None:
    with open_checkpoint(cached(tmp_path, "../../blobs/abc")) as checkpoint:
        assert torch.equal(checkpoint["w"], noise(0, 2))


@pytest.mark.parametrize(
    "target", ["../../../blobs/abc", "../other/abc", "../../refs/abc", "../../blobs/../../abc"]
)
def test_snapshot_that_links_past_the_blobs_is_refused(target: str, tmp_path: Path) -> None:
    assert refusal(cached(tmp_path, target), "links out of its folder")


def test_missing_and_empty_folders_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent", "no such folder")
    assert refusal(tmp_path, f"no {SINGLE} in it; give the folder of a model$")
    (tmp_path / "file").touch()
    assert refusal(tmp_path / "file", "no such folder")


def test_folders_of_other_things_are_told_by_what_they_hold(tmp_path: Path) -> None:
    save_file({"w": noise(0, 2)}, tmp_path / "diagonal.safetensors")
    assert refusal(tmp_path, "in it, but diagonal.safetensors; give the folder of a model$")
    save_file({"w": noise(0, 2)}, tmp_path / "adapter_model.safetensors")
    assert refusal(tmp_path, "an adapter is merged into its own by fishertool merge BASE.ADAPTER$")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b'{"architectures": [5]}', "architectures must be a list of names"),
        (b'{"architectures": {"a": 1}}', "architectures must be a list of names"),
        (None, "missing; a checkpoint is a folder with a config.json"),
    ],
)
def test_config_that_cannot_be_used_is_refused(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with (
        open_checkpoint(save(tmp_path, {"w": noise(0, 2)})) as checkpoint,
        pytest.raises(InputError, match=message) as caught,
    ):
        checkpoint.config()
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")


def test_config_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with open_checkpoint(save(tmp_path, {"w": noise(0, 2)})) as checkpoint:
        assert checkpoint.config() == {"model_type": "bert"}


def conversion(folder: Path) -> str:
    message = refusal(folder, "pickled weights can run code and are not read; convert them: python")
    return message.split("convert them: python ", 1)[1]


def pickle(folder: Path, state: Any, file: str = "pytorch_model.bin") -> None:
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / file)


def pickle_tied(folder: Path) -> dict[str, Tensor]:
    state = {"embed": noise(0, 4, 3)}
    state |= {"head": state["embed"], "turned": state["embed"].t(), "row": state["embed"][1]}
    pickle(folder, state)
    return state


def pickle_training(folder: Path) -> dict[str, Tensor]:
    state = {"w": noise(0, 4, 3)}
    pickle(folder, state)
    pickle(folder, {"state": {}, "param_groups": [{"lr": 0.1}]}, "optimizer.pt")
    pickle(folder, {"last_epoch": 3}, "scheduler.pt")
    pickle(folder, {"lr": 0.1}, "training_args.bin")
    return state


def pickle_shards(folder: Path) -> dict[str, Tensor]:
    state = {"v": noise(0, 4, 3), "w": noise(1, 2)}
    files = {name: f"pytorch_model-0000{n}-of-00002.bin" for n, name in enumerate(state, start=1)}
    for name, file in files.items():
        pickle(folder, {name: state[name]}, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    return state


@pytest.mark.parametrize("make", [pickle_tied, pickle_training, pickle_shards])
def test_pickles_are_refused_with_a_command_that_converts_them(
    make: Callable[[Path], dict[str, Tensor]], tmp_path: Path
) -> None:
    state = make(tmp_path)
    command = f"{shlex.quote(sys.executable)} {conversion(tmp_path)}"
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint) == set(state)
        for name, tensor in state.items():
            assert torch.equal(checkpoint[name], tensor)


@pytest.mark.parametrize("name", ["$(touch ran).bin", '"; touch ran; ".bin', "`touch ran`.bin"])
def test_name_of_a_pickle_cannot_become_a_command(name: str, tmp_path: Path) -> None:
    pickle(tmp_path, {}, name)
    message = refusal(tmp_path, "pickled weights can run code")
    command = message.partition("convert them: python ")[2]
    subprocess.run(f"true {command}", shell=True, cwd=tmp_path, check=False)
    assert not (tmp_path / "ran").exists()


def in_order(checkpoint: Checkpoint) -> None:
    for name in checkpoint:
        checkpoint.read(name, 0, 2)
        checkpoint.read(name, 2)


def backwards(checkpoint: Checkpoint) -> None:
    for name in reversed(list(checkpoint)):
        checkpoint.read(name, 2)
        checkpoint.read(name, 0, 2)


def overlapping(checkpoint: Checkpoint) -> None:
    checkpoint.fingerprint()
    for name in checkpoint:
        checkpoint.read(name, 1, 3)
        checkpoint.read(name, 0, 2)
        checkpoint.read(name, 0, 0)
        checkpoint.read(name)


def threaded(checkpoint: Checkpoint) -> None:
    work = [(name, row) for name in checkpoint for row in range(4)]
    random.Random(0).shuffle(work)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda piece: checkpoint.read(piece[0], piece[1], piece[1] + 1), work))


def changed_in_place(checkpoint: Checkpoint) -> None:
    for name in reversed(list(checkpoint)):
        checkpoint.read(name).mul_(2)


@pytest.mark.parametrize("pending", [0, 100, digest_module.PENDING_BYTES])
@pytest.mark.parametrize(
    "access", [list, in_order, backwards, overlapping, threaded, changed_in_place]
)
def test_digests_are_those_of_the_files(
    access: Callable[[Checkpoint], object],
    pending: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(digest_module, "PENDING_BYTES", pending)
    folder = save_sharded(tmp_path / "model", model_state(), 400)
    with open_checkpoint(folder) as checkpoint:
        access(checkpoint)
        digests = checkpoint.digests()
        assert digests == checkpoint.digests()
    files = sorted(folder.glob("*.safetensors"))
    contents = [path.read_bytes() for path in files]
    assert [digest.file for digest in digests] == [path.name for path in files]
    assert [digest.bytes for digest in digests] == list(map(len, contents))
    assert [digest.sha256 for digest in digests] == [
        hashlib.sha256(content).hexdigest() for content in contents
    ]


@pytest.mark.parametrize("access", [in_order, backwards, threaded])
def test_digest_of_what_was_read_reads_nothing_again(
    access: Callable[[Checkpoint], object], tmp_path: Path
) -> None:
    path = save(tmp_path, model_state()) / SINGLE
    content = path.read_bytes()
    with open_checkpoint(tmp_path) as checkpoint:
        access(checkpoint)
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        path.write_bytes(bytes(len(content)))
        os.utime(path, ns=times)  # or it would be refused
        assert checkpoint.digests()[0].sha256 == hashlib.sha256(content).hexdigest()
