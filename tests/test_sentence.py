"""Sentence-transformers folders: their modules, their poolings, and scores of documents."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Cli, ModelMaker, make_text, write_rows
from safetensors.torch import load_file, save_file
from torch import Tensor

from fishertool.calibration import Example
from fishertool.checkpoint.reader import open_checkpoint
from fishertool.errors import InputError
from fishertool.models.loading import LoadedModel, load_model
from fishertool.models.sentence import pipeline_of, transformer_folder
from fishertool.models.tasks import TASKS, collate, task_of
from fishertool.sidecar import open_sidecar

MEAN = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
LEGACY = "sentence_transformers.models."
RECENT = "sentence_transformers.sentence_transformer.modules.pooling."


def make_sentence_model(
    make_model: ModelMaker,
    pooling: dict[str, Any] = MEAN,
    transformer: str = "",
    more: tuple[str, ...] = ("Normalize",),
    pooling_type: str = LEGACY + "Pooling",
) -> Path:
    """A tiny BERT as sentence-transformers stores it; the pooling lies in 1_Pooling."""
    folder = make_model(f"s/{transformer}", head="Model", spread=0.15)
    top = folder.parent if transformer else folder
    types = [LEGACY + "Transformer", pooling_type, *(LEGACY + kind for kind in more)]
    modules = []
    for number, name in enumerate(types):
        path = transformer if number == 0 else f"{number}_{name.rpartition('.')[2]}"
        modules.append({"idx": number, "name": str(number), "path": path, "type": name})
    (top / "modules.json").write_text(json.dumps(modules))
    (top / "1_Pooling").mkdir()
    (top / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return top


def add_dense(folder: Path, number: int = 2, **settings: Any) -> tuple[Tensor, Tensor]:
    weight, bias = torch.randn(5, 16), torch.randn(5)
    (dense := folder / f"{number}_Dense").mkdir()
    save_file({"linear.weight": weight, "linear.bias": bias}, dense / "model.safetensors")
    given = {"activation_function": "torch.nn.modules.activation.Tanh"} | settings
    (dense / "config.json").write_text(json.dumps(given))
    return weight, bias


def load(folder: Path) -> LoadedModel:
    with open_checkpoint(transformer_folder(folder)) as checkpoint:
        task = task_of(checkpoint.config(), checkpoint.folder)
        assert task.name == "embedding"
        return load_model(checkpoint, task, scale=7)


EXAMPLES = [
    Example({"input_ids": [2, 5, 6, 3]}, None, 0, candidates=[{"input_ids": [2, 3]}, {"input_ids": [7]}]),
    Example({"input_ids": [8]}, None, 0, candidates=[{"input_ids": [4] * 6}, {"input_ids": [9, 5]}]),
]  # fmt: skip
POOLED = {
    "cls": lambda h: h[0],
    "max": lambda h: h.max(0).values,
    "mean": lambda h: h.mean(0),
    "mean_sqrt_len_tokens": lambda h: h.sum(0) / len(h) ** 0.5,
    "weightedmean": lambda h: sum((n + 1) * row for n, row in enumerate(h)),
    "lasttoken": lambda h: h[-1],
}
FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def check_scores(loaded: LoadedModel, vector: Any) -> None:
    """Logits of a padded batch are 7 x the cosines of texts encoded alone."""
    with torch.no_grad():
        batch = collate(TASKS["embedding"], EXAMPLES, [0, 1], 0, "cpu")
        logits = loaded.module(**batch.inputs).logits
        for example, scores in zip(EXAMPLES, logits, strict=True):
            alone = [
                vector(loaded.pretrained(torch.tensor([text["input_ids"]])).last_hidden_state[0])
                for text in example.texts
            ]
            expected = [7 * torch.cosine_similarity(alone[0], one, 0) for one in alone[1:]]
            torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flag", FLAGS)
def test_every_pooling_ignores_padding(make_model: ModelMaker, flag: str) -> None:
    folder = make_sentence_model(make_model, {name: name == flag for name in FLAGS})
    check_scores(load(folder), POOLED[FLAGS[flag]])


def test_recent_names_and_several_modes(make_model: ModelMaker) -> None:
    settings = {"pooling_mode": ["max", "lasttoken"], "embedding_dimension": 16}
    folder = make_sentence_model(make_model, settings, pooling_type=RECENT + "Pooling")
    check_scores(load(folder), lambda h: torch.cat([h.max(0).values, h[-1]]))


def test_the_transformer_may_lie_below(make_model: ModelMaker) -> None:
    folder = make_sentence_model(make_model, transformer="0_Transformer")
    assert transformer_folder(folder) == folder / "0_Transformer"
    assert transformer_folder(folder / "0_Transformer") == folder / "0_Transformer"
    loaded = load(folder)
    assert loaded.warnings == []
    check_scores(loaded, POOLED["mean"])


def test_dense_takes_part_and_says_that_it_has_no_fisher(make_model: ModelMaker) -> None:
    folder = make_sentence_model(make_model, more=("Dense", "Normalize"))
    weight, bias = add_dense(folder)
    loaded = load(folder)
    check_scores(loaded, lambda h: torch.tanh(weight @ h.mean(0) + bias))
    assert "2_Dense: has a file of its own" in loaded.warnings[0]


def test_the_limit_of_texts_and_what_is_told(make_model: ModelMaker) -> None:
    folder = make_sentence_model(make_model)
    assert load(folder).max_length == 32
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 9}')
    prompts = {"prompts": {"query": "find: ", "document": ""}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    loaded = load(folder)
    assert loaded.max_length == 9
    assert "the model's prompts (query) are not added" in loaded.warnings[0]


@pytest.mark.parametrize(
    ("modules", "told"),
    [
        (
            [(LEGACY + "Transformer", ""), (LEGACY + "LSTM", "1")],
            "module 1 is .*LSTM, .*not served",
        ),
        ([("custom.Transformer", "")], r"module 0 is custom\.Transformer"),
        ([(LEGACY + "Pooling", "")], "module 0 is .*Pooling"),
        ([(LEGACY + "Transformer", "../x"), (LEGACY + "Pooling", "1")], "out of the folder"),
        ([(LEGACY + "Transformer", "")], "no Pooling"),
    ],
)
def test_modules_that_are_not_served(
    tmp_path: Path, modules: list[tuple[str, str]], told: str
) -> None:
    content = [{"type": kind, "path": path} for kind, path in modules]
    (tmp_path / "modules.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"modules\.json: .*{told}"):
        pipeline_of(tmp_path)


def test_modules_of_the_folder_above_are_another_models(make_model: ModelMaker) -> None:
    folder = make_model("s/plain", head="Model")
    listed = [{"type": "custom.Thing", "path": "0_Other"}]
    (folder.parent / "modules.json").write_text(json.dumps(listed))
    assert pipeline_of(folder) is None


@pytest.mark.parametrize("content", ["{}", "3", '[{"path": ""}]', "["])
def test_modules_that_cannot_be_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(InputError, match=r"modules\.json: "):
        pipeline_of(tmp_path)


def test_settings_that_are_not_served(make_model: ModelMaker) -> None:
    folder = make_sentence_model(make_model, {"pooling_mode": "attention"}, more=("Dense",))
    with pytest.raises(
        InputError, match="pooling mode 'attention' is not served; served: cls, max"
    ):
        load(folder)
    (folder / "1_Pooling" / "config.json").write_text("{}")
    add_dense(folder, use_residual=True)
    with pytest.raises(InputError, match="only a plain Dense module"):
        load(folder)


@pytest.mark.parametrize("transformer", ["", "0_Transformer"])
def test_estimate_through_the_command_line(
    cli: Cli, make_model: ModelMaker, transformer: str, tmp_path: Path
) -> None:
    folder = make_sentence_model(make_model, transformer=transformer)
    write_rows(
        "d.jsonl", [{"query": make_text(n, 2), "positive": make_text(9 + n, 3)} for n in range(5)]
    )
    flags = ("--kind", "diagonal,factored,kronecker,rank-one", "--bank-dtype", "float32")
    result = cli("estimate-fisher", folder, "--data", "d.jsonl", *flags, "--out", "f", "--json")
    assert result.code == 0, result.err
    options = result.report["options"]["data"]
    assert (options["query_column"], options["scale"]) == ("query", 20)  # as resolved
    sidecar, header = open_sidecar(tmp_path / "f")
    with sidecar:
        assert header.scale == 20
    diagonal = load_file(tmp_path / "f" / "diagonal.safetensors")
    assert set(diagonal) == set(load_file(folder / transformer / "model.safetensors"))
    bank = load_file(tmp_path / "f" / "rank-one.safetensors")
    for name, value in diagonal.items():
        torch.testing.assert_close(bank[name].square().mean(0), value, rtol=1e-4, atol=1e-9)
    assert not diagonal["pooler.dense.weight"].any() and not bank["pooler.dense.weight"].any()
    assert "pooler.dense.weight#output" not in load_file(tmp_path / "f" / "kronecker.safetensors")
    assert any("pooler.dense.weight: no part of" in told for told in result.report["warnings"])


def test_a_language_model_without_its_head(
    cli: Cli, make_model: ModelMaker, tmp_path: Path
) -> None:
    """Its names on disk have a prefix that the bare model's do not."""
    folder = make_model("g", "gpt2", spread=0.15)
    write_rows("d.jsonl", [{"query": "the cat", "positive": "a dog", "negative": "a red bird"}])
    flags = ("--task", "embedding", "--out", "f")
    result = cli("estimate-fisher", folder, "--data", "d.jsonl", *flags)
    assert result.code == 0, result.err
    assert "no modules.json says how tokens become one vector; taking their mean" in result.err
    diagonal = load_file(tmp_path / "f" / "diagonal.safetensors")
    assert set(diagonal) == set(load_file(folder / "model.safetensors"))
    assert all(value.any() for value in diagonal.values())


def test_encoders_and_decoders(make_model: ModelMaker) -> None:
    """T5's encoder alone embeds; with its decoder it does not, and a text model needs one."""
    folder = make_model("t", "t5")
    with open_checkpoint(folder) as checkpoint:
        config = checkpoint.config()
        assert task_of(config, folder).name == "sequence-to-sequence"
        assert task_of(config | {"architectures": ["T5EncoderModel"]}, folder).name == "embedding"
        for other in ({"architectures": ["T5Model"]}, {"is_encoder_decoder": False}):
            with pytest.raises(InputError, match="no task follows"):
                task_of(config | other, folder)
        with pytest.raises(InputError, match="T5ForConditionalGeneration does not fit --task emb"):
            load_model(checkpoint, TASKS["embedding"])
    torch.manual_seed(0)
    whole = transformers.T5ForConditionalGeneration.from_pretrained(folder)
    transformers.T5EncoderModel.from_pretrained(folder).save_pretrained(folder)
    loaded = load(folder)
    ids = torch.tensor([[5, 6, 7]])
    found = loaded.pretrained(ids).last_hidden_state
    torch.testing.assert_close(found, whole.eval().encoder(ids).last_hidden_state)


def test_the_real_model(cli: Cli, real_model: Path) -> None:
    flags = ("--include", "encoder.layer.0.*", "--max-length", 24, "--labels", "expected")
    result = cli(
        "estimate-fisher", real_model, "--data", "pairs.jsonl", *flags, "--out", "f", "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    summary = result.report["summary"]
    assert (summary["task"], summary["examples"]) == ("embedding", 5)
    assert 0 < summary["loss"] < 1.0  # of five documents; chance is log 5 = 1.6
    assert not summary["one_example_at_a_time"]
