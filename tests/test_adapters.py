"""LoRA adapters against the same model merged by hand, and by the chain rule."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli, ModelMaker
from safetensors.torch import load_file, save_file
from torch import Tensor

from fishertool.models.adapter_options import _ends

LAYERS = {
    "llama": ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"),
    "gpt2": ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"),
}
RANK, ALPHA = 4, 6


def make_adapter(folder: Path, base: Path, layers: tuple[str, ...], **config: Any) -> Path:
    """As peft writes it; the second layer has rank 2 and alpha 5 by a pattern."""
    folder.mkdir()
    weights, tensors = load_file(base / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(5)
    for layer, rank in zip(layers, (RANK, 2), strict=True):
        out, width = weights[f"{layer}.weight"].shape
        if config.get("fan_in_fan_out"):
            out, width = width, out
        name = f"base_model.model.{layer}.lora"
        tensors[f"{name}_A.weight"] = 0.3 * torch.randn(rank, width, generator=generator)
        tensors[f"{name}_B.weight"] = 0.3 * torch.randn(out, rank, generator=generator)
    last = layers[1].rpartition(".")[2]
    settings = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "use_dora": False,
        "target_modules": [layer.rpartition(".")[2] for layer in layers], "modules_to_save": None,
        "rank_pattern": {last: 2}, "alpha_pattern": {rf"\d+\.\w+\.{last}": 5}, **config,
    }  # fmt: skip
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def scales(stabilised: bool) -> tuple[float, float]:
    return (ALPHA / RANK**0.5, 5 / 2**0.5) if stabilised else (ALPHA / RANK, 5 / 2)


@pytest.mark.parametrize(
    ("kind", "stabilised"), [("llama", False), ("llama", True), ("gpt2", True)]
)
def test_is_that_of_the_weights_merged_by_hand(
    cli: Cli, make_model: ModelMaker, data: Path, tmp_path: Path, kind: str, stabilised: bool
) -> None:
    """G_B = scale G_W A^T and G_A = scale B^T G_W, G_W an example's gradient at the merged weight."""
    base, turned = make_model("base", kind), kind == "gpt2"
    config = {"use_rslora": stabilised, "fan_in_fan_out": turned}
    adapter = make_adapter(tmp_path / "lora", base, LAYERS[kind], **config)
    pairs = load_file(adapter / "adapter_model.safetensors")
    merged = make_model("merged", kind)
    weights = load_file(base / "model.safetensors")
    factors = {}
    for layer, scale in zip(LAYERS[kind], scales(stabilised), strict=True):
        down, up = (pairs[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")
        added = scale * up @ down
        weights[f"{layer}.weight"] += added.T if turned else added
        factors[layer] = down, up, scale
    save_file(weights, merged / "model.safetensors", {"format": "pt"})
    flags = ("--data", data, "--batch-size", 5)
    with_adapter = ("estimate-fisher", base, *flags, "--adapter", adapter)
    bank = ("--kind", "diagonal,rank-one", "--bank-dtype", "float32", "--out", "m")
    assert cli("estimate-fisher", merged, *flags, *bank).code == 0
    result = cli(*with_adapter, "--out", "f", "--json")
    assert result.code == 0, result.err
    assert "merged" in result.report["warnings"][-1]
    found = load_file("f/diagonal.safetensors")
    expected = load_file("m/diagonal.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4 * float(value.max()))
    result = cli(*with_adapter, "--adapter-fisher", "adapter", "--out", "a", "--json")
    assert result.code == 0, result.err
    summary = result.report["summary"]
    assert (summary["by_autograd"], summary["one_example_at_a_time"]) == ([], False)
    assert {one["role"] for one in result.report["inputs"]} == {"model", "adapter", "data"}
    assert str(tmp_path) not in json.dumps(result.report)
    found, members = load_file("a/diagonal.safetensors"), load_file("m/rank-one.safetensors")
    assert found.keys() == pairs.keys()
    for layer, (down, up, scale) in factors.items():
        gradients = members[f"{layer}.weight"]
        gradients = gradients.mT if turned else gradients
        for side, exact in (("A", scale * up.T @ gradients), ("B", scale * gradients @ down.T)):
            value = exact.square().mean(0)
            mine = found[f"base_model.model.{layer}.lora_{side}.weight"]
            torch.testing.assert_close(mine, value, rtol=1e-4, atol=1e-4 * float(value.max()))


Change = Callable[[dict[str, Tensor]], Any]
LAYER = f"base_model.model.{LAYERS['llama'][0]}"


@pytest.mark.parametrize(
    ("config", "change", "told"),
    [
        ({"peft_type": "IA3"}, None, "peft_type IA3"),
        ({"use_dora": True}, None, "says use_dora True, its magnitudes in the file say otherwise"),
        ({"trainable_token_indices": [3]}, None, r"trainable_token_indices \[3\]: not served"),
        ({"init_lora_weights": "pissa"}, None, "init_lora_weights 'pissa'"),
        ({"something_new": 3}, None, "something_new 3"),
        ({"r": None}, None, "adapter_config.json: r is None, not a whole number of at least 1"),
        ({"r": 0}, None, "r is 0, not a whole number"),
        ({"r": "x"}, None, "r is 'x', not a whole number"),
        ({"r": 10**400}, None, "r is 10+.*, not a whole number"),
        ({"lora_alpha": None}, None, "adapter_config.json: lora_alpha is None, not a finite number"),
        ({"lora_alpha": float("nan")}, None, "lora_alpha is nan, not a finite number"),
        ({"rank_pattern": [1]}, None, "rank_pattern maps no names to numbers"),
        ({"rank_pattern": {".*": "x"}}, None, r"rank_pattern '\.\*' is 'x', not a whole number"),
        ({"rank_pattern": {"[": 3}}, None, r"rank_pattern '\[': a regular expression"),
        ({"alpha_pattern": {"([a-z._0-9]+)+X": 2}}, None, "alpha_pattern .*: a regular expression"),
        ({"rank_pattern": {}}, None, r"is \[2, 32\], but adapter_config.json gives rank 4"),
        ({}, lambda t: t.pop(f"{LAYER}.lora_B.weight"), "lora_A.weight: not a linear layer's pair"),
        ({}, lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)}), "lm_head"),
        (
            {},
            lambda t: t.update({f"{LAYER}x.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}),
            r"no parameter of that name and shape for .*q_projx.weight \(\[4, 4\] here, not there\)",
        ),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_by_name(
    cli: Cli,
    make_model: ModelMaker,
    data: Path,
    tmp_path: Path,
    config: dict[str, Any],
    change: Change | None,
    told: str,
) -> None:
    base = make_model("base", "llama")
    adapter = make_adapter(tmp_path / "lora", base, LAYERS["llama"], **config)
    if change is not None:
        tensors = load_file(adapter / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, adapter / "adapter_model.safetensors")
    result = cli("estimate-fisher", base, "--data", data, "--adapter", adapter, "--out", "f")
    assert result.code == 3, result.err
    assert re.search(told, result.err), result.err
    assert not (tmp_path / "f").exists()


def test_a_choice_without_an_adapter_is_refused(
    cli: Cli, make_model: ModelMaker, data: Path
) -> None:
    command = ("estimate-fisher", make_model("a", "llama"), "--data", data, "--out", "f")
    assert "--adapter-fisher is for --adapter" in cli(*command, "--adapter-fisher", "adapter").err
    result = cli(*command, "--adapter", "x", "--adapter-fisher", "both")
    assert result.code == 2 and "known: merged, adapter" in result.err


def test_what_is_no_pair_of_a_linear_layer_takes_part_in_the_merged_model_only(
    cli: Cli, make_model: ModelMaker, data: Path, tmp_path: Path
) -> None:
    """A DoRA, and a norm saved whole."""
    base = make_model("base", "llama")
    adapter = make_adapter(
        tmp_path / "dora", base, LAYERS["llama"], use_dora=True, modules_to_save=["norm"]
    )
    tensors = load_file(adapter / "adapter_model.safetensors")
    weights = load_file(base / "model.safetensors")
    merged = make_model("merged", "llama")
    for layer, scale in zip(LAYERS["llama"], scales(False), strict=True):
        name = f"base_model.model.{layer}.lora_"
        whole = weights[f"{layer}.weight"] + scale * (
            tensors[f"{name}B.weight"] @ tensors[f"{name}A.weight"]
        )
        lengths = torch.linspace(0.5, 2, len(whole))
        tensors[f"{name}magnitude_vector"] = lengths
        weights[f"{layer}.weight"] = whole * (lengths / whole.norm(dim=1)).unsqueeze(1)
    norm = torch.linspace(0.5, 1.5, 16)
    tensors["base_model.model.model.norm.weight"] = weights["model.norm.weight"] = norm
    save_file(tensors, adapter / "adapter_model.safetensors")
    save_file(weights, merged / "model.safetensors", {"format": "pt"})
    assert cli("estimate-fisher", merged, "--data", data, "--out", "m").code == 0
    command = ("estimate-fisher", base, "--data", data, "--adapter", adapter)
    result = cli(*command, "--out", "f")
    assert result.code == 0, result.err
    found, expected = (load_file(f"{one}/diagonal.safetensors") for one in "fm")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3 * float(value.max()))
    result = cli(*command, "--adapter-fisher", "adapter", "--out", "a")
    assert result.code == 3 and "magnitude_vector" in result.err, result.err


@pytest.mark.parametrize(
    "pattern",
    [
        "up", "mlp.up", r"mlp\.up", "h.1.mlp.up", "^h.1.mlp.up", "^mlp.up", "^h.*", ".*", "h.*up",
        "p.up", "lp.up", "down|up", "^up|x", "u", "mlp", "mlp.", ".up", r"h\.1\..*|y", "h.1.*.up",
        r"\d+\.\w+\.up", "[0-9]+.mlp.[u-z]p*", "^h*.*u*p+", "1*.mlp.up", "h.+o.*n", ".*.*.*.*x",
    ],
)  # fmt: skip
def test_patterns_are_read_as_peft_reads_them(pattern: str) -> None:
    for module in ("h.1.mlp.up", "up", "h.11.mlp.down"):
        found = any(_ends(module, part) for part in pattern.split("|"))
        assert found == bool(re.match(rf"(.*\.)?({pattern})$", module)), module
