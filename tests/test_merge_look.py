"""Passes over tensors of more than one piece, which the threads share."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from merge_driver import merge, random
from safetensors.torch import load_file, save_file

from fishertool.checkpoint.stream import PIECE_ELEMENTS
from fishertool.surgery.merge_look import GROUP_TENSORS

ROWS, WIDTH = PIECE_ELEMENTS // 900 + 7, 1000
MANY = {f"b{number:03}": (3, 4) for number in range(2 * GROUP_TENSORS)}
SHAPES = {"a": (ROWS, WIDTH), **MANY, "c": (ROWS, WIDTH), "d": (ROWS * WIDTH,)}


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / name, seed) for seed, name in enumerate(("base", "one", "two"))]


def write(folder: Path, seed: int) -> Path:
    folder.mkdir()
    tensors = {
        name: random(*shape, seed=10 * seed + number)
        for number, (name, shape) in enumerate(SHAPES.items())
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
