"""`fishertool evaluate`, through the command line."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import Cli, ModelMaker, make_text
from safetensors.torch import load_file, save_file


def test_classifier_against_itself(cli: Cli, make_model: ModelMaker, data: Path) -> None:
    model = make_model("a")
    result = cli("evaluate", model, "--data", data, "--against", model, "--json")
    assert result.code == 0, result.err
    summary = result.report["summary"]
    assert summary["examples"] == 12
    assert summary["kl"] == pytest.approx(0, abs=1e-7)
    assert summary["top1_agreement"] == 1
    assert result.report["evaluation"]["against"]["accuracy"] == summary["accuracy"]


def test_classifier_metrics_equal_a_plain_loop(
    cli: Cli, make_model: ModelMaker, data: Path
) -> None:
    folder = make_model("a")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    losses, hits = [], []
    for row in rows:
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], return_tensors="pt")).logits[0].double()
        losses.append(-torch.log_softmax(logits, -1)[row["label"]].item())
        hits.append(logits.argmax().item() == row["label"])
    summary = cli("evaluate", folder, "--data", data, "--batch-size", 5, "--json").report["summary"]
    assert summary["loss"] == pytest.approx(sum(losses) / 12, rel=1e-5)
    assert summary["accuracy"] == pytest.approx(sum(hits) / 12)


def test_language_model_names_its_convention(cli: Cli, make_model: ModelMaker) -> None:
    model = make_model("g", "gpt2")
    Path("text.txt").write_text(make_text(1, 70) + "\n\n" + make_text(2, 5) + "\n")
    result = cli("evaluate", model, "--data", "text.txt", "--max-length", 16, "--json")
    assert result.code == 0, result.err
    assert "non-overlapping blocks of 16" in result.report["evaluation"]["convention"]
    assert any("1 rows without text" in warning for warning in result.report["warnings"])
    whole = cli(
        "evaluate", model, "--data", "text.txt", "--max-length", 16, "--batch-size", 1, "--json"
    )
    assert whole.report["summary"]["perplexity"] == pytest.approx(
        result.report["summary"]["perplexity"], rel=1e-5
    )


@pytest.mark.parametrize(
    ("flags", "met"),
    [
        (["--min", "accuracy=0"], True),
        (["--min", "accuracy=1.1"], False),
        (["--max", "loss=100"], True),
        (["--max", "loss=0"], False),
        (["--max-kl", "0.5"], True),
        (["--max-kl", "1e-12"], False),
        (["--max-drop", "loss=1"], True),
        (["--max-drop", "loss=-10"], False),
    ],
)
def test_gates(cli: Cli, make_model: ModelMaker, data: Path, flags: list[str], met: bool) -> None:
    a, b = make_model("a", seed=1), make_model("b", seed=2)
    result = cli("evaluate", a, "--data", data, "--against", b, *flags, "--json")
    assert result.code == (0 if met else 4)
    assert result.report["status"] == ("ok" if met else "gate-not-met")
    assert ("quality gate not met" in result.err) is not met


def test_drop_is_worsening_whatever_the_metric(
    cli: Cli, make_model: ModelMaker, data: Path
) -> None:
    a, b = make_model("a", seed=1), make_model("b", seed=2)
    flags = ("--max-drop", "accuracy=9", "--max-drop", "loss=9")
    report = cli("evaluate", a, "--data", data, "--against", b, *flags, "--json").report
    mine, theirs = report["summary"], report["evaluation"]["against"]
    drops = {gate["metric"]: gate["value"] for gate in report["evaluation"]["gates"]}
    assert drops["accuracy"] == pytest.approx(theirs["accuracy"] - mine["accuracy"])
    assert drops["loss"] == pytest.approx(mine["loss"] - theirs["loss"])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--min", "acuracy=1"], "did you mean 'accuracy'?"),
        (["--max-kl", "1"], "--against"),
        (["--max-drop", "loss=1"], "--against"),
        (["--min", "perplexity=1"], "not measured here"),
        (["--task", "causal"], "did you mean 'causal-lm'?"),
        (["--device", "cuda:9"], "--device"),
    ],
)
def test_bad_flags(
    cli: Cli, make_model: ModelMaker, data: Path, flags: list[str], told: str
) -> None:
    result = cli("evaluate", make_model("a"), "--data", data, *flags)
    assert result.code == 2, result.err
    assert told in result.err


def write_rows(path: str, rows: list[object]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"text": "cat", "label": 3}], "row 0: label 3"),
        ([{"text": "cat", "label": 0}, {"text": "dog", "label": "wolf"}], "row 1: label 'wolf'"),
        ([{"text": "cat", "label": -1}], "label -1"),
        ([{"text": "cat", "label": 0.5}], "label 0.5"),
        ([{"text": "cat"}], "no column 'label'"),
        ([{"body": "cat", "label": 0}], "no column 'text'; it has body, label"),
        ([{"text": "", "label": 0}, {"text": None, "label": 1}], "no rows with text"),
        ([{"text": 5, "label": 0}], "row 0: its text is int"),
    ],
)
def test_bad_data(cli: Cli, make_model: ModelMaker, rows: list[object], told: str) -> None:
    write_rows("bad.jsonl", rows)
    result = cli("evaluate", make_model("a"), "--data", "bad.jsonl")
    assert result.code == 3, result.err
    assert told in result.err
    assert "bad.jsonl" in result.err


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("no.jsonl", None, "no such file"),
        ("empty.jsonl", "", "is empty"),
        ("cut.jsonl", '{"text": "cat", "la', "not readable as jsonl"),
        ("table.parquet", "this is no parquet", "not readable as parquet"),
        ("data.xml", "<a/>", "unknown suffix"),
    ],
)
def test_bad_data_files(
    cli: Cli, make_model: ModelMaker, name: str, content: str | None, told: str
) -> None:
    if content is not None:
        Path(name).write_text(content)
    result = cli("evaluate", make_model("a"), "--data", name)
    assert result.code == 3, result.err
    assert told in result.err
    assert name in result.err


def test_every_format_reads_the_same(cli: Cli, make_model: ModelMaker) -> None:
    import pandas

    table = pandas.DataFrame(
        {"words": [make_text(n, 4) for n in range(6)], "topic": [f"class{n % 3}" for n in range(6)]}
    )
    table.to_json("d.jsonl", orient="records", lines=True)
    table.to_json("d.json", orient="records")
    table.to_csv("d.csv", index=False)
    table.to_csv("d.tsv", index=False, sep="\t")
    table.to_parquet("d.parquet")
    model = make_model("a")
    seen = set()
    for suffix in ("jsonl", "json", "csv", "tsv", "parquet"):
        flags = ("--text-column", "words", "--label-column", "topic", "--json")
        result = cli("evaluate", model, "--data", f"d.{suffix}", *flags)
        assert result.code == 0, result.err
        seen.add(result.report["calibration"]["token_ids_sha256"])
    assert len(seen) == 1


def test_shuffle_num_examples_and_truncation(cli: Cli, make_model: ModelMaker, data: Path) -> None:
    model = make_model("a")
    flags = ("--num-examples", 5, "--shuffle", "--json")
    first = cli("evaluate", model, "--data", data, *flags).report["calibration"]
    again = cli("evaluate", model, "--data", data, *flags).report["calibration"]
    other = cli("evaluate", model, "--data", data, *flags, "--seed", 7).report["calibration"]
    assert first == again
    assert first["examples"] == 5
    assert first["token_ids_sha256"] != other["token_ids_sha256"]
    cut = cli("evaluate", model, "--data", data, "--max-length", 6, "--json").report
    assert cut["calibration"]["truncated"] == 10
    assert any("were cut at 6 tokens" in warning for warning in cut["warnings"])


def test_text_pairs_and_chats(cli: Cli, make_model: ModelMaker) -> None:
    model = make_model("a")
    write_rows("pairs.jsonl", [{"text": "the cat", "other": "a dog", "label": 1}])
    single = cli("evaluate", model, "--data", "pairs.jsonl", "--json").report
    pair = cli(
        "evaluate", model, "--data", "pairs.jsonl", "--text-pair-column", "other", "--json"
    ).report
    assert pair["summary"]["tokens"] == single["summary"]["tokens"] + 3
    llama = make_model("l", "llama")
    write_rows("chat.jsonl", [{"messages": [{"role": "user", "content": "the red cat"}]}])
    flags = ("--data", "chat.jsonl", "--chat-column", "messages")
    assert "chat template" in cli("evaluate", llama, *flags).err
    template = "{% for m in messages %}the {{ m['content'] }} and {% endfor %}"
    (llama / "chat_template.jinja").write_text(template)
    result = cli("evaluate", llama, *flags, "--json")
    assert result.code == 0, result.err
    assert result.report["summary"]["tokens"] == 5


def test_a_stored_padding_or_truncation_has_no_effect(
    cli: Cli, make_model: ModelMaker, data: Path
) -> None:
    """Tokenizers saved after training carry both; neither may leak into a measurement."""
    model = make_model("a")
    before = cli("evaluate", model, "--data", data, "--json").report
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.backend_tokenizer.enable_padding(length=20)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.save(str(model / "tokenizer.json"))
    after = cli("evaluate", model, "--data", data, "--json").report
    assert after["calibration"] == before["calibration"]
    assert after["summary"]["loss"] == pytest.approx(before["summary"]["loss"], rel=1e-5)


def test_nan_weights_meet_no_gate_and_print_strict_json(
    cli: Cli, make_model: ModelMaker, data: Path
) -> None:
    model = make_model("a")
    tensors = load_file(model / "model.safetensors")
    tensors["classifier.bias"][0] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    result = cli("evaluate", model, "--data", data, "--max", "loss=100", "--json")
    assert result.code == 4
    assert result.report["summary"]["loss"] is None


@pytest.mark.parametrize(
    ("model", "code", "told"),
    [("nowhere", 3, "no such folder"), ("org/name", 6, "not fetched from the Hub")],
)
def test_models_that_cannot_be_had(cli: Cli, data: Path, model: str, code: int, told: str) -> None:
    result = cli("evaluate", model, "--data", data)
    assert result.code == code
    assert told in result.err
    assert result.err.count("\n") == 1


def test_a_hub_dataset_that_cannot_be_had(cli: Cli, make_model: ModelMaker) -> None:
    result = cli("evaluate", make_model("a"), "--data", "org/dataset")
    assert result.code == 6, result.err
    assert "org/dataset" in result.err
