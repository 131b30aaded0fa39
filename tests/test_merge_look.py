"""Passes over tensors of more than one piece, which the threads share."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from merge_driver import PACKAGE, merge, random
from safetensors.torch import load_file, save_file

from fishertool.checkpoint.stream import PIECE_ELEMENTS
from fishertool.registry import find_method, method_names
from fishertool.surgery.merge_look import GROUP_TENSORS

ROWS, WIDTH = PIECE_ELEMENTS // 900 + 7, 1000
MANY = {f"b{number:03}": (3, 4) for number in range(2 * GROUP_TENSORS)}
SHAPES = {"a": (ROWS, WIDTH), **MANY, "c": (ROWS, WIDTH), "d": (ROWS * WIDTH,)}


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / name, seed) for seed, name in enumerate(("base", "one", "two"))]


def write(folder: Path, seed: int, shapes: Mapping[str, Sequence[int]] = SHAPES) -> Path:
    folder.mkdir()
    tensors = {
        name: random(*shape, seed=10 * seed + number)
        for number, (name, shape) in enumerate(shapes.items())
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("ties", {"density": 0.3, "rescale": True}),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.1}),
    ("sce", {"select_topk": 0.2}),
]


@pytest.mark.parametrize(("method", "settings"), SETTINGS, ids=[name for name, _ in SETTINGS])
def test_threads_share_the_passes_of_many_tensors(
    cli: Cli, models: list[Path], method: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    flags = [f"--set={name}={value}" for name, value in settings.items()]
    if method != "sce":  # which finds its own
        flags.append("--weights=0.6,0.4")
    command = ("merge", *models[1:], "--method", method, "--base", models[0], *flags, "-q")
    for threads in (1, 3):
        assert cli(*command, "--threads", threads, "--out", f"o{threads}").code == 0
    files = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("o1", "o3")]
    assert files[0] == files[1]
    base, *both = (load_file(folder / "model.safetensors") for folder in models)
    merged = load_file(tmp_path / "o1" / "model.safetensors")
    for name in SHAPES:
        expected = merge(method, [one[name] for one in both], [0.6, 0.4], base[name], **settings)
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("density", [0.3, 1.0])  # with 1 there are no passes
@pytest.mark.parametrize("spoilt", [0, 2])
def test_a_nan_is_found_with_passes_and_without(
    cli: Cli, models: list[Path], density: float, spoilt: int, tmp_path: Path
) -> None:
    path = models[spoilt] / "model.safetensors"
    tensors = load_file(path)
    tensors["c"][ROWS - 1, 5] = torch.nan
    save_file(tensors, path)
    command = ("merge", *models[1:], "--method", "ties", "--base", models[0], "--out", "o")
    result = cli(*command, f"--set=density={density}")
    assert result.code == 3 and "tensor c: has NaN or Inf" in result.err
    assert not (tmp_path / "o").exists()


LONG = PIECE_ELEMENTS + 1000


@pytest.fixture
def vectors(tmp_path: Path) -> list[Path]:
    """A base and two models of one long vector, which differ more in its second half."""
    folders = [write(tmp_path / name, seed, {"v": (LONG,)}) for seed, name in enumerate("bxy")]
    for seed, folder in enumerate(folders[1:], start=1):
        values = load_file(folders[0] / "model.safetensors")["v"] + 1e-3 * random(LONG, seed=3)
        values[LONG // 2 :] += random(LONG - LONG // 2, seed=seed)
        save_file({"v": values}, folder / "model.safetensors")
    return folders


@pytest.mark.parametrize(
    ("method", "setting", "value"),
    [("nuslerp", "nuslerp_flatten", "false"), ("model-stock", "filter_wise", "true")],
)
def test_a_vector_is_one_row(
    cli: Cli, vectors: list[Path], method: str, setting: str, value: str, tmp_path: Path
) -> None:
    flags = ("--base", vectors[0], "--method", method, "--set", f"{setting}={value}")
    assert cli("merge", *vectors[1:], *flags, "--out", "o", "-q").code == 0
    base, *both = (load_file(folder / "model.safetensors")["v"] for folder in vectors)
    settings: dict[str, Any] = {setting: value}
    expected = merge(method, both, [0.5, 0.5], base, **settings)
    merged = load_file(tmp_path / "o" / "model.safetensors")["v"]
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["della", "della-linear"])
def test_ranks_are_those_of_a_whole_vector(
    cli: Cli, vectors: list[Path], method: str, tmp_path: Path
) -> None:
    settings = ("--set=density=0.5", "--set=epsilon=0.49", "--weights=1,0")
    command = ("merge", *vectors[1:], "--base", vectors[0], "--method", method, *settings)
    assert cli(*command, "--out", "o", "-q").code == 0
    base, merged = (
        load_file(folder / "model.safetensors")["v"] for folder in (vectors[0], tmp_path / "o")
    )
    small, large = (merged != base).float().tensor_split([LONG // 2])
    assert abs(float(small.mean()) - 0.255) < 0.01
    assert abs(float(large.mean()) - 0.745) < 0.01


METHODS = [name for name in method_names(PACKAGE) if name not in ("fisher", "regmean", "kronecker")]


@pytest.mark.parametrize("name", METHODS)
def test_a_tensor_of_nothing_stays_one(cli: Cli, name: str, tmp_path: Path) -> None:
    shapes = {"w": (3, 4), "e": (3, 0), "n": (0,), "s": (2, 0, 2)}
    folders = [write(tmp_path / name, seed, shapes) for seed, name in enumerate("bxy")]
    method = find_method(PACKAGE, name)
    flags = [*(["--base", folders[0]] if method.inputs.get("base") else [])]
    flags += ["--set=density=0.5"] if "density" in method.settings else []
    if name == "passthrough":
        Path("r.yml").write_text("merge_method: passthrough\nmodels: [{model: x}]\n")
        flags, folders = ["--config", "r.yml"], folders[:1]
    else:
        flags += ["--method", name]
    result = cli("merge", *folders[1:], *flags, "--out", "o", "-q")
    assert result.code == 0, result.err
    merged = load_file(tmp_path / "o" / "model.safetensors")
    assert {name: tuple(value.shape) for name, value in merged.items()} == shapes
