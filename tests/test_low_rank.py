"""Low-rank checkpoints in transformers: loading, saving, training, and refusing what is not whole."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Cli, ModelMaker
from safetensors.torch import load_file, save_file
from test_sentence import RECENT, make_sentence_model
from tiny import ARCHITECTURES, BLOCK_LINEARS, make_low_rank
from torch import Tensor, nn

import fishertool
from fishertool.checkpoint.reader import open_checkpoint
from fishertool.errors import InputError
from fishertool.models.loading import load_model
from fishertool.models.low_rank_layers import LowRank, is_linear
from fishertool.models.tasks import TASKS
from fishertool.sidecar import open_sidecar

IDS = torch.tensor([[2, 5, 6, 7, 3], [2, 4, 4, 3, 0]])
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
MODELS = {
    "bert": ("bert", {}, "AutoModelForSequenceClassification"),
    "gpt2": ("gpt2", {}, "AutoModelForCausalLM"),
    "llama": ("llama", {}, "AutoModelForCausalLM"),
    "tied": ("llama", {"tied": True}, "AutoModelForCausalLM"),
    "biased": ("llama", {"attention_bias": True}, "AutoModelForCausalLM"),
    "t5": ("t5", {}, "AutoModelForSeq2SeqLM"),
    "bert, embeddings too": ("bert", {}, "AutoModelForSequenceClassification"),
    "llama, embeddings too": ("llama", {}, "AutoModelForCausalLM"),
}


def factors_in(name: str) -> str:
    """Which tensors of one of MODELS to factorize."""
    return (
        rf"{BLOCK_LINEARS}|(word_embeddings|embed_tokens)\.weight$"
        if "embeddings" in name
        else BLOCK_LINEARS
    )


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def logits_of(model: Any) -> Tensor:
    more = {"decoder_input_ids": IDS[:, :3]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS, **more).logits
        return logits


def low_rank_layers(model: nn.Module) -> int:
    return sum(isinstance(module, LowRank) for module in model.modules())


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_tensors(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_full_rank_predicts_as_dense_and_is_saved_as_it_was(
    make_model: ModelMaker, name: str
) -> None:
    kind, more, auto = MODELS[name]
    dense = make_model("dense", kind, spread=0.1, **more)
    ranks = make_low_rank(dense, Path("low"), factors_in(name))
    wanted = logits_of(getattr(transformers, auto).from_pretrained(dense))
    for model in (getattr(transformers, auto).from_pretrained("low"), fishertool.load_model("low")):
        assert low_rank_layers(model) == len(ranks) >= 8
        torch.testing.assert_close(logits_of(model), wanted, **CLOSE)
    model.save_pretrained("again")
    assert_same_tensors(tensors_of(Path("again")), tensors_of(Path("low")))
    low, again = (json.loads(Path(one, "config.json").read_text()) for one in ("low", "again"))
    assert again["quantization_config"] == low["quantization_config"]
    assert low["quantization_config"]["ranks"] == ranks
    assert ("embedding" in low["quantization_config"]) == ("embeddings" in name)
    torch.testing.assert_close(
        logits_of(fishertool.load_model("again")), logits_of(model), rtol=0, atol=0
    )


@pytest.mark.parametrize("name", MODELS)
def test_dequantize_gives_the_dense_model(make_model: ModelMaker, name: str) -> None:
    kind, more, _ = MODELS[name]
    dense = make_model("dense", kind, spread=0.1, **more)
    make_low_rank(dense, Path("low"), factors_in(name))
    model = fishertool.load_model("low")
    wanted = logits_of(model)
    model = model.dequantize()
    assert low_rank_layers(model) == 0
    torch.testing.assert_close(logits_of(model), wanted, **CLOSE)
    model.save_pretrained("again")
    assert "quantization_config" not in json.loads(Path("again/config.json").read_text())
    again = tensors_of(Path("again"))
    assert again.keys() == tensors_of(dense).keys()
    for tensor_name, tensor in tensors_of(dense).items():
        torch.testing.assert_close(again[tensor_name], tensor, **CLOSE)


def test_dequantize_after_saving_and_into_another_dtype(make_model: ModelMaker) -> None:
    make_low_rank(make_model("dense"), Path("low"))
    model = fishertool.load_model("low")
    model.save_pretrained("again")  # which writes the dtype into the config as a word
    assert {p.dtype for p in model.dequantize().parameters()} == {torch.float32}
    query = fishertool.load_model("low").dequantize(torch.bfloat16).get_submodule(
        "bert.encoder.layer.0.attention.self.query"
    )  # fmt: skip
    assert query.weight.dtype == query.bias.dtype == torch.bfloat16


def test_wrapped_factors_are_not_dequantized(make_model: ModelMaker) -> None:
    make_low_rank(make_model("dense"), Path("low"))
    model = fishertool.load_model("low")
    layer = model.bert.encoder.layer[0].attention.self.query
    layer.up = nn.Sequential(layer.up)
    with pytest.raises(ValueError, match="merge these first"):
        model.dequantize()


def test_a_truncated_layer_is_its_product(make_model: ModelMaker) -> None:
    ranks = make_low_rank(make_model("dense", spread=0.1), Path("low"), rank=5)
    assert set(ranks.values()) == {5}
    tensors = tensors_of(Path("low"))
    layer = fishertool.load_model("low").bert.encoder.layer[1].attention.self.query
    name = "bert.encoder.layer.1.attention.self.query"
    x = torch.randn(3, 16, dtype=torch.float64)
    down, up = tensors[f"{name}.down.weight"].double(), tensors[f"{name}.up.weight"].double()
    wanted = x @ down.T @ up.T + tensors[f"{name}.up.bias"].double()
    torch.testing.assert_close(layer(x.float()).double(), wanted, rtol=1e-5, atol=1e-6)
    assert (layer.in_features, layer.rank, layer.out_features) == (16, 5, 16)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture(kind: str) -> None:
    """All linear layers of each, its head too, but for what is tied or fused."""
    torch.manual_seed(0)
    model = ARCHITECTURES[kind]()
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    modules = [
        name
        for name, module in model.named_modules()
        if is_linear(module) and f"{name}.weight" not in tied
    ]
    model.save_pretrained("dense")
    names = "|".join(re.escape(name) for name in modules)
    ranks = make_low_rank(Path("dense"), Path("low"), select=rf"^({names})\.weight$")
    low = type(model).from_pretrained("low")
    assert low_rank_layers(low) == len(ranks) > 0
    low.save_pretrained("again")
    assert_same_tensors(tensors_of(Path("again")), tensors_of(Path("low")))
    if kind != "vit":
        wanted = logits_of(type(model).from_pretrained("dense"))
        torch.testing.assert_close(logits_of(low), wanted, **CLOSE)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_base_model_of_a_task_checkpoint_and_back(make_model: ModelMaker, name: str) -> None:
    kind, more, auto = MODELS[name]
    dense = make_model("dense", kind, spread=0.1, **more)
    ranks = make_low_rank(dense, Path("low"))
    model = getattr(transformers, auto).from_pretrained("low")
    body = transformers.AutoModel.from_pretrained("low")
    assert low_rank_layers(body) == len(ranks)
    given = {"decoder_input_ids": IDS[:, :3]} if kind == "t5" else {}
    hidden = transformers.AutoModel.from_pretrained(dense)(IDS, **given).last_hidden_state
    torch.testing.assert_close(body(IDS, **given).last_hidden_state, hidden, **CLOSE)

    body.save_pretrained("body")
    again = getattr(transformers, auto).from_pretrained("body")
    assert low_rank_layers(again) == len(ranks)
    ours, theirs = again.state_dict(), model.state_dict()
    for key in ours:
        if key.startswith(f"{model.base_model_prefix}."):
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)


def test_a_head_with_factors_is_left_out_of_a_model_without_it(make_model: ModelMaker) -> None:
    make_low_rank(make_model("dense"), Path("low"), select="classifier.weight|query.weight")
    assert low_rank_layers(fishertool.load_model("low")) == 3
    assert low_rank_layers(transformers.AutoModel.from_pretrained("low")) == 2


def test_an_encoder_alone_leaves_out_the_decoder(make_model: ModelMaker) -> None:
    ranks = make_low_rank(make_model("dense", "t5"), Path("low"))
    encoder = transformers.T5EncoderModel.from_pretrained("low")
    assert 0 < low_rank_layers(encoder) == sum(name.startswith("encoder") for name in ranks)


@pytest.mark.parametrize("name", ["bert", "gpt2", "tied", "t5"])
def test_another_dtype(make_model: ModelMaker, name: str) -> None:
    kind, more, _ = MODELS[name]
    make_low_rank(make_model("dense", kind, spread=0.1, **more), Path("low"))
    wide, narrow = fishertool.load_model("low"), fishertool.load_model("low", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in narrow.parameters()} == {torch.bfloat16}
    for module in narrow.modules():
        if isinstance(module, LowRank):
            assert module.weight.dtype == torch.bfloat16
    torch.testing.assert_close(logits_of(narrow).float(), logits_of(wide), rtol=0.1, atol=0.1)
    narrow.save_pretrained("narrow")
    assert {tensor.dtype for tensor in tensors_of(Path("narrow")).values()} == {torch.bfloat16}
    torch.testing.assert_close(
        logits_of(fishertool.load_model("narrow")), logits_of(narrow), rtol=0, atol=0
    )


def test_t5_keeps_what_it_keeps_in_float32(make_model: ModelMaker) -> None:
    make_low_rank(make_model("dense", "t5"), Path("low"))
    model = fishertool.load_model("low", dtype=torch.float16)
    layer = model.encoder.block[0].layer[1].DenseReluDense
    assert layer.wo.down.weight.dtype == layer.wo.weight.dtype == torch.float32
    assert layer.wi.down.weight.dtype == torch.float16
    assert bool(logits_of(model).isfinite().all())


def test_shards(make_model: ModelMaker) -> None:
    make_low_rank(make_model("dense", "llama"), Path("low"))
    model = fishertool.load_model("low")
    model.save_pretrained("shards", max_shard_size="5KB")
    assert len(list(Path("shards").glob("*.safetensors"))) > 2
    torch.testing.assert_close(
        logits_of(fishertool.load_model("shards")), logits_of(model), rtol=0, atol=0
    )


def test_trainer_trains_and_saves_it(make_model: ModelMaker) -> None:
    make_low_rank(make_model("dense"), Path("low"), rank=6)
    model = fishertool.load_model("low")
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    rows = [{"input_ids": [2, 4 + n, 5 + n, 3], "labels": n % 3} for n in range(12)]
    settings = transformers.TrainingArguments(
        output_dir="run", max_steps=3, save_steps=3, report_to="none", use_cpu=True,
        disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    transformers.Trainer(model, settings, train_dataset=rows).train()
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert any(".down.weight" in name for name in changed)
    assert any(".up.weight" in name for name in changed)
    assert_same_tensors(fishertool.load_model("run/checkpoint-3").state_dict(), model.state_dict())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft calls what transformers deprecates
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_lora_on_the_factors(make_model: ModelMaker, kind: str) -> None:
    peft = pytest.importorskip("peft")
    make_low_rank(make_model("dense", kind), Path("low"), rank=6)
    settings = peft.LoraConfig(r=2, target_modules=["down", "up"], init_lora_weights=False)
    model = peft.get_peft_model(fishertool.load_model("low"), settings)
    wanted = logits_of(model)
    model.save_pretrained("adapter")
    again = peft.PeftModel.from_pretrained(fishertool.load_model("low"), "adapter")
    torch.testing.assert_close(logits_of(again), wanted, rtol=0, atol=0)
    again.merge_and_unload().save_pretrained("merged")
    torch.testing.assert_close(logits_of(fishertool.load_model("merged")), wanted, **CLOSE)


def test_sentence_transformers_folder(make_model: ModelMaker) -> None:
    dense = make_sentence_model(make_model)
    ranks = make_low_rank(dense, Path("low"))
    scores = []
    for folder in (dense, Path("low")):
        with open_checkpoint(folder) as checkpoint:
            scorer = load_model(checkpoint, TASKS["embedding"])
        text = {"input_ids": IDS.reshape(1, 2, 5), "attention_mask": torch.ones(1, 2, 5).long()}
        scores.append(scorer.module(**text).logits)
    assert low_rank_layers(scorer.module) == len(ranks)
    assert low_rank_layers(fishertool.load_model("low")) == len(ranks)
    torch.testing.assert_close(scores[1], scores[0], **CLOSE)


def test_sentence_transformers_itself(make_model: ModelMaker) -> None:
    package = pytest.importorskip("sentence_transformers")
    pooling = {"pooling_mode": "mean", "embedding_dimension": 16}
    dense = make_sentence_model(make_model, pooling, pooling_type=RECENT + "Pooling")
    make_low_rank(dense, Path("low"))
    texts = ["the red cat", "a dog sleeps"]
    wanted, ours = (
        package.SentenceTransformer(str(folder), device="cpu").encode(texts)
        for folder in (dense, Path("low"))
    )
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(wanted), **CLOSE)


def test_generation(make_model: ModelMaker) -> None:
    dense = make_model("dense", "gpt2", spread=0.3)
    make_low_rank(dense, Path("low"))
    wanted, ours = (
        fishertool.load_model(folder).generate(IDS[:1], max_new_tokens=8, do_sample=False)
        for folder in (dense, "low")
    )
    assert torch.equal(ours, wanted)


def test_evaluate_and_estimate(cli: Cli, make_model: ModelMaker, data: Path) -> None:
    dense = make_model("dense", spread=0.1)
    make_low_rank(dense, Path("low"))
    result = cli("evaluate", "low", "--data", data, "--against", dense, "--json")
    assert result.code == 0, result.err
    assert result.report["summary"]["kl"] == pytest.approx(0, abs=1e-6)
    assert result.report["summary"]["top1_agreement"] == 1

    result = cli("estimate-fisher", "low", "--data", data, "--out", "fisher", "--json")
    assert result.code == 0, result.err
    tensors, _ = open_sidecar(Path("fisher"), "diagonal")
    with tensors, open_checkpoint(Path("low")) as low:
        factors = [name for name in low if ".down." in name or ".up." in name]
        assert len(factors) > 12
        for name in factors:
            assert tensors.info(name).shape == low.info(name).shape
            assert bool((tensors[name] >= 0).all())
            assert float(tensors[name].sum()) > 0


@pytest.mark.parametrize("device_map", ["auto", "sequential", "meta"])
def test_device_maps(make_model: ModelMaker, device_map: str) -> None:
    ranks = make_low_rank(make_model("dense"), Path("low"))
    model = fishertool.load_model("low", device_map=device_map)
    assert low_rank_layers(model) == len(ranks)
    assert all(one.is_meta == (device_map == "meta") for one in model.parameters())


QUERY = "bert.encoder.layer.0.attention.self.query"


def change_ranks(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def change_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = tensors_of(folder)
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return apply


def fake_module(name: str) -> Callable[[Path], None]:
    """Whole factors under a name."""

    def apply(folder: Path) -> None:
        def add(tensors: dict[str, Tensor]) -> None:
            tensors.pop(f"{name}.weight", None)
            tensors[f"{name}.weight"] = torch.empty(0)
            tensors[f"{name}.down.weight"] = torch.ones(2, 16)
            tensors[f"{name}.up.weight"] = torch.ones(23, 2)

        change_tensors(add)(folder)
        change_ranks(lambda settings: settings["ranks"].update({name: 2}))(folder)

    return apply


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "another version": (
        change_ranks(lambda settings: settings.update(format_version=2)),
        "low-rank format 2; this version of fishertool reads 1",
    ),
    "no version": (
        change_ranks(lambda settings: settings.pop("format_version")),
        "low-rank format None",
    ),
    "no ranks": (change_ranks(lambda settings: settings.pop("ranks")), "gives no ranks"),
    "a list of ranks": (change_ranks(lambda settings: settings.update(ranks=[16])), "no ranks"),
    "a fraction": (
        change_ranks(lambda settings: settings["ranks"].update({QUERY: 16.0})),
        f"the rank of {QUERY} is 16.0",
    ),
    "a word": (
        change_ranks(lambda settings: settings["ranks"].update({QUERY: "16"})),
        f"the rank of {QUERY} is '16'",
    ),
    "truth": (
        change_ranks(lambda settings: settings["ranks"].update({QUERY: True})),
        f"the rank of {QUERY} is True",
    ),
    "zero": (
        change_ranks(lambda settings: settings["ranks"].update({QUERY: 0})),
        f"the rank of {QUERY} is 0",
    ),
    "another rank": (
        change_ranks(lambda settings: settings["ranks"].update({QUERY: 9})),
        f"tensor {QUERY}.down.weight is [16, 16], but config.json gives {QUERY} rank 9",
    ),
    "a rank lost": (
        change_ranks(lambda settings: settings["ranks"].pop(QUERY)),
        f"gives no rank for {QUERY}",
    ),
    "unknown": (
        change_ranks(lambda settings: settings["ranks"].update({"bert.pooler.sense": 4})),
        "lacks bert.pooler.sense.down.weight, bert.pooler.sense.up.weight",
    ),
    "unknown, with factors": (
        fake_module("bert.encoder.layer.7.output.dense"),
        "has factors of bert.encoder.layer.7.output.dense, and a BertForSequenceClassification no",
    ),
    "an embedding": (
        fake_module("bert.embeddings.word_embeddings"),
        "bert.embeddings.word_embeddings is of class Embedding in a BertForSequenceClassification, "
        "which cannot be low-rank as linear layers are",
    ),
    "no embedding": (
        change_ranks(lambda settings: settings.update(embedding=QUERY)),
        f"{QUERY} is of class Linear in a BertForSequenceClassification, which cannot be low-rank "
        "as token embeddings are",
    ),
    "an embedding of no rank": (
        change_ranks(lambda settings: settings.update(embedding="bert.pooler")),
        "says that the embedding is 'bert.pooler', of which it gives no rank",
    ),
    "a list of embeddings": (
        change_ranks(lambda settings: settings.update(embedding=[[QUERY]])),
        f"says that the embedding is [['{QUERY}']]",
    ),
    "down missing": (
        change_tensors(lambda tensors: tensors.pop(f"{QUERY}.down.weight")),
        f"lacks {QUERY}.down.weight",
    ),
    "up missing": (
        change_tensors(lambda tensors: tensors.pop(f"{QUERY}.up.weight")),
        f"lacks {QUERY}.up.weight",
    ),
    "bias missing": (
        change_tensors(lambda tensors: tensors.pop(f"{QUERY}.up.bias")),
        f"the factors of {QUERY} make up [16, 16]; a BertForSequenceClassification wants "
        "[16, 16] and a bias",
    ),
    "dense as well": (
        change_tensors(lambda tensors: tensors.update({f"{QUERY}.weight": torch.ones(16, 16)})),
        f"tensor {QUERY}.weight is F32 [16, 16]",
    ),
    "another side": (
        change_tensors(lambda tensors: tensors.update({f"{QUERY}.up.weight": torch.ones(8, 16)})),
        f"the factors of {QUERY} make up [8, 16] and a bias",
    ),
    "two dtypes": (
        change_tensors(
            lambda tensors: tensors.update(
                {f"{QUERY}.up.weight": tensors[f"{QUERY}.up.weight"].half()}
            )
        ),
        "its factors have one dtype",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_whole_is_refused(
    cli: Cli, make_model: ModelMaker, data: Path, case: str
) -> None:
    damage, told = BROKEN[case]
    make_low_rank(make_model("dense"), Path("low"))
    damage(Path("low"))
    for strict in (False, True):
        with pytest.raises(InputError, match=re.escape(told)) as refused:
            transformers.AutoModelForSequenceClassification.from_pretrained(
                "low", ignore_mismatched_sizes=strict
            )
        assert "low" in str(refused.value).split(":")[0]
    result = cli("evaluate", "low", "--data", data)
    assert result.code == 3
    assert told in result.err


def test_tied_weights_are_refused(make_model: ModelMaker) -> None:
    make_low_rank(make_model("dense", "llama", tied=True), Path("low"))
    fake_module("lm_head")(Path("low"))
    with pytest.raises(InputError, match="lm_head is tied to another weight"):
        fishertool.load_model("low")


def test_fused_experts_are_refused() -> None:
    ARCHITECTURES["mixtral"]().save_pretrained("dense")
    expert = next(name for name in tensors_of(Path("dense")) if "experts.0.w1" in name)
    make_low_rank(Path("dense"), Path("low"), select=re.escape(expert))
    with pytest.raises(
        InputError, match=r"experts\.0\.w1 is a part of a fused weight in a Mixtral"
    ):
        fishertool.load_model("low")


def test_a_factor_that_does_not_arrive_is_refused(make_model: ModelMaker) -> None:
    """Were transformers to take a name for another's, numbers would be random."""
    make_low_rank(make_model("dense"), Path("low"))
    with pytest.raises(InputError, match=r"self\.query\.up\.weight did not arrive in Bert"):
        transformers.AutoModelForSequenceClassification.from_pretrained(
            "low", key_mapping={r"self\.query\.up\.": "self.key.up."}
        )


def test_only_safetensors_files_are_read(make_model: ModelMaker) -> None:
    make_low_rank(make_model("dense"), Path("low"))
    config = transformers.AutoConfig.from_pretrained("low")
    with pytest.raises(InputError, match="read from safetensors files alone"):
        transformers.BertForSequenceClassification.from_pretrained(
            None, config=config, state_dict=tensors_of(Path("low"))
        )


def test_dense_weights_are_not_made_low_rank_on_load(make_model: ModelMaker) -> None:
    settings = {"quant_method": "low_rank", "format_version": 1, "ranks": {QUERY: 4}}
    with pytest.raises(ValueError, match="pre-quantized"):
        transformers.AutoModelForSequenceClassification.from_pretrained(
            make_model("dense"),
            quantization_config=transformers.quantizers.AutoQuantizationConfig.from_dict(settings),
        )


def test_load_model_loads_dense_folders_too_and_names_what_it_cannot(
    make_model: ModelMaker,
) -> None:
    dense = make_model("dense", "t5")
    assert type(fishertool.load_model(dense)) is transformers.T5ForConditionalGeneration
    shutil.copytree(dense, "odd")
    config = json.loads(Path("odd/config.json").read_text())
    Path("odd/config.json").write_text(json.dumps(config | {"architectures": ["OddModel"]}))
    with pytest.raises(InputError, match=r"odd/config\.json: architecture OddModel is not in"):
        fishertool.load_model("odd")


LOAD = (
    "model = transformers.AutoModelForSequenceClassification.from_pretrained('low');"
    "assert type(model.bert.encoder.layer[0].attention.self.query).__name__ == 'LowRankLinear';"
)
ORDERS = {
    "before": "import fishertool, transformers;" + LOAD,
    "after": "import transformers, fishertool;" + LOAD,
    "after all of it": "import transformers.modeling_utils, transformers, fishertool;" + LOAD,
    "the plug-in first and twice": "import fishertool.models.quantizer as plugin, importlib;"
    "import transformers; importlib.reload(plugin);" + LOAD,
    "twice": "import fishertool, importlib; importlib.reload(fishertool);"
    "model = fishertool.load_model('low'); importlib.reload(fishertool);"
    "import transformers, inspect;"
    "assert type(model) is transformers.BertForSequenceClassification;"
    "assert 'HfQuantizer' in inspect.getsource(transformers.quantizers);"
    "assert type(transformers.quantizers.__loader__).__module__ != 'fishertool.plugin';" + LOAD,
    "looked for, then loaded in a thread": "import fishertool, importlib.util, threading;"
    "assert importlib.util.find_spec('transformers.quantizers').origin;"
    "one = threading.Thread(target=lambda: __import__('transformers.modeling_utils'));"
    "one.start(); one.join(); import transformers;" + LOAD,
}


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("order", ORDERS)
def test_an_import_is_all_that_is_needed(make_model: ModelMaker, order: str) -> None:
    make_low_rank(make_model("dense"), Path("low"))
    done = run_python(ORDERS[order])
    assert done.returncode == 0, done.stderr


def test_importing_loads_nothing_heavy() -> None:
    code = (
        "import fishertool, sys;"
        "assert not {'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_without_the_plugin_nothing_loads(make_model: ModelMaker) -> None:
    make_low_rank(make_model("dense"), Path("low"))
    done = run_python(
        """
import transformers
for name in ("AutoModelForSequenceClassification", "AutoModel", "BertForMaskedLM"):
    try:
        getattr(transformers, name).from_pretrained("low")
    except RuntimeError as error:
        assert "ignore_mismatched_sizes" in str(error)
        print("refused")
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["refused"] * 3
