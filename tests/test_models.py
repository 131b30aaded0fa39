"""Loading, names on disk and in memory, heads, ties, tasks, batches."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import (
    VOCABULARY,
    Cli,
    ModelMaker,
    make_bert,
    make_gpt2,
    make_text,
    make_tokenizer,
    write_rows,
)
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES
from torch import Tensor, nn

from fishertool.calibration import Example
from fishertool.checkpoint.reader import open_checkpoint
from fishertool.errors import InputError, UsageError
from fishertool.fisher.batches import micro_batches
from fishertool.models.loading import LoadedModel, has_accelerate, load_model, load_tokenizer
from fishertool.models.names import (
    empty_model,
    head_names,
    ignored_buffers,
    parameters_by_disk_name,
    tied_names,
)
from fishertool.models.tasks import TASKS, collate, task_of

CLASSIFY, CAUSAL = "sequence-classification", "causal-lm"
TASK_OF_KIND = {"bert": CLASSIFY, "gpt2": CAUSAL, "llama": CAUSAL}
EMBEDDING = "transformer.wte.weight"
Change = Callable[[dict[str, Tensor]], Any]


def make_mixtral(folder: Path) -> None:
    torch.manual_seed(0)
    ARCHITECTURES["mixtral"]().save_pretrained(folder)
    make_tokenizer(template=False).save_pretrained(folder)


def load(folder: Path, task: str) -> LoadedModel:
    with open_checkpoint(folder) as checkpoint:
        return load_model(checkpoint, TASKS[task])


def by_name(folder: Path, task: str) -> tuple[dict[str, Tensor], list[str], nn.Module]:
    with open_checkpoint(folder) as checkpoint:
        module = load_model(checkpoint, TASKS[task]).module
        return *parameters_by_disk_name(module, checkpoint), module


def edit(folder: Path, change: Change, **config: Any) -> Path:
    """Rewrite the folder's tensors, and keys of its config."""
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config), encoding="utf-8")
    return folder


def check_zips(folder: Path, task: str, apart: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Every tensor on disk has its own parameter, with the same values, in the disk's order."""
    found, rest, module = by_name(folder, task)
    stored = load_file(folder / "model.safetensors")
    with open_checkpoint(folder) as checkpoint:
        assert list(found) == [name for name in checkpoint if name not in apart] and rest == []
    assert all(torch.equal(parameter, stored[name]) for name, parameter in found.items())
    assert {id(p) for p in found.values()} == {id(p) for p in module.parameters()}
    return found


@pytest.mark.parametrize("there", [False, True])
def test_a_model_whose_weights_are_not_read(
    make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    if not there:  # accelerate, without which transformers gives every weight a value
        monkeypatch.setattr("fishertool.models.loading.has_accelerate", lambda: False)
    elif not has_accelerate():
        pytest.skip("needs accelerate")
    with open_checkpoint(make_model("gpt2", "gpt2")) as checkpoint:
        module = load_model(checkpoint, TASKS[CAUSAL], "meta").module
    assert {parameter.is_meta for parameter in module.parameters()} == {there}


@pytest.mark.parametrize(
    ("kind", "more"),
    [("bert", {}), ("gpt2", {}), ("llama", {"tied": True}), ("llama", {"tied": False})],
)
def test_parameters_go_by_their_names_on_disk(
    make_model: ModelMaker, kind: str, more: dict[str, bool]
) -> None:
    found = check_zips(make_model("m", kind, **more), TASK_OF_KIND[kind])
    assert ("lm_head.weight" in found) == (more == {"tied": False})


def base_model(folder: Path) -> Path:
    torch.manual_seed(0)
    make_gpt2().transformer.save_pretrained(folder)
    make_tokenizer(template=False).save_pretrained(folder)
    return folder


def test_a_base_models_names_have_no_prefix(tmp_path: Path) -> None:
    found = check_zips(base_model(tmp_path / "base"), CAUSAL)
    assert "wte.weight" in found and not any("transformer" in name for name in found)


def test_masks_that_old_gpt2_checkpoints_hold_are_no_parameters(tmp_path: Path) -> None:
    """As openai-community/gpt2 on the Hub has them; transformers ignores them on load."""
    mask = torch.ones(1, 1, 32, 32).tril()
    folder = edit(base_model(tmp_path / "base"), lambda t: t.update({"h.0.attn.bias": mask}))
    found, rest, _ = by_name(folder, CAUSAL)
    assert rest == ["h.0.attn.bias"] and "h.0.attn.c_attn.bias" in found


OLD_BUFFERS = {
    "gpt2": {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32).tril(),
        "transformer.h.1.attn.masked_bias": torch.tensor(-1e4),
    },
    "llama": {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(2)},
    "bert": {
        "bert.embeddings.position_ids": torch.arange(32.0),
        "bert.embeddings.token_type_ids": torch.zeros(1, 32).long(),
    },
}


@pytest.mark.parametrize("kind", OLD_BUFFERS)
def test_buffers_that_old_checkpoints_hold_are_in_nobodys_way(
    cli: Cli, data: Path, make_model: ModelMaker, kind: str
) -> None:
    folder, old = make_model(kind, kind), OLD_BUFFERS[kind]
    flags = ("--data", data, "--quiet", "--json")
    before = [
        cli("estimate-fisher", folder, *flags, "--out", "before"),
        cli("evaluate", folder, *flags),
    ]
    with open_checkpoint(folder) as checkpoint:
        assert ignored_buffers(checkpoint) == []
    edit(folder, lambda t: t.update(old))
    with open_checkpoint(folder) as checkpoint:
        assert set(ignored_buffers(checkpoint)) == set(old)
    after = [
        cli("estimate-fisher", folder, *flags, "--out", "after"),
        cli("evaluate", folder, *flags),
    ]
    assert [one.code for one in before + after] == [0] * 4, after
    found = [load_file(Path(out) / "diagonal.safetensors") for out in ("before", "after")]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert before[1].report["summary"] == after[1].report["summary"]


def test_what_only_looks_like_an_old_buffer(
    make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bias that is no mask, a buffer that the model still saves, and an unknown architecture."""
    folder = make_model("g", "gpt2")
    edit(folder, lambda t: t.update({"transformer.h.0.attn.bias": torch.ones(32)}))
    with open_checkpoint(folder) as checkpoint:
        assert ignored_buffers(checkpoint) == []
    edit(folder, lambda t: t.update(OLD_BUFFERS["gpt2"]), architectures=["MyGPT2"])
    with open_checkpoint(folder) as checkpoint:
        assert ignored_buffers(checkpoint) == []
    model = make_bert()
    model.bert.embeddings.register_buffer("position_ids", torch.arange(32.0))
    monkeypatch.setattr("fishertool.models.names.empty_model", lambda source: model)
    folder = edit(make_model("b"), lambda t: t.update(OLD_BUFFERS["bert"]))
    with open_checkpoint(folder) as checkpoint:
        assert ignored_buffers(checkpoint) == ["bert.embeddings.token_type_ids"]


def test_buffers_on_disk_have_no_fisher(make_model: ModelMaker) -> None:
    folder = make_model("m")
    with open_checkpoint(folder) as checkpoint:
        module = load_model(checkpoint, TASKS[CLASSIFY]).module
    module.get_submodule("classifier").register_buffer("steps", torch.ones(2))
    edit(folder, lambda t: t.update({"classifier.steps": torch.ones(2)}))
    with open_checkpoint(folder) as checkpoint:
        found, rest = parameters_by_disk_name(module, checkpoint)
    assert rest == ["classifier.steps"] and "classifier.weight" in found


def test_of_tied_names_both_on_disk_the_first_counts(make_model: ModelMaker) -> None:
    folder = make_model("m", "gpt2")
    edit(folder, lambda t: t.update({"lm_head.weight": t[EMBEDDING].clone()}))
    found = check_zips(folder, CAUSAL, apart=("lm_head.weight",))
    assert EMBEDDING in found
    with open_checkpoint(folder) as checkpoint:
        assert tied_names(checkpoint) == {"lm_head.weight": EMBEDDING}


@pytest.mark.parametrize(
    ("tied", "more", "architecture", "found"),
    [
        (True, 0, "LlamaForCausalLM", True),
        (True, 1, "LlamaForCausalLM", False),
        (False, 0, "LlamaForCausalLM", False),
        (True, 0, "MyLlama", False),
    ],
)
def test_tied_are_names_the_architecture_ties_and_whose_bytes_agree(
    make_model: ModelMaker, tied: bool, more: int, architecture: str, found: bool
) -> None:
    folder = make_model("m", "llama", tied=tied)
    edit(
        folder,
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + more}),
        architectures=[architecture],
    )
    with open_checkpoint(folder) as checkpoint:
        wanted = {"lm_head.weight": "model.embed_tokens.weight"} if found else {}
        assert tied_names(checkpoint) == wanted


def test_a_tensor_no_parameter_is_for_is_refused_by_name(make_model: ModelMaker) -> None:
    folder = make_model("m")
    module = load(folder, CLASSIFY).module
    edit(folder, lambda t: t.update({"adapter.up": torch.ones(2), "n": torch.ones(2).long()}))
    with (
        open_checkpoint(folder) as checkpoint,
        pytest.raises(InputError, match=r"no parameter for adapter\.up$"),
    ):
        parameters_by_disk_name(module, checkpoint)


@pytest.mark.parametrize("bias", [{}, {"classifier.bias": torch.ones(3, 1)}], ids=len)
def test_a_parameter_that_is_not_on_disk_is_refused_by_name(
    make_model: ModelMaker, bias: dict[str, Tensor]
) -> None:
    folder = make_model("m")
    module = load(folder, CLASSIFY).module
    edit(folder, lambda t: (t.pop("classifier.bias"), t.update(bias)))
    with (
        open_checkpoint(folder) as checkpoint,
        pytest.raises(
            InputError, match=r"no tensor of the same name and shape .* classifier\.bias"
        ),
    ):
        parameters_by_disk_name(module, checkpoint)


def test_experts_fused_on_load_are_views_of_the_stack(tmp_path: Path) -> None:
    make_mixtral(tmp_path)
    found, rest, module = by_name(tmp_path, CAUSAL)
    stored = load_file(tmp_path / "model.safetensors")
    assert set(found) == set(stored) and rest == []
    assert all(torch.equal(value, stored[name]) for name, value in found.items())
    stack = module.get_parameter("model.layers.0.mlp.experts.gate_up_proj")
    assert found["model.layers.0.block_sparse_moe.experts.3.w3.weight"]._base is stack


@pytest.mark.parametrize("change", ["swap", "drop"])
def test_a_stack_that_is_not_what_is_on_disk_is_refused_by_name(
    tmp_path: Path, change: str
) -> None:
    make_mixtral(tmp_path)
    module = load(tmp_path, CAUSAL).module
    one, other = (f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight" for e in (0, 1))

    def swap(tensors: dict[str, Tensor]) -> None:
        tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()

    edit(tmp_path, swap if change == "swap" else lambda t: t.pop(one))
    told = {
        "swap": f"{one}, {other} did not arrive",
        "drop": r"model's .*1\.mlp\.experts\.down_proj",
    }
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(InputError, match=told[change]):
        parameters_by_disk_name(module, checkpoint)


def test_tensors_put_together_on_save_are_refused_by_name(
    make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `save_pretrained` does for models whose query, key and value are split on load."""

    def together(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        names = ["classifier.weight", "bert.pooler.dense.weight"]
        return tensors | {names[0]: torch.cat([tensors.pop(name) for name in names])}

    folder = make_model("m")
    module = load(folder, CLASSIFY).module
    monkeypatch.setattr("transformers.core_model_loading.revert_weight_conversion", together)
    with (
        open_checkpoint(folder) as checkpoint,
        pytest.raises(InputError, match=r"bert\.pooler\.dense\.weight, classifier\.weight, nor"),
    ):
        parameters_by_disk_name(module, checkpoint)


def untied_t5(make_model: ModelMaker) -> Path:
    """Its config says that it is tied whatever it is made of; its file does not."""
    folder = make_model("untied-t5", "t5")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    head = torch.ones_like(tensors["shared.weight"])
    save_file({**tensors, "lm_head.weight": head}, path, {"format": "pt"})
    return folder


def test_the_head_is_what_the_base_model_lacks(make_model: ModelMaker, tmp_path: Path) -> None:
    wanted = {
        make_model("bert"): {"classifier.weight", "classifier.bias"},
        make_model("tied", "llama", tied=True): set(),
        make_model("untied", "llama"): {"lm_head.weight"},
        base_model(tmp_path / "base"): set(),
        make_model("t5", "t5"): set(),
        untied_t5(make_model): {"lm_head.weight"},
    }
    for folder, names in wanted.items():
        with open_checkpoint(folder) as checkpoint:
            assert set(head_names(checkpoint)) == names


@pytest.mark.parametrize(
    ("named", "told"),
    [
        (None, "not given"),
        ([], "not given"),
        (["MyOwn"], "MyOwn"),
        (["pipeline"], "pipeline"),
        (["LlamaConfig"], "LlamaConfig"),
    ],
)
def test_an_unknown_architecture_has_no_known_head(
    make_model: ModelMaker, named: Any, told: str
) -> None:
    folder = make_model("m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": named}))
    with open_checkpoint(folder) as checkpoint:
        with pytest.raises(InputError, match=f"m: .*architecture {told} is not in transformers"):
            head_names(checkpoint)
        assert empty_model(checkpoint) is None


@pytest.mark.parametrize(
    "broken",
    [
        {"num_attention_heads": 0},
        {"hidden_size": "abc"},
        {"num_hidden_layers": "2"},
        {"rope_parameters": 5},
        {"quantization_config": 5},
        {"architectures": ["TimmWrapperForImageClassification"]},
    ],
)
def test_a_config_of_which_no_model_is_made_is_refused(
    make_model: ModelMaker, broken: dict[str, Any]
) -> None:
    folder = make_model("m", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | broken))
    with open_checkpoint(folder) as checkpoint, pytest.raises(InputError, match="m: transformers"):
        empty_model(checkpoint)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_loads_in_the_stored_dtype_but_float16(
    make_model: ModelMaker, kind: str, stored: torch.dtype
) -> None:
    loaded = torch.float32 if stored == torch.float16 else stored
    folder = make_model("m", kind, dtype=stored)
    model = load(folder, TASK_OF_KIND[kind])
    assert {parameter.dtype for parameter in model.module.parameters()} == {loaded}
    assert not model.module.training
    parameters = dict(model.module.named_parameters())
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(parameters[name], tensor.to(loaded))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
def test_the_dtype_is_what_is_stored_whatever_the_config_says(
    make_model: ModelMaker, stored: torch.dtype
) -> None:
    """One tensor of another dtype, as of a router, decides nothing."""

    def change(tensors: dict[str, Tensor]) -> None:
        other = torch.bfloat16 if stored == torch.float32 else torch.float32
        tensors["classifier.bias"] = tensors["classifier.bias"].to(other)

    folder = edit(make_model("m", dtype=stored), change, dtype="float16")
    model = load(folder, CLASSIFY)
    assert {parameter.dtype for parameter in model.module.parameters()} == {stored}


@pytest.mark.parametrize("kind", ["gpt2", "qwen3-moe"])
def test_float64_is_measured_and_estimated_as_float32(
    cli: Cli, data: Path, tmp_path: Path, kind: str
) -> None:
    """Also by experts, whose grouped products take no float64."""
    losses, traces = [], []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        folder = tmp_path / str(dtype)
        ARCHITECTURES[kind]().to(dtype).save_pretrained(folder)
        make_tokenizer(template=False).save_pretrained(folder)
        measured = cli("evaluate", folder, "--data", data, "--json")
        estimated = cli("estimate-fisher", folder, "--data", data, "--out", f"{dtype}-f", "--json")
        assert (measured.code, estimated.code) == (0, 0), measured.err + estimated.err
        losses += [found.report["summary"]["loss"] for found in (measured, estimated)]
        traces.append(estimated.report["summary"]["trace"])
        assert not estimated.report["summary"]["one_example_at_a_time"]
    assert losses == pytest.approx(losses[:1] * 4, rel=1e-6)
    assert traces[1] == pytest.approx(traces[0], rel=1e-5)


SMALL = {"vocab_size": len(VOCABULARY), "hidden_size": 16, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("CodeGen", {"n_embd": 16, "n_layer": 1, "n_head": 4, "rotary_dim": 4, "n_positions": 32}),
        ("Rwkv", {**SMALL, "attention_hidden_size": 16}),
    ],
)
def test_a_config_without_a_padding_token(
    cli: Cli, data: Path, tmp_path: Path, kind: str, size: dict[str, Any]
) -> None:
    config = getattr(transformers, f"{kind}Config")(**{"vocab_size": len(VOCABULARY), **size})
    assert not hasattr(config, "pad_token_id")
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path / "m")
    make_tokenizer(template=False).save_pretrained(tmp_path / "m")
    result = cli("estimate-fisher", "m", "--data", data, "--out", "f", "-q")
    assert result.code == 0, result.err


def test_rows_of_an_embedding_of_its_own_class_are_counted(tmp_path: Path) -> None:
    config = transformers.IBertConfig(**SMALL, intermediate_size=32, num_attention_heads=2)
    transformers.IBertForSequenceClassification(config).save_pretrained(tmp_path)
    make_tokenizer(template=True).save_pretrained(tmp_path)
    assert load(tmp_path, CLASSIFY).max_length == config.max_position_embeddings - 2


@pytest.mark.parametrize("kind", ["Roberta", "MPNet", "IBert", "Bert"])
def test_positions_begin_behind_that_of_padding(cli: Cli, tmp_path: Path, kind: str) -> None:
    """18 of them hold texts of 16 tokens, where 0 and 1 are the padding token's."""
    size: dict[str, Any] = {"intermediate_size": 32, "num_attention_heads": 2, "pad_token_id": 1}
    config = getattr(transformers, f"{kind}Config")(**SMALL, **size, max_position_embeddings=18)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    model.save_pretrained(tmp_path / "m")
    tokenizer = make_tokenizer(template=True)
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(tmp_path / "m")
    write_rows("long.jsonl", [{"text": make_text(n, 30), "label": n} for n in range(2)])
    for verb in (("evaluate",), ("estimate-fisher", "--out", "f")):
        result = cli(*verb, "m", "--data", "long.jsonl", "--json")
        assert result.code == 0, result.err
        assert result.report["calibration"]["max_length"] == (18 if kind == "Bert" else 16)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("FSMT", {"langs": ["de", "en"], "src_vocab_size": 32, "tgt_vocab_size": 32}),
        ("M2M100", {"vocab_size": 32}),
    ],
)
def test_sines_behind_that_of_padding_have_all_positions(
    tmp_path: Path, kind: str, words: dict[str, Any]
) -> None:
    """The table of FSMT has more rows than positions; that of M2M100 grows."""
    size = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 1}
    config = getattr(transformers, f"{kind}Config")(**size, **words, max_position_embeddings=32)
    getattr(transformers, f"{kind}ForConditionalGeneration")(config).save_pretrained(tmp_path)
    make_tokenizer(template=True).save_pretrained(tmp_path)
    assert load(tmp_path, "sequence-to-sequence").max_length == 32


def test_a_model_without_a_table_of_embeddings_is_refused(tmp_path: Path) -> None:
    config = transformers.CanineConfig(
        **{**SMALL, "num_attention_heads": 2, "intermediate_size": 32, "num_hash_buckets": 64}
    )
    transformers.CanineForSequenceClassification(config).save_pretrained(tmp_path)
    make_tokenizer(template=True).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="CanineForSequenceClassification has no table of token"):
        load(tmp_path, CLASSIFY)


def test_what_is_known_of_a_loaded_model(make_model: ModelMaker) -> None:
    bert = load(make_model("bert"), CLASSIFY)
    assert (bert.labels, bert.pad_id) == ({"class0": 0, "class1": 1, "class2": 2}, 0)
    gpt2 = load(make_model("gpt2", "gpt2"), CAUSAL)
    assert (gpt2.labels, bert.max_length, gpt2.max_length) == (None, 32, 32)
    folder = make_model("llama", "llama", pad_token_id=5)
    for tokenizer_pad, pad_token_id, wanted in (("[PAD]", 5, 0), (None, 5, 5), (None, None, 3)):
        tokenizer = make_tokenizer(template=False)
        tokenizer.pad_token, tokenizer.eos_token = tokenizer_pad, "[SEP]"
        tokenizer.save_pretrained(folder)
        edit(folder, lambda t: None, pad_token_id=pad_token_id)
        model = load(folder, CAUSAL)
        config: Any = model.module.config
        assert model.pad_id == config.pad_token_id == wanted


NAMED = [
    (lambda t: t.pop("classifier.bias"), {}, r"lacks tensors .*Classification: classifier\.bias"),
    (lambda t: t.update({"classifier.bias": torch.zeros(5)}), {}, r"shape.*: classifier\.bias"),
    (lambda t: t.update({"adapter.up": torch.ones(2)}), {}, r"does not use .*: adapter\.up"),
    (lambda t: None, {"model_type": "nonesuch"}, "cannot load it: .*nonesuch"),
    (
        lambda t: t.update({"bert.embeddings.word_embeddings.weight": torch.zeros(9, 16)}),
        {"vocab_size": 9},
        f"the tokenizer has {len(VOCABULARY)} tokens, the model embeds 9",
    ),
]


@pytest.mark.parametrize(
    ("change", "config", "told"), NAMED, ids=["missing", "shape", "left over", "type", "vocabulary"]
)
def test_what_does_not_fit_is_refused_by_name(
    make_model: ModelMaker, change: Change, config: dict[str, Any], told: str
) -> None:
    folder = edit(make_model("m"), change, **config)
    with pytest.raises(InputError, match=told) as caught:
        load(folder, CLASSIFY)
    assert str(caught.value).startswith(f"{folder}: ") and "\n" not in str(caught.value)


def test_the_wrong_task_lacks_its_head(make_model: ModelMaker) -> None:
    with pytest.raises(InputError, match="lacks tensors the model needs as BertLMHeadModel: cls"):
        load(make_model("m"), CAUSAL)


def test_without_a_tokenizer_of_its_own(make_model: ModelMaker) -> None:
    ((folder := make_model("m")) / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="its tokenizer cannot be loaded"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="has no tokenizer files"):
        load(folder, CLASSIFY)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "GPT2LMHeadModel"])
def test_the_task_follows_from_the_architecture(name: str) -> None:
    config = {"architectures": [name]}
    assert task_of(config, "here").name == (CLASSIFY if "Class" in name else CAUSAL)
    for asked in TASKS:
        assert task_of(config, "here", asked) is task_of({}, "here", asked) is TASKS[asked]
    with pytest.raises(UsageError, match="--task 'casual-lm'; did you mean 'causal-lm'"):
        task_of(config, "here", "casual-lm")


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"id2label": {"0": "LABEL_0"}}, "regression"),
        ({"problem_type": "regression"}, "regression"),
        ({"problem_type": "multi_label_classification"}, "multi label classification"),
    ],
)
@pytest.mark.parametrize("asked", ["auto", CLASSIFY])
def test_a_head_that_chooses_no_class_is_refused(
    config: dict[str, Any], told: str, asked: str
) -> None:
    config = {"architectures": ["BertForSequenceClassification"], **config}
    with pytest.raises(InputError, match=rf"here: its head is for {told} .* not served yet"):
        task_of(config, "here", asked)
    assert task_of(config, "here", "embedding") is TASKS["embedding"]


@pytest.mark.parametrize("names", [None, [], ["LlavaForConditionalGeneration"]])
def test_a_task_that_does_not_follow_is_refused(names: list[str] | None) -> None:
    told = names[0] if names else "none given"
    with pytest.raises(InputError, match=rf"here: no task follows .*\({told}\)"):
        task_of({"architectures": names}, "here")


EXAMPLES = [
    Example({"input_ids": [5, 6, 7], "token_type_ids": [1, 1, 1]}, 2, 0),
    Example({"input_ids": [8], "token_type_ids": [1]}, None, 0),
    Example({"input_ids": [9, 9], "token_type_ids": [0, 1]}, 1, 0),
]


def test_collate_pads_on_the_right() -> None:
    batch = collate(TASKS[CLASSIFY], EXAMPLES, [2, 0, 1], 4, "cpu")
    assert batch.inputs["input_ids"].tolist() == [[9, 9, 4], [5, 6, 7], [8, 4, 4]]
    assert batch.inputs["token_type_ids"].tolist() == [[0, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert batch.targets.tolist() == [1, 2, 0] and batch.scored.tolist() == [True] * 3
    assert list(batch.examples) == [2, 0, 1] and len(batch.inputs) == 3


def test_queries_bring_their_documents_as_rows() -> None:
    texts = [{"input_ids": ids} for ids in ([5], [6, 7, 8], [9])]
    examples = [Example(texts[0], None, 0, candidates=texts[:n]) for n in (2, 3, 3)]
    batch = collate(TASKS["embedding"], examples, [1, 2], 4, "cpu")
    rows = [[5, 4, 4], [5, 4, 4], [6, 7, 8], [9, 4, 4]]
    assert batch.inputs["input_ids"].tolist() == [rows, rows]
    assert batch.inputs["attention_mask"].sum(2).tolist() == [[1, 1, 3, 1]] * 2
    assert batch.targets.tolist() == [0, 0] and batch.rows_each == 4
    assert (examples[1].size, examples[1].tokens) == (12, 6)
    batches = micro_batches([9, 12, 12], rows_each=[3, 4, 4], size=2)
    assert batches == [[1, 2], [0]]  # only as many texts together


@pytest.mark.parametrize(
    ("lengths", "columns"),
    [
        ([(3, 3)], (3, 3)),
        ([(3, 3), (3, 3)], (3, 3)),
        ([(3, 3), (2, 2)], (3, 4)),
        ([(3, 2), (2, 3)], (3, 4)),
        ([(4, 2), (3, 2)], (4, 2)),
    ],
)
def test_an_encoder_and_a_decoder_never_have_as_many_columns_among_padding(
    lengths: list[tuple[int, int]], columns: tuple[int, int]
) -> None:
    examples = [
        Example({"input_ids": [5] * source, "labels": [6] * target}, None, 0)
        for source, target in lengths
    ]
    batch = collate(TASKS["sequence-to-sequence"], examples, range(len(examples)), 0, "cpu")
    assert batch.inputs["attention_mask"].shape == (len(examples), columns[0])
    assert batch.inputs["labels"].shape == batch.scored.shape == (len(examples), columns[1])
    assert batch.scored.sum(1).tolist() == [target for _, target in lengths]
    assert batch.inputs["attention_mask"].sum(1).tolist() == [source for source, _ in lengths]


def test_next_tokens_are_scored_within_each_text_alone() -> None:
    """Also where the padding token occurs in the text."""
    batch = collate(TASKS[CAUSAL], EXAMPLES, [0, 1, 2], 9, "cpu")
    scored = [[True, True, False], [False, False, False], [True, False, False]]
    assert batch.scored.tolist() == scored
    assert batch.targets[batch.scored].tolist() == [6, 7, 9]
    assert batch.inputs["attention_mask"].sum(1).tolist() == [3, 1, 2]
