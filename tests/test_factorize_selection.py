"""What `fishertool factorize` takes for a matrix: experts, stacks of them, embeddings, a pipeline's."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import (
    TEMPLATED,
    Cli,
    Estimate,
    ModelMaker,
    files_of,
    make_text,
    make_tokenizer,
    weights_of,
    write_rows,
)
from safetensors.torch import load_file, save_file
from test_factorize_command import rows_of
from test_sentence import make_sentence_model
from tiny import ARCHITECTURES

import fishertool
from fishertool.checkpoint.reader import open_checkpoint
from fishertool.factorization.fwsvd import fwsvd
from fishertool.factorization.svd import svd
from fishertool.models.layers import layers_of
from fishertool.models.probes import Origin


def save(kind: str, folder: Path) -> Path:
    torch.manual_seed(0)
    ARCHITECTURES[kind]().save_pretrained(folder)
    make_tokenizer(template=kind in TEMPLATED).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
def test_experts_are_listed_as_skipped_or_factorized_one_by_one(
    cli: Cli, tmp_path: Path, kind: str
) -> None:
    model = save(kind, tmp_path / "m")
    flags = ("factorize", model, "--method", "svd", "--keep", "0.5", "--json")
    result = cli(*flags, "--out", "l")
    assert result.code == 0, result.err
    skipped = [name for name, row in rows_of(result, "keep").items() if ".experts." in name]
    assert len(skipped) == 24
    assert not any(".experts." in name for name in rows_of(result))
    assert "--format dense takes it" in rows_of(result, "keep")[skipped[0]]["why"]
    result = cli(*flags, "--format", "dense", "--out", "d")
    assert result.code == 0, result.err
    rows = {name: row for name, row in rows_of(result).items() if ".experts." in name}
    assert set(rows) == set(skipped)
    after = weights_of(tmp_path / "d")
    for name, row in rows.items():
        assert torch.linalg.matrix_rank(after[name]) == row["rank"]
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "d")


def save_stacks(folder: Path) -> Path:
    """A GPT-OSS, whose experts are one tensor on disk."""
    config = transformers.GptOssConfig(
        vocab_size=23, hidden_size=16, intermediate_size=12, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
        pad_token_id=0, bos_token_id=2, eos_token_id=3, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GptOssForCausalLM(config).save_pretrained(folder)
    make_tokenizer(template=False).save_pretrained(folder)
    return folder


def test_experts_that_are_one_stack_on_disk_are_factorized_each(cli: Cli, tmp_path: Path) -> None:
    save_stacks(tmp_path / "m")
    flags = ("factorize", tmp_path / "m", "--method", "svd", "--keep", "0.5", "--json")
    result = cli(*flags, "--format", "dense", "--out", "d")
    assert result.code == 0, result.err
    name = "model.layers.0.mlp.experts.down_proj"
    row = rows_of(result)[f"{name}[2]"]
    assert row["shape"] == [12, 16]  # [in, out] on disk
    before, after = weights_of(tmp_path / "m")[name], weights_of(tmp_path / "d")[name]
    for expert in range(4):
        best = torch.matmul(*svd(before[expert]).truncate(row["rank"]))
        torch.testing.assert_close(after[expert].double(), best, rtol=1e-4, atol=1e-6)
    result = cli(*flags, "--out", "l")
    assert result.code == 0, result.err
    assert name in rows_of(result, "keep")


@pytest.mark.parametrize("kinds", ["diagonal", "diagonal,factored"])
def test_a_diagonal_tells_of_stacks_whatever_lies_beside_it(
    cli: Cli, estimated: Estimate, tmp_path: Path, kinds: str
) -> None:
    model = save_stacks(tmp_path / "m")
    flags = ("--fisher", estimated(model, kinds), "--keep", "0.5", "--format", "dense", "--json")
    result = cli("factorize", model, "--method", "fwsvd", *flags, "--out", "o")
    assert result.code == 0, result.err
    assert "model.layers.0.mlp.experts.down_proj[2]" in rows_of(result)
    assert "model.layers.0.self_attn.q_proj.weight" in rows_of(result)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
def test_experts_saved_as_they_are_in_memory_are_stacks(tmp_path: Path, kind: str) -> None:
    ARCHITECTURES[kind]().save_pretrained(tmp_path, save_original_format=False)
    with open_checkpoint(tmp_path) as checkpoint:
        found = layers_of(checkpoint)
    down = found["model.layers.1.mlp.experts.down_proj"]
    assert down.kind == "experts" and down.in_block and not down.turned
    assert found["model.layers.1.mlp.experts.gate_up_proj"].kind == "experts"


def test_stacks_of_a_class_that_does_not_say_how_they_lie(tmp_path: Path) -> None:
    config = transformers.Llama4TextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=12, intermediate_size_mlp=20,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        num_local_experts=3, interleave_moe_layer_step=1, pad_token_id=0,
    )  # fmt: skip
    transformers.Llama4ForCausalLM(config).save_pretrained(tmp_path / "m")
    with open_checkpoint(tmp_path / "m") as checkpoint:
        found = [one for one in layers_of(checkpoint).values() if one.kind == "experts"]
    assert len(found) == 2 and all(one.turned for one in found)
    assert Origin("w", (3, 4, 5), (20, 1, 4), 0).mirrored
    assert not Origin("w", (3, 4, 5), (20, 5, 1), 0).mirrored


@pytest.mark.parametrize(
    ("config", "name", "linear"),
    [
        (
            transformers.XLNetConfig(vocab_size=23, d_model=16, n_layer=1, n_head=2, d_inner=32),
            "rel_attn.q", "ff.layer_1.weight",
        ),
        (
            transformers.Wav2Vec2Config(
                vocab_size=23, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=32, conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 8),
                num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
            ),
            "conv_layers.1.conv.weight", "attention.q_proj.weight",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["dense", "low-rank"])
def test_other_tensors_of_three_dimensions_are_no_experts(
    cli: Cli,
    tmp_path: Path,
    config: transformers.PreTrainedConfig,
    name: str,
    linear: str,
    form: str,
) -> None:
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "m")
    flags = ("--method", "svd", "--keep", "0.5", "--format", form, "--out", "o", "--json")
    result = cli("factorize", tmp_path / "m", *flags)
    assert result.code == 0, result.err
    (kept,) = [row for key, row in rows_of(result, "keep").items() if key.endswith(name)]
    assert kept["why"] == "no linear weight"
    assert any(key.endswith(linear) for key in rows_of(result))
    assert not any("[" in key for key in rows_of(result))


def test_a_tied_copy_on_disk_is_neither_written_nor_counted(
    cli: Cli, make_model: ModelMaker, tmp_path: Path
) -> None:
    model = make_model("m", "llama", tied=True)
    weights = weights_of(model)
    total = sum(tensor.numel() for tensor in weights.values())
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    for number, more in enumerate([(), ("--include", "*q_proj*"), ("--exclude", "*q_proj*")]):
        flags = ("--method", "svd", "--keep", "0.5", "--out", f"o{number}", "--json", *more)
        result = cli("factorize", model, *flags)
        assert result.code == 0, result.err
        assert result.report["summary"]["parameters_before"] == total
        assert "lm_head.weight" not in weights_of(tmp_path / f"o{number}")


@pytest.mark.parametrize("transformer", ["", "0_Transformer"])
def test_a_sentence_transformers_folder_stays_one(
    cli: Cli, make_model: ModelMaker, tmp_path: Path, transformer: str
) -> None:
    model = make_sentence_model(make_model, transformer=transformer)
    rows = [{"query": make_text(n, 2), "positive": make_text(n, 5)} for n in range(8)]
    write_rows("pairs.jsonl", rows)
    flags = ("--evaluate-on", "pairs.jsonl", "--finetune-steps", 2, "--data", "pairs.jsonl")
    base = ("factorize", model, "--method", "svd", "--keep", "0.5", "--json")
    result = cli(*base, *flags, "--out", "o")
    assert result.code == 0, result.err
    assert set(files_of(tmp_path / "o")) == set(files_of(model))
    for name in ("modules.json", "1_Pooling/config.json", Path(transformer, "tokenizer.json")):
        assert (tmp_path / "o" / name).read_bytes() == (model / name).read_bytes()
    assert "encoder.layer.0.attention.self.query.weight" in rows_of(result)
    assert "before_recovery" in result.report["evaluation"]
    result = cli("evaluate", "o", "--data", "pairs.jsonl", "--against", model, "--json")
    assert result.code == 0, result.err


def test_modules_that_are_not_served_do_not_matter_to_weights(
    cli: Cli, make_model: ModelMaker
) -> None:
    model = make_sentence_model(make_model, more=("Odd",))
    result = cli("factorize", model, "--method", "svd", "--keep", "0.5", "--out", "o", "-q")
    assert result.code == 0, result.err


def test_embeddings_on_request(cli: Cli, make_model: ModelMaker, tmp_path: Path) -> None:
    model = make_model("m")
    name = "bert.embeddings.word_embeddings.weight"
    flags = ("factorize", model, "--method", "svd", "--keep", "0.5", "--include", name)
    result = cli(*flags, "--format", "dense", "--out", "d", "--json")
    assert result.code == 0, result.err
    rank = rows_of(result)[name]["rank"]
    assert torch.linalg.matrix_rank(weights_of(tmp_path / "d")[name]) == rank
    assert result.report["summary"]["kept_of_linear"] == 1  # an embedding is no linear weight
    both = ("--include", "*.layer.*")
    result = cli(*flags, *both, "--out", "l", "--json")
    assert result.code == 0, result.err
    config = json.loads(Path("l/config.json").read_text())["quantization_config"]
    assert config["embedding"] == "bert.embeddings.word_embeddings"
    low = fishertool.load_model("l")
    assert low.get_input_embeddings().rank == rank
    result = cli("factorize", model, "--method", "svd", "--keep", "0.5", "--include", name, *both,
                 "--format", "dense", "--out", "both", "-q")  # fmt: skip
    assert result.code == 0, result.err
    dense = transformers.AutoModelForSequenceClassification.from_pretrained("both")
    ids = torch.tensor([[2, 5, 6, 7, 3]])
    torch.testing.assert_close(low(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["fwsvd", "tfwsvd"])
def test_low_rank_embeddings_are_a_models_like_any(
    cli: Cli, make_model: ModelMaker, data: Path, kind: str
) -> None:
    """Weighted, trained, measured against the dense model, and estimated of again."""
    model, name = make_model("m", spread=0.3), "bert.embeddings.word_embeddings"
    flags = ("--data", data, "-q")
    assert cli("estimate-fisher", model, *flags, "--out", "f").code == 0
    result = cli(
        "factorize", model, "--method", kind, "--fisher", "f", "--keep", "0.5", "--include",
        f"{name}.weight", "--finetune-steps", 2, "--data", data, "--evaluate-on", data,
        "--out", "low", "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert {"kl", "loss"} <= result.report["evaluation"]["metrics"].keys()
    result = cli("evaluate", "low", "--data", data, "--against", model, "--json")
    assert result.code == 0, result.err
    assert cli("estimate-fisher", "low", *flags, "--out", "again").code == 0
    names = set(load_file("again/diagonal.safetensors"))
    assert {f"{name}.down.weight", f"{name}.up.weight"} <= names


def test_an_embeddings_inputs_are_its_tokens(
    cli: Cli, make_model: ModelMaker, data: Path, tmp_path: Path
) -> None:
    model, name = make_model("m", spread=0.3), "bert.embeddings.word_embeddings.weight"
    kinds = "diagonal,factored,kronecker"
    result = cli("estimate-fisher", model, "--data", data, "--kind", kinds, "--out", "f", "-q")
    assert result.code == 0, result.err
    fisher, weight = load_file("f/diagonal.safetensors")[name], weights_of(model)[name]
    flags = "factorize", model, "--fisher", "f", "--rank", "4", "--include", name
    for form in ("dense", "low-rank"):
        result = cli(*flags, "--method", "fwsvd", "--format", form, "--out", form, "-q")
        assert result.code == 0, result.err
    left, right = fwsvd(weight.T, fisher.sum(0), fisher.sum(1)).truncate(4)
    wanted = (left @ right).T.float()
    torch.testing.assert_close(weights_of(tmp_path / "dense")[name], wanted, rtol=1e-4, atol=1e-5)
    table = fishertool.load_model("low-rank").get_input_embeddings()
    torch.testing.assert_close(table(torch.arange(len(weight))), wanted, rtol=1e-4, atol=1e-5)
    result = cli(*flags, "--method", "kronecker", "--out", "k")
    assert result.code == 2
    assert f"{name}: an embedding has no kronecker statistic" in result.err


def test_embeddings_that_do_more_than_look_up_stay_dense(cli: Cli, tmp_path: Path) -> None:
    model = save("opt", tmp_path / "m")
    result = cli(
        "factorize", model, "--method", "svd", "--keep", "0.5", "--out", "o", "--json",
        "--include", "*embed_positions*", "--include", "*.layers.*",
    )  # fmt: skip
    assert result.code == 0, result.err
    row = rows_of(result, "keep")["model.decoder.embed_positions.weight"]
    assert row["why"].startswith("an embedding of other things than tokens")
