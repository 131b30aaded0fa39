"""Reading the factors of a weight from a sidecar."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Cli, Estimate, ModelMaker
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fishertool.checkpoint.reader import open_checkpoint
from fishertool.errors import InputError
from fishertool.fisher.header import KEY
from fishertool.sidecar import (
    check_fits,
    open_sidecar,
    oriented,
    read_activation,
    read_kronecker,
    write_sidecar,
)


@pytest.mark.parametrize(
    ("architecture", "leader", "follower"),
    [
        ("gpt2", "transformer.h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_fc.weight"),
        (
            "bert",
            "bert.encoder.layer.1.attention.self.query.weight",
            "bert.encoder.layer.1.attention.self.value.weight",
        ),
    ],
)
def test_factors_are_those_of_the_weight_as_out_by_in(
    cli: Cli,
    make_model: ModelMaker,
    data: Path,
    tmp_path: Path,
    architecture: str,
    leader: str,
    follower: str,
) -> None:
    model = make_model("m", architecture)
    flags = ("--data", data, "--kind", "kronecker,activation", "--out", "f")
    assert cli("estimate-fisher", model, *flags).code == 0
    tensors, header = open_sidecar(tmp_path / "f", "kronecker")
    moments, other = open_sidecar(tmp_path / "f", "activation")
    with tensors, moments, open_checkpoint(model) as checkpoint:
        check_fits(tensors, header, checkpoint)
        check_fits(moments, other, checkpoint)
        a, b = read_kronecker(tensors, header, follower)
        assert torch.equal(a, tensors.read(f"{leader}#input"))
        assert torch.equal(a, read_activation(moments, other, follower))
        # Every token goes through these layers.
        tokens = header.tokens / header.examples
        torch.testing.assert_close(b, tensors.read(f"{follower}#output") * tokens)
        stored = checkpoint.read(follower)
        weight = oriented(header, follower, stored)
        assert weight.shape == (len(b), len(a))
        assert torch.equal(oriented(header, follower, weight), stored)


def test_factors_of_other_sides_than_the_weights_are_refused(
    cli: Cli, make_model: ModelMaker, data: Path, tmp_path: Path
) -> None:
    model = make_model("g", "gpt2")
    assert (
        cli("estimate-fisher", model, "--data", data, "--kind", "kronecker", "--out", "f").code == 0
    )
    tensors, header = open_sidecar(tmp_path / "f", "kronecker")
    turned = replace(header, transposed=[name for name in header.transposed if "c_fc" not in name])
    with tensors, open_checkpoint(model) as checkpoint:
        wanted = r"c_fc\.weight#input is \[16, 16\], but .* is \[16, 64\] .* needs \[64, 64\]"
        with pytest.raises(InputError, match=wanted):
            check_fits(tensors, turned, checkpoint)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"leaders": None}, "not a Fisher sidecar"),
        ({"transposed": 5}, "not a Fisher sidecar"),
        ({"leaders": {}}, "its header and its tensors have different names"),
        ({"leaders": {"classifier.weight": "classifier"}}, "have different names"),
    ],
)
def test_a_header_that_is_none_of_its_tensors_is_refused(
    cli: Cli, make_model: ModelMaker, estimated: Estimate, change: dict[str, object], told: str
) -> None:
    model = make_model("m")
    path = estimated(model, "kronecker") / "kronecker.safetensors"
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[KEY])
    save_file(load_file(path), path, {KEY: json.dumps(header | change)})
    flags = ("--method", "kronecker", "--keep", "0.5", "--fisher", path.parent, "--out", "o")
    result = cli("factorize", model, *flags)
    assert result.code == 3 and told in result.err


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32])
def test_statistics_that_cannot_be_computed_with_are_refused(
    cli: Cli, make_model: ModelMaker, data: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = make_model("m")
    assert cli("estimate-fisher", model, "--data", data, "--out", "f").code == 0
    tensors, header = open_sidecar(tmp_path / "f")
    with tensors:
        changed = {name: tensors[name].to(dtype) for name in tensors}
    (tmp_path / "odd").mkdir()
    write_sidecar(tmp_path / "odd", header, changed, 1 << 30)
    with pytest.raises(InputError, match="is no statistic; estimate it again"):
        open_sidecar(tmp_path / "odd")
