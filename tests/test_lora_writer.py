"""What differs from a base as a LoRA adapter: the best of its rank, and read back by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker
from safetensors.torch import load_file, save_file
from torch import Tensor

from fishertool.checkpoint.reader import open_checkpoint
from fishertool.errors import InputError
from fishertool.models.lora_writer import LoraWriter, low_rank_difference
from fishertool.models.sources import open_source


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9), (1, 5)])
@pytest.mark.parametrize("rank", [1, 3, 20])
def test_is_the_truncated_svd(shape: tuple[int, int], rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator)
    merged = base + 0.1 * torch.randn(shape, generator=generator)
    down, up, kept = low_rank_difference(merged, base, rank)
    left, values, right = torch.linalg.svd(merged.double() - base.double(), full_matrices=False)
    rank = min(rank, len(values))
    expected = (left[:, :rank] * values[:rank]) @ right[:rank]
    assert (down.shape, up.shape) == ((rank, shape[1]), (shape[0], rank))
    torch.testing.assert_close(up.double() @ down.double(), expected, rtol=1e-5, atol=1e-6)
    energies = values.square()
    assert kept == pytest.approx(float(energies[:rank].sum() / energies.sum()), rel=1e-9)
    sides = down.double().norm(dim=1), up.double().norm(dim=0)
    for norms in sides:  # sqrt(S) on both
        torch.testing.assert_close(norms, values[:rank].sqrt(), rtol=1e-5, atol=1e-6)


def test_no_difference_and_one_of_less_rank() -> None:
    base = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    down, up, kept = low_rank_difference(base, base, 3)
    assert kept == 1 and not down.any() and not up.any()
    added = torch.outer(torch.arange(6.0), torch.arange(5.0))
    down, up, kept = low_rank_difference(base + added, base, 4)
    assert kept == pytest.approx(1)
    torch.testing.assert_close(up @ down, added, rtol=1e-5, atol=1e-5)


def write(base: Path, merged: dict[str, Tensor], out: Path, rank: int) -> dict[str, Any]:
    """Report rows by name."""
    out.mkdir()
    with open_checkpoint(base) as source:
        writer = LoraWriter(source, "org/base", rank)
        rows = {name: writer.add(name, merged[name].float()) for name in source}
        assert [one.file for one in writer.write(out)] == ["adapter_model.safetensors"]
    return rows


def check_read_back(base: Path, adapter: Path, merged: dict[str, Tensor]) -> None:
    with open_source(f"{base}+{adapter}") as source:
        for name in source:
            found = source.read(name).reshape(source.info(name).shape).float()
            torch.testing.assert_close(found, merged[name].float(), rtol=1e-5, atol=1e-5)


KINDS = ["bert", "gpt2", "llama", "t5"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_base_and_adapter_of_full_rank_are_the_merge(
    make_model: ModelMaker, tmp_path: Path, kind: str, tied: bool
) -> None:
    """Linear layers, biases, norms, embeddings and heads, tied ones too."""
    more = {"tied": tied} if kind == "llama" else {"tie_word_embeddings": tied}
    base = make_model("base", kind, seed=1, **more)
    merged = load_file(make_model("merged", kind, seed=2, spread=0.1, **more) / "model.safetensors")
    rows = write(base, merged, tmp_path / "lora", rank=32)
    assert {row["action"] for row in rows.values()} == {"low-rank", "whole"}
    linear = [row for row in rows.values() if row["action"] == "low-rank"]
    assert all(row["energy_kept"] == pytest.approx(1) for row in linear)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 32
    assert len(config["target_modules"]) == len(linear)
    assert config["fan_in_fan_out"] == (kind == "gpt2")
    tasks = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
    assert config["task_type"] == tasks.get(kind, "CAUSAL_LM")
    assert config["base_model_name_or_path"] == "org/base"
    check_read_back(base, tmp_path / "lora", merged)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_only_what_differs_is_written(make_model: ModelMaker, tmp_path: Path, kind: str) -> None:
    """In the base's dtype where it is whole; a layer's bias goes along with its pair."""
    base = make_model("base", kind, dtype=torch.bfloat16)
    weights = load_file(base / "model.safetensors")
    merged = {name: tensor.float() for name, tensor in weights.items()}
    layer = {"bert": "bert.encoder.layer.1.output.dense", "llama": "model.layers.1.mlp.up_proj"}
    norm = {
        "bert": "bert.encoder.layer.0.output.LayerNorm",
        "llama": "model.layers.0.input_layernorm",
    }
    merged[f"{layer[kind]}.weight"] += 0.1 * torch.outer(
        torch.arange(1.0, 1 + len(merged[f"{layer[kind]}.weight"])),
        torch.ones(merged[f"{layer[kind]}.weight"].shape[1]),
    )
    merged[f"{norm[kind]}.weight"] += 0.5
    if kind == "bert":
        merged[f"{layer[kind]}.bias"] += 0.5
    write(base, merged, tmp_path / "lora", rank=4)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    own = {f"{norm[kind]}.weight", f"{layer[kind]}.lora_A.weight", f"{layer[kind]}.lora_B.weight"}
    if kind == "bert":
        own |= {f"{norm[kind]}.bias", f"{layer[kind]}.base_layer.bias"}
    assert {name.removeprefix("base_model.model.") for name in tensors} == own
    assert tensors[f"base_model.model.{norm[kind]}.weight"].dtype == torch.bfloat16
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["target_modules"] == [layer[kind]]
    assert config["modules_to_save"] == [norm[kind]]
    assert config["bias"] == ("lora_only" if kind == "bert" else "none")
    check_read_back(base, tmp_path / "lora", merged)


def test_a_lower_rank_keeps_the_energy_it_says(make_model: ModelMaker, tmp_path: Path) -> None:
    base = make_model("base", "llama", seed=1)
    weights = load_file(base / "model.safetensors")
    merged = load_file(make_model("merged", "llama", seed=2) / "model.safetensors")
    rows = write(base, merged, tmp_path / "lora", rank=3)
    with open_source(f"{base}+{tmp_path / 'lora'}") as source:
        for name, row in rows.items():
            if row["action"] == "low-rank":
                lost = (merged[name] - source.read(name)).double().square().sum()
                total = (merged[name] - weights[name]).double().square().sum()
                assert row["rank"] == 3
                assert row["energy_kept"] == pytest.approx(1 - float(lost / total), abs=1e-5)


@pytest.mark.parametrize("added", [0, 1])
def test_what_is_no_adapter_is_refused(
    make_model: ModelMaker, tmp_path: Path, added: float
) -> None:
    """Nothing differs, or only a norm does."""
    base = make_model("base", "llama")
    merged = load_file(base / "model.safetensors")
    merged["model.norm.weight"] += added
    with pytest.raises(InputError, match="no linear layer of the merge differs"):
        write(base, merged, tmp_path / "lora", rank=4)


def test_what_belongs_to_no_layer_is_refused(make_model: ModelMaker, tmp_path: Path) -> None:
    base = make_model("base", "llama")
    weights = load_file(base / "model.safetensors")
    weights["model.extra"] = torch.ones(3)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with open_checkpoint(base) as source:
        writer = LoraWriter(source, "base", 2)
        assert writer.add("model.extra", torch.ones(3)) == {"action": "as-base"}
        with pytest.raises(InputError, match=r"tensor model.extra: the merge's differs, and"):
            writer.add("model.extra", torch.zeros(3))
        path = base / "config.json"
        path.write_text(path.read_text().replace("LlamaForCausalLM", "Own"))
        with pytest.raises(InputError, match="architecture is not in transformers"):
            LoraWriter(source, "base", 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_peft_reads_it(make_model: ModelMaker, tmp_path: Path, kind: str, tied: bool) -> None:
    peft = pytest.importorskip("peft")
    import transformers

    more = {"tied": tied} if kind == "llama" else {"tie_word_embeddings": tied}
    base = make_model("base", kind, seed=1, **more)
    other = make_model("merged", kind, seed=2, spread=0.1, **more)
    write(base, load_file(other / "model.safetensors"), tmp_path / "lora", rank=32)
    name = json.loads((base / "config.json").read_text())["architectures"][0]
    loaded, expected = (
        getattr(transformers, name).from_pretrained(folder).eval() for folder in (base, other)
    )
    adapted = peft.PeftModel.from_pretrained(loaded, tmp_path / "lora").eval()
    inputs = {"input_ids": torch.arange(4, 12)[None]}
    if kind == "t5":
        inputs["decoder_input_ids"] = torch.arange(3, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            adapted(**inputs).logits, expected(**inputs).logits, rtol=1e-3, atol=1e-4
        )
