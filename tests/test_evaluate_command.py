"""`fishertool evaluate`, through the command line."""

import json
import os
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from conftest import VOCABULARY, Cli, ModelMaker, make_text, write_rows
from safetensors.torch import load_file, save_file

from fishertool.commands.evaluate import _gate_rows
from fishertool.models.loading import check_device


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


def test_a_drop_that_is_the_limit_but_for_rounding_is_met() -> None:
    drop = {"max_drop": {"accuracy": 0.1}}
    [gate] = _gate_rows(drop, {"accuracy": 0.7}, {"accuracy": 0.8})
    assert gate["value"] > 0.1 and gate["met"]
    [gate] = _gate_rows(drop, {"accuracy": 0.7}, {"accuracy": 0.8001})
    assert not gate["met"]


def permute_classes(folder: Path, order: list[int], named: bool = True) -> None:
    """The same function with its classes in another order, which id2label tells if `named`."""
    tensors = load_file(folder / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        tensors[name] = tensors[name][order].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if named:
        rename_classes(folder, [f"class{number}" for number in order])


def rename_classes(folder: Path, names: list[str]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = dict(enumerate(names))
    config["label2id"] = {name: number for number, name in enumerate(names)}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("names", [False, True])
def test_classes_go_by_their_names(
    cli: Cli, make_model: ModelMaker, data: Path, names: bool
) -> None:
    a, b = make_model("a", spread=0.3), make_model("b", spread=0.3)
    permute_classes(b, [2, 0, 1])
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    if names:
        write_rows(str(data), [row | {"label": f"class{row['label']}"} for row in rows])
    flags = ("--data", data, "--against", b, "--max-kl", "1e-6", "--json")
    result = cli("evaluate", a, *flags)
    assert result.code == 0, result.err
    assert result.report["summary"]["top1_agreement"] == 1
    theirs = result.report["evaluation"]["against"]
    assert theirs == pytest.approx({name: result.report["summary"][name] for name in theirs})


def test_classes_without_names_go_by_their_places(
    cli: Cli, make_model: ModelMaker, data: Path
) -> None:
    a, b = make_model("a", spread=0.3), make_model("b", spread=0.3)
    permute_classes(b, [2, 0, 1], named=False)
    rename_classes(b, ["LABEL_0", "LABEL_1", "LABEL_2"])
    result = cli("evaluate", a, "--data", data, "--against", b, "--json")
    assert result.code == 0 and result.report["summary"]["kl"] > 1e-3, result.err


def test_models_of_other_classes_or_tokens(cli: Cli, make_model: ModelMaker, data: Path) -> None:
    a, b = make_model("a"), make_model("b")
    rename_classes(b, ["class0", "class1", "cat"])
    result = cli("evaluate", a, "--data", data, "--against", b)
    assert result.code == 3
    assert f"{a} and {b} have other classes, only one of them cat, class2;" in result.err
    c = make_model("c")
    tokenizer = json.loads((c / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]
    (c / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = cli("evaluate", a, "--data", data, "--against", c)
    assert result.code == 3
    assert f"{a} and {c}: token 9 is 'cat' to the first and 'dog'" in result.err


def test_each_model_pads_with_its_own_token(cli: Cli, make_model: ModelMaker, data: Path) -> None:
    """A classifier on a decoder looks for the last token that is no padding."""
    folders = [make_model(name, "llama") for name in ("a", "b")]
    for folder, pad in zip(folders, ("[PAD]", "[UNK]"), strict=True):
        config = transformers.AutoConfig.from_pretrained(folder, num_labels=3)
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        model.config.pad_token_id = VOCABULARY[pad]
        model.save_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token = pad
        tokenizer.save_pretrained(folder)
    a, b = folders
    result = cli("evaluate", a, "--data", data, "--against", b, "--max-kl", "1e-9", "--json")
    assert result.code == 0, result.err or result.report["summary"]
    theirs = result.report["evaluation"]["against"]
    assert theirs == {name: result.report["summary"][name] for name in theirs}


def test_texts_fit_the_positions_of_both(cli: Cli, make_model: ModelMaker) -> None:
    a, b = make_model("a", "gpt2"), make_model("b", "gpt2")
    tensors = load_file(b / "model.safetensors")
    tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"][:8].contiguous()
    save_file(tensors, b / "model.safetensors", {"format": "pt"})
    config = json.loads((b / "config.json").read_text())
    (b / "config.json").write_text(json.dumps(config | {"n_positions": 8}))
    Path("d.txt").write_text(make_text(0, 30) + "\n")
    for flags in ((a, "--against", b), (b, "--against", a)):
        result = cli("evaluate", *flags, "--data", "d.txt", "--json")
        assert result.code == 0, result.err
        assert result.report["calibration"]["max_length"] == 8
        assert result.report["summary"]["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("against", "flags", "told"),
    [
        (True, ["--max", "kl=1", "--max-kl", "2"], "--max-kl and --max kl are the same"),
        (True, ["--max-drop", "kl=1"], "--max-drop kl: is between the two models already; use --max-kl"),
        (True, ["--max-drop", "top1_agreement=1"], "use --min top1_agreement"),
        (True, ["--min", "mean_cosine=1"], "mean_cosine is not measured here; measured: loss, accuracy"),
        (True, ["--max-drop", "mrr=1"], "mrr is not measured here"),
        (False, ["--max", "perplexity=1"], "perplexity is not measured here"),
    ],
)  # fmt: skip
def test_gates_that_cannot_be_are_told_before_the_work(
    cli: Cli,
    make_model: ModelMaker,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    against: bool,
    flags: list[str],
    told: str,
) -> None:
    monkeypatch.setattr("fishertool.commands.evaluate.load_model", None)
    model = make_model("a")
    more = ("--against", model) if against else ()
    result = cli("evaluate", model, "--data", data, *more, *flags)
    assert (result.code, told in result.err) == (2, True), result.err


def test_the_report_names_the_device(cli: Cli, make_model: ModelMaker, data: Path) -> None:
    report = cli("evaluate", make_model("a"), "--data", data, "--json").report
    assert report["environment"]["device"] == check_device("auto")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--min", "acuracy=1"], "did you mean 'accuracy'?"),
        (["--max-kl", "1"], "--against"),
        (["--max-drop", "loss=1"], "--against"),
        (["--min", "perplexity=1"], "not measured here"),
        (["--task", "causal"], "did you mean 'causal-lm'?"),
        (["--device", "cuda:9"], "--device"),
        (["--device", "mps"], "--device mps: is none of auto, cpu, cuda and cuda:N\n"),
        (["--min", "loss=nan"], "--min loss: nan is no limit"),
        (["--threads", "20000"], "--threads"),
        (["--data", ""], "--data: is empty"),
    ],
)
def test_bad_flags(
    cli: Cli, make_model: ModelMaker, data: Path, flags: list[str], told: str
) -> None:
    result = cli("evaluate", make_model("a"), "--data", data, *flags)
    assert result.code == 2, result.err
    assert told in result.err


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"text": "cat", "label": 3}], "row 0: label 3"),
        ([{"text": "cat", "label": 0}, {"text": "dog", "label": "wolf"}], "row 1: label 'wolf'"),
        ([{"text": "cat", "label": -1}], "label -1"),
        ([{"text": "cat", "label": 0.5}], "label 0.5"),
        ([{"text": "cat", "label": "\N{SUPERSCRIPT TWO}"}], "row 0: label '\N{SUPERSCRIPT TWO}'"),
        ([{"text": "cat", "label": 0}, {"text": "cat", "label": None}], "row 1: has no label"),
        ([{"text": "cat"}], "no column 'label'"),
        ([{"body": "cat", "label": 0}], "no column 'text'; it has 'body', 'label'"),
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
        ("header.csv", "text,label\n", "has no rows\n"),
        ("blank.jsonl", "\n\n", "has no rows\n"),
        ("list.json", "[]", "has no rows\n"),
        ("latin.csv", b"text,label\ncaf\xe9,0\n", "save it as UTF-8\n"),
        ("latin.txt", b"caf\xe9\n", "save it as UTF-8\n"),
    ],
)
def test_bad_data_files(
    cli: Cli, make_model: ModelMaker, name: str, content: str | bytes | None, told: str
) -> None:
    if content is not None:
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    result = cli("evaluate", make_model("a"), "--data", name)
    assert result.code == 3, result.err
    assert told in result.err
    assert name in result.err
    assert result.err.count("\n") == 1  # nothing of another library's


@pytest.mark.parametrize("name", ["no.jsonl", "data.xml", "empty.csv"])
def test_bad_data_files_are_told_before_a_model_is_opened(cli: Cli, name: str) -> None:
    if name != "no.jsonl":
        Path(name).touch()
    result = cli("evaluate", "no-model", "--data", name)
    assert (result.code, name in result.err) == (3, True), result.err


def test_a_parquet_file_without_rows(cli: Cli, make_model: ModelMaker) -> None:
    datasets.Dataset.from_dict({"text": [], "label": []}).to_parquet("none.parquet")
    result = cli("evaluate", make_model("a"), "--data", "none.parquet")
    assert (result.code, result.err) == (3, "fishertool: none.parquet: has no rows\n")


def test_what_is_no_file_of_data_is_told_as_what_it_is(cli: Cli) -> None:
    Path("folder.jsonl").mkdir()
    os.mkfifo("pipe.jsonl")
    for name, what in (("folder.jsonl", "a folder"), (".", "a folder"), ("pipe.jsonl", "no reg")):
        result = cli("evaluate", "no-model", "--data", name)
        assert (result.code, f"{name}: is {what}" in result.err) == (3, True), result.err


def test_a_byte_order_mark_is_no_text(cli: Cli, make_model: ModelMaker) -> None:
    model, text = make_model("g", "gpt2"), "the red cat\na dog runs\n"
    found = []
    for encoding, end in (("utf-8", "\n"), ("utf-8-sig", "\n"), ("utf-8-sig", "\r\n")):
        Path("t.txt").write_bytes(text.replace("\n", end).encode(encoding))
        found.append(cli("evaluate", model, "--data", "t.txt", "--json").report["calibration"])
    assert found[0] == found[1] == found[2]


def test_a_number_that_may_be_a_name_or_an_id_is_refused(cli: Cli, make_model: ModelMaker) -> None:
    model = make_model("a")
    config = json.loads((model / "config.json").read_text())
    config["id2label"] = {"0": "1", "1": "2", "2": "3"}
    config["label2id"] = {"1": 0, "2": 1, "3": 2}
    (model / "config.json").write_text(json.dumps(config))
    write_rows("names.jsonl", [{"text": "a cat", "label": "2"}])
    assert cli("evaluate", model, "--data", "names.jsonl").code == 0
    Path("numbers.csv").write_text("text,label\na cat,2\n")
    result = cli("evaluate", model, "--data", "numbers.csv")
    assert (result.code, "named '2', whose id is 1, or the one" in result.err) == (3, True)


def test_a_file_name_is_no_pattern(cli: Cli, make_model: ModelMaker, data: Path) -> None:
    data.rename(data.with_name("data[1]*.jsonl"))
    result = cli("evaluate", make_model("a"), "--data", "data[1]*.jsonl", "--json")
    assert result.code == 0, result.err
    assert result.report["summary"]["examples"] == 12


def test_tokens_that_the_data_lack_must_be_the_same_too(
    cli: Cli, make_model: ModelMaker, tmp_path: Path
) -> None:
    """A divergence is over all of them."""
    a, b = make_model("a", "llama"), make_model("b", "llama")
    write_rows("cats.jsonl", [{"text": "the cat"}])
    path = b / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["dog"], vocabulary["big"] = vocabulary["big"], vocabulary["dog"]
    path.write_text(json.dumps(tokenizer))
    assert cli("evaluate", b, "--data", "cats.jsonl", "-q").code == 0
    result = cli("evaluate", a, "--data", "cats.jsonl", "--against", b)
    assert (result.code, "is 'dog' to the first and 'big'" in result.err) == (3, True), result.err


@pytest.mark.parametrize("text", ["1", "007", "true", "1e5", "2024-01-01"])
def test_a_csvs_texts_are_texts(cli: Cli, make_model: ModelMaker, text: str) -> None:
    Path("d.csv").write_text(f"text,label\n{text},1\n")
    result = cli("evaluate", make_model("a"), "--data", "d.csv", "--json")
    assert result.code == 0, result.err


def test_a_csv_row_of_more_fields_than_its_header_is_refused(
    cli: Cli, make_model: ModelMaker
) -> None:
    """A reader would take the first for a name of the row."""
    model = make_model("a", "llama")
    Path("d.csv").write_text("text\nthe cat, the dog\na cat, a dog\n")
    result = cli("evaluate", model, "--data", "d.csv")
    told = "d.csv: row 0 has 2 fields, its header 1; put a text that has"
    assert (result.code, told in result.err) == (3, True), result.err
    Path("d.tsv").write_text("text\nthe cat, the dog\n")
    assert cli("evaluate", model, "--data", "d.tsv", "-q").code == 0


def test_what_a_csv_calls_missing(cli: Cli, make_model: ModelMaker) -> None:
    """An empty cell is, a word such as NA is not; numbers with a gap are still whole."""
    model = make_model("a")
    flags = ("evaluate", model, "--data", "d.csv")
    Path("d.csv").write_text("text,label\nNA,0\nnull,1\nNone,2\n,\n")
    result = cli(*flags, "--json")
    assert result.code == 0, result.err
    assert result.report["summary"]["examples"] == 3
    assert result.report["calibration"]["empty"] == 1
    Path("d.csv").write_text("text,label\ncat,0\ndog,\n")
    result = cli(*flags)
    assert (result.code, "d.csv: row 1: has no label" in result.err) == (3, True), result.err
    Path("d.csv").write_text("text,other,label\ncat,,0\ncat,dog,1\n")
    pairs = cli(*flags, "--text-pair-column", "other", "--json").report
    assert pairs["summary"]["tokens"] == 3 + 5


@pytest.mark.parametrize(
    ("names", "wanted", "warns"),
    [
        (["class1", "class2", "class0"], [1, 2, 0], False),
        (["CLASS2", "CLASS0"], [2, 0], False),
        (["cat", "class1", "class2"], [0, 1, 2], True),
        (["class1", "class2", "class0"], [0, 1, 2], False),
    ],
)
def test_classes_of_a_column_go_by_their_names(
    cli: Cli, make_model: ModelMaker, names: list[str], wanted: list[int], warns: bool
) -> None:
    import datasets

    model = make_model("a")
    if wanted == [0, 1, 2] and not warns:  # a model without names
        rename_classes(model, ["LABEL_0", "LABEL_1", "LABEL_2"])
    texts = [make_text(n, 4) for n in range(len(names))]
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    )
    columns = {"text": texts, "label": list(range(len(names)))}
    datasets.Dataset.from_dict(columns, features=features).to_parquet("d.parquet")
    rows = zip(texts, wanted, strict=True)
    write_rows("d.jsonl", [{"text": text, "label": label} for text, label in rows])
    found = cli("evaluate", model, "--data", "d.parquet", "--json").report
    plain = cli("evaluate", model, "--data", "d.jsonl", "--json").report
    assert found["calibration"] == plain["calibration"]
    assert any("are not all of the model's" in told for told in found["warnings"]) == warns


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
    told = "--chat-column messages: the model's tokenizer has no chat template; copy one"
    assert told in cli("evaluate", llama, *flags).err
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
    assert "a: classifier.bias has NaN or Inf" in result.report["warnings"]


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
