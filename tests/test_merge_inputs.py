"""`fishertool merge` of adapters, of other vocabularies, of other dtypes and of experts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import VOCABULARY, Cli, ModelMaker, make_tokenizer, write_rows
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

RANK, ALPHA = 2, 6
ADAPTED = "model.layers.1.mlp.up_proj"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def make_adapter(folder: Path, base: dict[str, torch.Tensor], **config: Any) -> torch.Tensor:
    """A LoRA of one layer; the weight that base and adapter make, in float64."""
    weight = base[f"{ADAPTED}.weight"].double()
    generator = torch.Generator().manual_seed(9)
    down = torch.randn(RANK, weight.shape[1], generator=generator)
    up = torch.randn(weight.shape[0], RANK, generator=generator)
    folder.mkdir()
    name = f"base_model.model.{ADAPTED}"
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    return weight + ALPHA / RANK * up.double() @ down.double()


def test_an_adapter_is_merged_as_the_model_it_makes(
    cli: Cli, make_model: ModelMaker, tmp_path: Path
) -> None:
    a, b = make_model("a", "llama", 1), make_model("b", "llama", 2)
    adapted = make_adapter(tmp_path / "lora", weights_of(a))
    flags = ("--weights", "0.25,0.75", "--json")
    result = cli("merge", f"{a}+{tmp_path / 'lora'}", b, *flags, "--out", "o")
    assert result.code == 0, result.err
    first, second, merged = weights_of(a), weights_of(b), weights_of(tmp_path / "o")
    for name, value in merged.items():
        mine = adapted if name == f"{ADAPTED}.weight" else first[name].double()
        expected = 0.25 * mine + 0.75 * second[name].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
    assert [files["id"] for files in result.report["inputs"]] == ["a+lora", "b"]
    assert str(tmp_path) not in json.dumps(result.report)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "o")


def test_an_adapter_for_another_base_is_refused_before_any_work(
    cli: Cli, make_model: ModelMaker, tmp_path: Path
) -> None:
    a, b = make_model("a", "llama", 1), make_model("b", "bert", 2)
    make_adapter(tmp_path / "lora", weights_of(a))
    result = cli("merge", f"{b}+{tmp_path / 'lora'}", b, "--out", "o")
    assert result.code == 3 and ADAPTED in result.err
    assert len(result.err.strip().splitlines()) == 1 and not (tmp_path / "o").exists()


def with_tokens(folder: Path, words: list[str]) -> None:
    """Give a model another tokenizer, and as many rows."""
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=32,
    ).save_pretrained(folder)  # fmt: skip


@pytest.fixture
def speakers(make_model: ModelMaker) -> tuple[Path, Path, list[str]]:
    """Two models, the second with some words of the first's in another order, and one more."""
    words = [*(word for word in reversed(VOCABULARY) if word != "small"), "owl"]
    a, b = make_model("a", "llama", 1), make_model("b", "llama", 2)
    assert len(words) == len(VOCABULARY)
    with_tokens(b, words)
    return a, b, words


def test_a_union_of_vocabularies_merges_rows_by_token(
    cli: Cli, speakers: tuple[Path, Path, list[str]], tmp_path: Path
) -> None:
    a, b, words = speakers
    flags = ("--tokenizer", "union", "--weights", "0.25,0.75", "-q")
    result = cli("merge", a, b, *flags, "--out", "o")
    assert result.code == 0, result.err
    first, second, merged = weights_of(a), weights_of(b), weights_of(tmp_path / "o")
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "o").get_vocab()
    assert set(ids) == {*VOCABULARY, *words}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert len(merged[name]) == len(ids)
        for token, place in ids.items():
            rows = [first[name][VOCABULARY[token]]] if token in VOCABULARY else []
            rows += [second[name][words.index(token)]] if token in words else []
            expected = rows[0] if len(rows) == 1 else 0.25 * rows[0] + 0.75 * rows[1]
            torch.testing.assert_close(merged[name][place], expected)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    assert model.config.vocab_size == len(ids)


def test_fishers_follow_their_tokens(
    cli: Cli, speakers: tuple[Path, Path, list[str]], tmp_path: Path
) -> None:
    a, b, words = speakers
    write_rows("texts.jsonl", [{"text": "the red cat runs"}, {"text": "a big dog eats"}])
    sidecars: list[object] = []
    for model in (a, b):
        out = tmp_path / f"f{model.name}"
        assert cli("estimate-fisher", model, "--data", "texts.jsonl", "--out", out, "-q").code == 0
        sidecars += ["--fisher", out]
    flags = ("--method", "fisher", "--set", "floor=0", "--set", "normalization=none")
    result = cli("merge", a, b, *flags, *sidecars, "--tokenizer", "union", "--out", "o", "-q")
    assert result.code == 0, result.err
    name = "model.embed_tokens.weight"
    values = [weights_of(model)[name].double() for model in (a, b)]
    fishers = [load_file(tmp_path / f"f{x}" / "diagonal.safetensors")[name].double() for x in "ab"]
    merged = weights_of(tmp_path / "o")[name].double()
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "o").get_vocab()
    for token in ("cat", "dog", "red"):
        places = VOCABULARY[token], words.index(token)
        f = [fisher[place] for fisher, place in zip(fishers, places, strict=True)]
        rows = [value[place] for value, place in zip(values, places, strict=True)]
        expected = (f[0] * rows[0] + f[1] * rows[1]) / (f[0] + f[1])
        assert float(f[0].sum()) > 0 and float(f[1].sum()) > 0
        torch.testing.assert_close(merged[ids[token]], expected, rtol=1e-3, atol=1e-6)


def test_other_vocabularies_are_refused_with_both_sizes_or_told_of(
    cli: Cli, make_model: ModelMaker, speakers: tuple[Path, Path, list[str]], tmp_path: Path
) -> None:
    a, b, _ = speakers
    told = cli("merge", a, b, "--out", "o")
    assert told.code == 0 and "have not the ids they have in a" in told.err
    config = json.loads((b / "config.json").read_text())
    tensors = weights_of(b)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.zeros(3, 16)])
    save_file(tensors, b / "model.safetensors", {"format": "pt"})
    size = len(VOCABULARY) + 3
    (b / "config.json").write_text(json.dumps(config | {"vocab_size": size}))
    refused = cli("merge", a, b, "--out", "p")
    assert refused.code == 3
    assert f"{size}" in refused.err and f"{len(VOCABULARY)}" in refused.err
    assert "union" in refused.err and not (tmp_path / "p").exists()
    bad = cli("merge", a, b, "--tokenizer", "unoin", "--out", "p")
    assert bad.code in (2, 3) and "unoin" in bad.err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_dtypes_are_computed_in_the_widest(
    cli: Cli, make_model: ModelMaker, dtype: torch.dtype, tmp_path: Path
) -> None:
    a, b = make_model("a", "llama", 1), make_model("b", "llama", 2, dtype)
    assert cli("merge", a, b, "--out", "o", "-q").code == 0
    first, second = weights_of(a), weights_of(b)
    for name, value in weights_of(tmp_path / "o").items():
        expected = 0.5 * first[name].double() + 0.5 * second[name].double()
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected.float(), rtol=3e-7, atol=1e-9)


def test_the_tokenizer_is_the_first_models(cli: Cli, make_model: ModelMaker) -> None:
    a, b = make_model("a", "llama", 1), make_model("b", "llama", 2)
    make_tokenizer(template=False).save_pretrained(a)
    assert cli("merge", a, b, "--out", "o", "-q").code == 0
    assert Path("o/tokenizer.json").read_bytes() == (a / "tokenizer.json").read_bytes()
