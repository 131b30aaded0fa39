"""`fishertool merge` of adapters, of other vocabularies, of other dtypes and of experts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import VOCABULARY, Cli, ModelMaker, make_tokenizer, write_rows
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES
from tokenizers import Tokenizer, models, pre_tokenizers

from fishertool import hub
from fishertool.models.chat_template import NAMED

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


def test_a_merge_is_written_as_an_adapter_of_its_base(
    cli: Cli, make_model: ModelMaker, tmp_path: Path
) -> None:
    base = make_model("base", "llama", 1)
    for name, seed in (("a", 2), ("b", 3)):
        tuned = make_model(name, "llama", 1)
        tensors = weights_of(tuned)
        generator = torch.Generator().manual_seed(seed)
        for value in tensors.values():
            value += 0.1 * torch.randn(value.shape, generator=generator)
        save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    pair = (tmp_path / "a", tmp_path / "b")
    assert cli("merge", *pair, "--out", "whole", "-q").code == 0
    for rank, close in ((16, True), (2, False)):
        flags = ("--base", base, "--as-lora", rank, "--out", f"lora{rank}", "--json")
        told = cli("merge", *pair, *flags, "--dry-run").report["summary"]
        result = cli("merge", *pair, *flags)
        assert result.code == 0, result.err
        assert 0 <= result.report["output"]["bytes"] - told["bytes_to_write"] < 10_000  # a header
        assert told["shards"] == 1
        rows = [row for row in result.report["tensors"] if row["action"] == "low-rank"]
        assert rows and all((row["energy_kept"] > 0.9999) == close for row in rows)
        back = ("merge", f"{base}+{tmp_path / f'lora{rank}'}", "--method", "passthrough")
        assert cli(*back, "--out", f"back{rank}", "-q").code == 0
        whole, again = weights_of(tmp_path / "whole"), weights_of(tmp_path / f"back{rank}")
        apart = max(float((whole[name] - again[name]).abs().max()) for name in whole)
        assert (apart < 1e-5) == close


@pytest.mark.parametrize("first", ["bfloat16", "float32"])
def test_an_adapter_holds_changes_below_what_stored_weights_tell_apart(
    cli: Cli, make_model: ModelMaker, tmp_path: Path, first: str
) -> None:
    """Whatever the dtype of the model that is named first."""
    base = make_model("base", "llama")
    tensors = {name: value.bfloat16() for name, value in weights_of(base).items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    name = "model.layers.0.mlp.up_proj.weight"
    change = 1e-4 * torch.outer(torch.ones(32), torch.linspace(-1, 1, 16))
    models = {"float32": tensors | {name: tensors[name].float() + change}, "bfloat16": tensors}
    order = [first, *(one for one in models if one != first)]
    for dtype in order:
        shutil.copytree(base, dtype)
        save_file(models[dtype], f"{dtype}/model.safetensors", {"format": "pt"})
    flags = ("--base", base, "--as-lora", 1, "--out", "o", "--json")
    result = cli("merge", *order, *flags)
    assert result.code == 0, result.err
    actions = {row["name"]: row["action"] for row in result.report["tensors"]}
    assert actions.pop(name) == "low-rank" and set(actions.values()) == {"as-base"}
    pair = load_file(tmp_path / "o" / "adapter_model.safetensors")
    found = (
        pair[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"]
        @ pair[f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"]
    )
    torch.testing.assert_close(found, change / 2, rtol=1e-2, atol=1e-8)


def test_a_tensor_of_nothing_is_as_an_adapters_base_has_it(
    cli: Cli, make_model: ModelMaker
) -> None:
    folders = [make_model(name, "llama", seed) for seed, name in enumerate(("base", "a", "b"))]
    for folder in folders:
        tensors = weights_of(folder) | {"model.nothing": torch.zeros(0)}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    flags = ("--base", folders[0], "--as-lora", 2, "--out", "o", "--json")
    result = cli("merge", *folders[1:], *flags)
    assert result.code == 0, result.err
    [row] = [row for row in result.report["tensors"] if row["name"] == "model.nothing"]
    assert row["action"] == "as-base"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "--as-lora needs --base"),
        (["--base", "a", "--evaluate-on", "x.jsonl"], "no model to be measured"),
        (["--base", "a", "--predict"], "no model to be measured or predicted"),
        (["--base", "a", "--tokenizer", "union"], "the base's tokens"),
        (["--base", "a", "--dtype", "bfloat16"], "in float32; leave out the dtype bfloat16"),
        (["--base", "./a+b"], "--base ./a+b is a model with an adapter"),
    ],
)
def test_what_cannot_be_an_adapter_is_refused(
    cli: Cli, make_model: ModelMaker, flags: list[str], told: str
) -> None:
    a, b = make_model("a", "llama", 1), make_model("b", "llama", 2)
    result = cli("merge", a, b, "--as-lora", 2, *flags, "--out", "o")
    assert (result.code, told in result.err) == (2, True), result.err


@pytest.mark.parametrize(
    ("base", "told"),
    [
        ("other", "other: lacks lm_head.weight, model.embed_tokens.weight"),
        ("wide", "is F32 [48, 16], but F32 [32, 16] in the merge"),
    ],
)
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_an_adapter_of_a_base_that_is_built_otherwise_is_refused_on_headers(
    cli: Cli, make_model: ModelMaker, base: str, told: str, more: tuple[str, ...], tmp_path: Path
) -> None:
    a, b = make_model("a", "llama", 1), make_model("b", "llama", 2)
    make_model("other", "bert")
    tensors = weights_of(a)
    name = "model.layers.0.mlp.gate_proj.weight"
    tensors[name] = torch.zeros(48, 16)
    save_file(tensors, make_model("wide", "llama") / "model.safetensors", {"format": "pt"})
    result = cli("merge", a, b, "--as-lora", 2, "--base", base, "--out", "o", *more)
    assert (result.code, told in result.err) == (3, True), result.err
    assert "--as-lora needs a base of the models' architecture" in result.err
    assert not (tmp_path / "o").exists()


def test_an_adapter_names_a_base_that_peft_finds_from_anywhere(
    cli: Cli, make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        make_model(name, "llama", seed)
    command = ("merge", "a", "b", "--as-lora", 2, "--out", "o", "--json", "--overwrite")
    result = cli(*command, "--base", "./base")
    assert result.code == 0, result.err
    config = json.loads(Path("o/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((tmp_path / "base").resolve())
    assert config["revision"] is None
    assert any("names its base, base, by its folder" in one for one in result.report["warnings"])
    assert str(tmp_path) not in Path("o/fishertool_report.json").read_text()

    resolve = hub.resolve
    there = {"org/base@v1": tmp_path / "base"}
    monkeypatch.setattr(hub, "resolve", lambda name: there.get(name) or resolve(name))
    result = cli(*command, "--base", "org/base@v1")
    assert result.code == 0, result.err
    config = json.loads(Path("o/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "v1")
    assert not any("names its base" in one for one in result.report["warnings"])


def test_experts_that_no_adapter_can_hold_are_refused_on_headers(cli: Cli, tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        ARCHITECTURES["mixtral"]().save_pretrained(tmp_path / name)
    for name in ("a", "b"):  # the same experts in all
        tensors, base = weights_of(tmp_path / name), weights_of(tmp_path / "base")
        tensors |= {one: value for one, value in base.items() if ".experts." in one}
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
    command = ("merge", "a", "b", "--base", "base", "--as-lora", 2, "--out", "o")
    for more in ((), ("--dry-run",)):
        result = cli(*command, *more)
        assert result.code == 3
        assert "no adapter can hold it, nor 23 more, as of experts" in result.err
    assert not Path("o").exists()
    result = cli(*command, "--exclude", "*.experts.*")
    assert result.code == 0, result.err


READ: dict[str, tuple[str, ...]] = {
    "the base of an adapter": ("a", "b", "--as-lora", "2", "--base", "written"),
    "an adapter": ("a+written", "b"),
    "a tokenizer": ("a", "b", "--tokenizer", "written"),
}


@pytest.mark.parametrize("case", READ)
@pytest.mark.parametrize("inside", ["", "/below"])
def test_no_output_replaces_what_is_read(
    cli: Cli, make_model: ModelMaker, case: str, inside: str, tmp_path: Path
) -> None:
    a, b = make_model("a", "llama", 1), make_model("b", "llama", 2)
    if case == "an adapter":
        make_adapter(tmp_path / "written", weights_of(a))
        (tmp_path / "written" / "fishertool_report.json").write_text("{}")
    else:
        assert cli("merge", a, b, "--out", "written", "-q").code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "written").iterdir()}
    result = cli("merge", *READ[case], "--out", f"written{inside}", "--overwrite")
    assert (result.code, "overlaps the input" in result.err) == (2, True), result.err
    assert {path: path.read_bytes() for path in (tmp_path / "written").iterdir()} == before


@pytest.mark.parametrize("listed", ["", "chat_template: {o}/chat_template.jinja\n"])
def test_no_output_replaces_the_files_of_its_recipe(
    cli: Cli, make_model: ModelMaker, listed: str, tmp_path: Path
) -> None:
    make_model("a", "llama", 1), make_model("b", "llama", 2)
    assert cli("merge", "a", "b", "--out", "o", "-q").code == 0
    (tmp_path / "o" / "chat_template.jinja").write_text("own")
    file = tmp_path / ("r.yml" if listed else "o/r.yml")
    text = "merge_method: linear\nmodels: [{model: a}, {model: b}]\n"
    file.write_text(text + listed.format(o=tmp_path / "o"))
    result = cli("merge", "--config", file, "--out", "o", "--overwrite")
    assert (result.code, "overlaps the input" in result.err) == (2, True), result.err


def test_the_base_of_an_adapter_is_among_the_inputs(cli: Cli, make_model: ModelMaker) -> None:
    make_model("base", "llama", 1), make_model("a", "llama", 2), make_model("b", "llama", 3)
    result = cli("merge", "a", "b", "--as-lora", 2, "--base", "./base", "--out", "o", "--json")
    assert result.code == 0, result.err
    roles = [(files["id"], files["role"]) for files in result.report["inputs"]]
    assert roles == [("a", "model"), ("b", "model"), ("base", "base")]


@pytest.mark.parametrize("method", ["linear", "fisher"])
def test_a_model_of_two_sidecars_is_refused(
    cli: Cli, make_model: ModelMaker, method: str, tmp_path: Path
) -> None:
    make_model("a", "llama", 1), make_model("b", "llama", 2)
    Path("r.yml").write_text(
        f"merge_method: {method}\nmodels:\n- {{model: a, fisher: f}}\n- {{model: b, fisher: g}}\n"
        "- {model: ./a, fisher: h}\n"
    )
    result = cli("merge", "--config", "r.yml", "--out", "o")
    assert (result.code, "a: is given with two sidecars, f and h" in result.err) == (2, True)


def test_a_base_is_the_base_however_it_is_spelled(
    cli: Cli, make_model: ModelMaker, tmp_path: Path
) -> None:
    for number, name in enumerate("abc"):
        make_model(name, "llama", number)
    (tmp_path / "link").symlink_to("c")
    merged = []
    for out, base in (("o", "c"), ("p", "./c"), ("q", tmp_path / "c"), ("r", "link")):
        Path("r.yml").write_text(
            f"merge_method: ties\nbase_model: {base}\nmodels:\n- model: c\n"
            "- {model: a, parameters: {density: 0.5}}\n- {model: b, parameters: {density: 0.5}}\n"
        )
        result = cli("merge", "--config", "r.yml", "--out", out, "--json")
        assert result.code == 0, result.err
        assert result.report["summary"]["weights"] == [0.5, 0.5]
        merged.append((tmp_path / out / "model.safetensors").read_bytes())
    assert len(set(merged)) == 1


def test_reports_of_recipes_name_no_folders_of_this_machine(
    cli: Cli, make_model: ModelMaker, tmp_path: Path
) -> None:
    for number, name in enumerate("abc"):
        make_model(name, "llama", number)
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    Path("r.yml").write_text(
        f"merge_method: ties\nbase_model: {tmp_path}/c\nchat_template: {tmp_path}/t.jinja\n"
        f"models:\n- {{model: {tmp_path}/c, parameters: {{weight: 1}}}}\n"
        f"- model: {tmp_path}/a\n  parameters: {{density: [{{filter: mlp, value: 1}}, {{value: 1}}]}}\n"
        f"- {{model: {tmp_path}/b}}\n"
    )
    result = cli("merge", "--config", "r.yml", "--out", "o", "--json")
    assert result.code == 0, result.err
    assert str(tmp_path) not in json.dumps(result.report)
    assert result.report["summary"]["rules"] == {"density of a: mlp": 6}
    assert result.report["options"]["recipe"]["chat_template"] == "t.jinja"
    assert result.report["warnings"] == ["weight of the base has no effect: it is not merged"]


TEMPLATES = ("{{ messages }} one", "{{ messages }} two")


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [("auto", TEMPLATES[1]), ("'{% if x %}own{% endif %}'", "{% if x %}own{% endif %}"),
     ("t.jinja", TEMPLATES[0]), ("chatml", NAMED["chatml"])],
)  # fmt: skip
def test_a_recipe_chooses_the_chat_template(
    cli: Cli, make_model: ModelMaker, choice: str, wanted: str, tmp_path: Path
) -> None:
    for number, name in enumerate("abc"):
        folder = make_model(name, "llama", number)
        (folder / "chat_template.jinja").write_text(TEMPLATES[min(number, 1)])
    (tmp_path / "t.jinja").write_text(TEMPLATES[0])
    Path("r.yml").write_text(
        f"merge_method: linear\nchat_template: {choice}\n"
        "models: [{model: a}, {model: b}, {model: c}]"
    )
    result = cli("merge", "--config", "r.yml", "--out", "o", "-q")
    assert result.code == 0, result.err
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "o").chat_template == wanted


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (
            "chatml",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
            "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nV<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nV<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("mistral", "<s>[INST] S\n\nU [/INST] A</s>[INST] V [/INST]"),
        (
            "alpaca",
            "S\n\n### Instruction:\nU\n\n### Response:\nA</s>\n\n"
            "### Instruction:\nV\n\n### Response:\n",
        ),
        (
            "exaone",
            "[|system|]S[|endofturn|]\n[|user|]U\n[|assistant|]A[|endofturn|]\n[|user|]V\n"
            "[|assistant|]",
        ),
    ],
)
def test_named_chat_templates(name: str, wanted: str) -> None:
    tokenizer: Any = make_tokenizer(template=False)
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    roles = zip(("system", "user", "assistant", "user"), "SUAV", strict=True)
    messages = [{"role": role, "content": text} for role, text in roles]
    how = {"chat_template": NAMED[name], "add_generation_prompt": True, "tokenize": False}
    assert tokenizer.apply_chat_template(messages, **how) == wanted


def test_a_chat_template_that_is_no_text_is_refused(cli: Cli, make_model: ModelMaker) -> None:
    a, _ = make_model("a", "llama", 1), make_model("b", "llama", 2)
    (a / "chat_template.jinja").write_bytes(b"\xff\xfe{{x")
    Path("r.yml").write_text(
        "merge_method: linear\nchat_template: auto\nmodels: [{model: a}, {model: b}]"
    )
    result = cli("merge", "--config", "r.yml", "--out", "o")
    assert result.code == 3 and "a/chat_template.jinja: is no text" in result.err


def test_a_chat_template_that_is_none_is_refused(cli: Cli, make_model: ModelMaker) -> None:
    make_model("a", "llama", 1), make_model("b", "llama", 2)
    for choice, code in (("chatlm", 2), ("auto", 3)):
        Path("r.yml").write_text(
            f"merge_method: linear\nchat_template: {choice}\nmodels: [{{model: a}}, {{model: b}}]"
        )
        result = cli("merge", "--config", "r.yml", "--out", "o")
        assert result.code == code and "chat_template" in result.err


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


def test_layers_put_on_top_of_each_other_may_have_a_union_of_vocabularies(
    cli: Cli, speakers: tuple[Path, Path, list[str]], tmp_path: Path
) -> None:
    a, b, words = speakers
    Path("r.yml").write_text(
        "merge_method: passthrough\ntokenizer_source: union\nslices:\n"
        "- sources: [{model: a, layer_range: [0, 2]}]\n- sources: [{model: b, layer_range: [0, 2]}]\n"
    )
    result = cli("merge", "--config", "r.yml", "--out", "o", "-q")
    assert result.code == 0, result.err
    first, second, merged = weights_of(a), weights_of(b), weights_of(tmp_path / "o")
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "o").get_vocab()
    assert "owl" in ids and len(ids) == len(VOCABULARY) + 1
    before, after = "model.embed_tokens.weight", "lm_head.weight"
    for token, place in ids.items():
        own = first[before][VOCABULARY[token]] if token in VOCABULARY else second[before][-1]
        assert torch.equal(merged[before][place], own)
        row = words.index(token) if token in words else -1
        theirs = second[after][row] if row >= 0 else first[after][VOCABULARY[token]]
        assert torch.equal(merged[after][place], theirs)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    assert (model.config.vocab_size, model.config.num_hidden_layers) == (len(ids), 4)


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


@pytest.mark.parametrize("owl", [True, False], ids=["union", "other-order"])
def test_factors_do_not_follow_tokens_whose_weights_are_averaged(
    cli: Cli, speakers: tuple[Path, Path, list[str]], tmp_path: Path, owl: bool
) -> None:
    a, b, words = speakers
    if not owl:
        with_tokens(b, [*words[:-1], "small"])
    write_rows("texts.jsonl", [{"text": "the red cat runs"}, {"text": "a big dog eats"}])
    sidecars: list[object] = []
    for model in (a, b):
        flags = ("--data", "texts.jsonl", "--kind", "kronecker", "--out", f"f{model.name}", "-q")
        assert cli("estimate-fisher", model, *flags).code == 0
        sidecars += ["--fisher", f"f{model.name}"]
    merge = ("merge", a, b, "--tokenizer", "union", "-q", "--out")
    result = cli(*merge, "o", "--method", "kronecker", *sidecars)
    assert result.code == 0, result.err
    assert cli(*merge, "average").code == 0
    merged, average = weights_of(tmp_path / "o"), weights_of(tmp_path / "average")
    assert torch.equal(merged["lm_head.weight"], average["lm_head.weight"])
    inside = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(merged[inside], average[inside])


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
    assert bad.code == 2 and "tokenizer source: 'unoin'; did you mean 'union'?" in bad.err


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


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_tokenizer_is_run_only_where_it_is_trusted(
    cli: Cli,
    make_model: ModelMaker,
    trusted: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = str(tmp_path / "modules")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)
    a, b = make_model("a", "llama", 1), make_model("b", "llama", 2)
    own = json.loads((b / "tokenizer_config.json").read_text())
    own |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (b / "tokenizer_config.json").write_text(json.dumps(own))
    (b / "own.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast): pass\n"
    )
    tokenizer = json.loads((b / "tokenizer.json").read_text())
    (b / "tokenizer.json").write_text(json.dumps(tokenizer))  # else the files are the same
    flags = ["--trust-remote-code"] if trusted else []
    result = cli("merge", a, b, *flags, "--out", "o", "-q")
    assert result.code == 0, result.err
    assert ("its tokenizer cannot be loaded" in result.err) is not trusted
    chosen = cli("merge", a, b, *flags, "--tokenizer", "union", "--out", "p", "-q")
    assert chosen.code == (0 if trusted else 3), chosen.err
    assert (tmp_path / "ran").exists() is trusted


def test_a_broken_tokenizer_is_told_of_and_refused_where_it_is_needed(
    cli: Cli, make_model: ModelMaker
) -> None:
    a, b = make_model("a", "llama", 1), make_model("b", "llama", 2)
    (b / "tokenizer.json").write_text("[]")
    told = cli("merge", a, b, "--out", "o", "-q")
    assert told.code == 0
    assert f"warning: {b}: its tokenizer cannot be loaded" in told.err
    refused = cli("merge", a, b, "--tokenizer", "union", "--out", "p", "-q")
    assert refused.code == 3 and f"{b}: its tokenizer cannot be loaded" in refused.err


def test_tokens_that_a_terminal_would_act_on_are_escaped(
    cli: Cli, make_model: ModelMaker, speakers: tuple[Path, Path, list[str]]
) -> None:
    a, b, words = speakers
    with_tokens(b, ["\x1b[31mevil", *words[1:]])
    result = cli("merge", a, b, "--out", "o", "-q")
    assert result.code == 0 and "\x1b" not in result.err
    assert r"\x1b[31mevil among them, have not the ids" in result.err
