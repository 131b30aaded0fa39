"""`fishertool verify`, through the command line."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from conftest import Cli, Estimate, ModelMaker, files_of
from safetensors.torch import load_file, save_file
from test_sentence import make_sentence_model
from torch import Tensor

from fishertool.checkpoint import known_digests
from fishertool.checkpoint.header import TensorInfo
from fishertool.checkpoint.stream import pieces
from fishertool.commands import verify as verify_module
from fishertool.inspection import values
from fishertool.report import schema

REPORT = "fishertool_report.json"
QUERY = "bert.encoder.layer.0.attention.self.query.weight"

Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture
def merged(cli: Cli, make_model: ModelMaker) -> Path:
    """The mean of a model and itself."""
    model = make_model("m")
    assert cli("merge", model, model, "--method", "linear", "--out", "out", "-q").code == 0
    return Path("out")


def findings(cli: Cli, out: Path | str, *flags: object) -> list[str]:
    """What is found to be wrong; the exit code and the error line tell of it too."""
    result = cli("verify", out, "--json", *flags)
    found: list[str] = result.report["summary"]["findings"]
    assert result.code == (3 if found else 0), result.err
    assert result.report["status"] == ("faulty" if found else "ok")
    errors = [line for line in result.err.splitlines() if "warning" not in line]
    more = f"; and {len(found) - 1} more" if len(found) > 1 else ""
    assert errors == [f"fishertool: {out}: {one}{more}" for one in found[:1]]
    return found


def retell(out: Path, change: Callable[[dict[str, Any]], object] | None = None) -> None:
    """Make the report true of the files again, and change it."""
    report = json.loads((out / REPORT).read_text())
    for told in report["output"]["files"] + report["output"]["companions"]:
        content = (out / told["file"]).read_bytes()
        told |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    if change is not None:
        change(report)
    (out / REPORT).write_text(json.dumps(report))


def rewrite(path: Path, change: Change) -> None:
    """Change tensors of a file, and leave its metadata."""
    header = path.read_bytes()[8:].partition(b'"__metadata__":')[2]
    metadata, _ = json.JSONDecoder().raw_decode(header.decode(errors="replace"))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


def test_an_output_as_it_was_written(cli: Cli, merged: Path) -> None:
    before = files_of(merged) | {REPORT: (merged / REPORT).read_text()}
    result = cli("verify", merged, "--json")
    assert (result.code, result.err) == (0, "")
    size = (merged / "model.safetensors").stat().st_size
    assert result.report["summary"] == {
        "what": "checkpoint",
        "command": "merge",
        "files": 1,
        "bytes": size,
        "tensors": 41,
        "parameters": 5715,
        "nonfinite": 0,
        "loads": True,
        "findings": [],
    }
    [told] = result.report["inputs"]
    assert (told["id"], told["role"]) == ("out", "model")
    assert told["files"] == json.loads(before[REPORT])["output"]["files"]
    assert files_of(merged) | {REPORT: (merged / REPORT).read_text()} == before
    assert "loads       True" in cli("verify", merged).out
    assert cli("verify", merged, "--quiet").out == ""


def test_a_byte(cli: Cli, merged: Path) -> None:
    path = merged / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert findings(cli, merged) == [
        "model.safetensors: has other bytes than when it was written (SHA-256)"
    ]
    result = cli("verify", merged)
    assert "finding     model.safetensors: has other bytes" in result.out
    assert result.err.count("\n") == 1


def test_bytes_are_hashed_whatever_is_remembered_of_them(
    cli: Cli, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(known_digests.FOLDER, "cache")
    monkeypatch.setattr(known_digests, "SMALLEST", 10)
    monkeypatch.setattr(known_digests, "_BEGAN", time.time_ns() + 10**12)
    assert findings(cli, merged) == []
    assert not Path("cache").exists()
    monkeypatch.setattr("fishertool.checkpoint.digest.recall", lambda file: 64 * "0")
    assert findings(cli, merged) == []


def test_a_missing_file_and_others(cli: Cli, merged: Path) -> None:
    (merged / "tokenizer.json").unlink()
    lost = "tokenizer.json: missing, and its report names it"
    assert findings(cli, merged, "--no-load") == [lost]
    (merged / "chat_template.jinja").write_text("x")
    (merged / "NOTES.md").write_text("x")
    (merged / "LICENSE").write_text("x")
    assert findings(cli, merged, "--no-load") == [
        lost,
        "chat_template.jinja: not named in its report",
    ]
    (merged / "chat_template.jinja").unlink()
    save_file({"a": torch.zeros(2)}, merged / "extra.safetensors")
    assert findings(cli, merged) == [
        lost,
        "extra.safetensors: not named in its report",
    ]
    (merged / "model.safetensors").unlink()
    told = findings(cli, merged)
    assert (
        told[0]
        == "out: no model.safetensors in it, but extra.safetensors; give the folder of a model"
    )
    assert told[1] == "model.safetensors: missing, and its report names it"


@pytest.mark.parametrize(
    "command",
    [
        "merge a b --dtype bfloat16 --max-shard-size 10KB",
        "merge a b --tokenizer union --base a --method task-arithmetic",
        "merge b --base a --method task-arithmetic --as-lora 2",
        "prune s --method magnitude --sparsity 0.5 --save-mask --resume",
        "prune s --method magnitude --sparsity 0.5 --pattern neurons",
        "factorize s --method svd --rank 2",
        "factorize a --method svd --keep 0.5 --allocate global",
        "densify low",
    ],
)
def test_every_file_beside_the_weights(cli: Cli, make_model: ModelMaker, command: str) -> None:
    make_model("a", seed=1)
    make_model("b", seed=2)
    make_sentence_model(make_model, transformer="0_Transformer").rename("s")
    if command == "densify low":
        assert cli("factorize", "s", "--method", "svd", "--rank", 2, "--out", "low", "-q").code == 0
    out = ["out"] if command == "densify low" else ["--out", "out"]
    assert cli(*command.split(), *out, "-q").code == 0
    report = json.loads(Path("out", REPORT).read_text())
    jsonschema.validate(report, schema())
    output = report["output"]
    told = {one["file"]: one["sha256"] for one in output["companions"]}
    there = files_of(Path("out"))
    weights = {
        name for name in there if Path(name).name in {one["file"] for one in output["files"]}
    }
    assert told == {name: there[name] for name in there.keys() - weights}
    assert not told.keys() & set(output["left_out"])
    assert {Path(name).name for name in told} & {"config.json", "adapter_config.json"}
    assert findings(cli, "out") == []
    for name in told:
        path = Path("out", name)
        content = path.read_bytes()
        path.write_bytes(content.replace(b"\n", b" ", 1) if b"\n" in content else content + b" ")
        found = findings(cli, "out", "--no-load")
        assert any(one.startswith(f"{name}: has ") for one in found), found
        path.write_bytes(content)


def test_shards(cli: Cli, make_model: ModelMaker) -> None:
    model = make_model("m", "llama")
    flags = ("--max-shard-size", "5KB", "--out", "out", "-q")
    assert cli("merge", model, model, *flags).code == 0
    out = Path("out")
    assert findings(cli, out, "--threads", 1) == findings(cli, out, "--threads", 3) == []
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 3

    shutil.copytree(out, "cut")
    cut = Path("cut", shards[1].name)
    size = cut.stat().st_size
    cut.write_bytes(cut.read_bytes()[:-8])
    first, second = findings(cli, "cut")
    assert first.startswith(f"{cut.name}: truncated; fetch it again ({size - 8} bytes")
    assert second == f"{cut.name}: has {size - 8} bytes, and {size} in the report"

    shutil.copytree(out, "lost")
    Path("lost", shards[2].name).unlink()
    first, second = findings(cli, "lost")
    assert first.startswith(f"model.safetensors.index.json: names {shards[2].name}, which is miss")
    assert second == f"{shards[2].name}: missing, and its report names it"

    index = out / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["gone.weight"] = shards[0].name
    index.write_text(json.dumps(content))
    first, second = findings(cli, out)
    assert first == f"{index.name}: tensor gone.weight is not in {shards[0].name}"
    assert second.startswith(f"{index.name}: has ")
    retell(out)
    assert findings(cli, out) == [first]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite(
    cli: Cli, merged: Path, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "pieces", lambda infos: pieces(infos, 7))
    rewrite(merged / "model.safetensors", lambda tensors: tensors[QUERY][-1].fill_(value))
    retell(merged)
    assert findings(cli, merged, "--threads", 2) == [f"NaN or Inf in {QUERY} (model.safetensors)"]
    assert findings(cli, merged, "--allow-nonfinite") == []
    told = cli("verify", merged, "--allow-nonfinite", "--no-load", "--json").report["summary"]
    assert (told["nonfinite"], told["loads"]) == (1, None)


def test_dtype(cli: Cli, merged: Path) -> None:
    path = merged / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"dtype": "bfloat16"}))
    retell(merged)
    told = "config.json: says bfloat16, and most weights are float32"
    assert findings(cli, merged) == [told]
    (merged / REPORT).unlink()
    result = cli("verify", merged, "--no-load", "--json")
    assert result.code == 0
    assert told in result.report["warnings"]


def test_a_report_that_is_not_true(cli: Cli, merged: Path) -> None:
    def change(report: dict[str, Any]) -> None:
        report["output"] |= {"parameters": 7, "dtype": "float16"}
        report["tensors"][0]["shape"] = [3]
        report["tensors"][1]["dtype"] = "BF16"
        report["tensors"][2]["name"] = "gone"

    first, second, third, *_ = (
        row["name"] for row in json.loads((merged / REPORT).read_text())["tensors"]
    )
    retell(merged, change)
    found = findings(cli, merged)
    assert found[0] == "most weights are float32, and float16 in the report"
    assert found[1] == "lacks gone, of which its report tells"
    assert f"has another {first} (F32 [16], and F32 [3] in the report), {second} (F32" in found[2]
    assert found[3] == f"has {third}, of which its report does not tell"
    assert found[4] == "its tensors have 5715 parameters, and 7 in the report"
    assert len(found) == 5

    (merged / REPORT).write_text("{")
    assert "fishertool_report.json: not valid JSON" in findings(cli, merged)[0]
    for name in ("../model.safetensors", "/etc/passwd"):
        report = {
            "schema": "fishertool.report/1", "command": "merge", "options": {}, "summary": {},
            "tensors": [], "output": {"files": [{"file": name, "bytes": 1, "sha256": ""}]},
        }  # fmt: skip
        (merged / REPORT).write_text(json.dumps(report))
        assert "not a report that this version reads" in findings(cli, merged)[0]


def test_without_a_report(cli: Cli, make_model: ModelMaker) -> None:
    model = make_model("m")
    save_file({"a": torch.zeros(2)}, model / "extra.safetensors")
    result = cli("verify", "m", "--json")
    assert result.code == 0
    first, second = result.report["warnings"]
    assert first.startswith("m: there is no report in it")
    assert second == "extra.safetensors: of no checkpoint here, and not verified"
    assert f"warning: {first}" in result.err
    (model / "config.json").unlink()
    assert findings(cli, "m") == [
        "config.json: missing; a checkpoint is a folder with a config.json"
    ]


def test_what_transformers_would_not_load(
    cli: Cli, make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_model("m") / "model.safetensors"

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["classifier.bias"]
        tensors["left.over"] = torch.zeros(2)
        tensors[QUERY] = torch.zeros(16, 8)

    rewrite(path, change)
    for installed in (True, False):
        if not installed:  # accelerate, without which weights get values
            monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert findings(cli, "m") == [
            "lacks tensors the model needs as BertForSequenceClassification: classifier.bias",
            "has tensors of another shape than the model as BertForSequenceClassification: "
            f"{QUERY} ([16, 8] on disk, [16, 16] in the model)",
            "has tensors the model does not use as BertForSequenceClassification: left.over",
        ]
    assert findings(cli, "m", "--no-load") == []
    config = json.loads(Path("m/config.json").read_text())
    for changes, why in (
        ({"architectures": ["OddModel"]}, "architecture OddModel is not in transformers"),
        ({"architectures": None}, "config.json names no architecture"),
    ):
        Path("m/config.json").write_text(json.dumps(config | changes))
        result = cli("verify", "m")
        assert result.code == 0
        assert f"{why}, so whether it loads was not verified" in result.err
    Path("m/config.json").write_text(json.dumps(config | {"num_attention_heads": 3}))
    assert findings(cli, "m")[0].startswith("transformers cannot load it: ")


@pytest.mark.parametrize("kind", ["low-rank", "dense"])
def test_a_factorized_model(cli: Cli, make_model: ModelMaker, kind: str) -> None:
    model = make_model("m", "gpt2")
    flags = ("--method", "svd", "--keep", "0.4", "--format", kind, "--out", "out", "-q")
    assert cli("factorize", model, *flags).code == 0
    assert findings(cli, "out") == []

    def change(report: dict[str, Any]) -> None:
        row = next(row for row in report["tensors"] if row["action"] == "factorize")
        row |= {"rank": 1, "shape": [1, *row["shape"][1:]]}

    retell(Path("out"), change)
    [told] = findings(cli, "out")
    assert told.startswith("has another transformer.h.0.")
    assert ("of rank" in told) == (kind == "low-rank")
    if kind == "low-rank":
        config = json.loads(Path("out/config.json").read_text())
        ranks = config["quantization_config"]["ranks"]
        module = next(iter(ranks))
        ranks[module] += 1
        Path("out/config.json").write_text(json.dumps(config))
        assert f"but config.json gives {module} rank {ranks[module]}" in findings(cli, "out")[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_of_a_pruned_model(cli: Cli, make_model: ModelMaker, dtype: torch.dtype) -> None:
    make_model("m", dtype=dtype)
    flags = ("--method", "magnitude", "--sparsity", "0.5", "--save-mask", "--out", "out", "-q")
    assert cli("prune", "m", *flags).code == 0
    out = Path("out")
    assert findings(cli, out) == []

    def change(tensors: dict[str, Tensor]) -> None:
        row = tensors[QUERY].reshape(-1)
        row[(row == 0).nonzero()[0]] = 1

    rewrite(out / "model.safetensors", change)
    retell(out)
    [told] = findings(cli, out)
    assert (
        told == f"the share of zeros is another in {QUERY} ({127 / 256:.6g}, and 0.5 in the report)"
    )
    (out / "pruning_mask.safetensors").write_bytes(b"x")
    retell(out)
    assert "pruning_mask.safetensors: truncated or not a safetensors file" in findings(cli, out)[1]


def test_zeros_of_experts_in_a_stack() -> None:
    """One expert's are counted apart from another's, wherever the pieces end."""
    tensor = torch.ones(3, 4, 5)
    tensor[1, 2:] = 0
    tensor[2, 0, 0] = 0
    counts = []
    for step in (5, 15, 1000):
        info = TensorInfo("stack", "F32", (3, 4, 5))
        found: dict[int, int] = {}
        for piece in pieces([info], step):
            rows = tensor.reshape(-1, 5)[piece.start : piece.stop]
            for expert, count in values._zeros(rows, info, piece).items():
                found[expert] = found.get(expert, 0) + count
        counts.append(found)
    assert counts == [{0: 0, 1: 10, 2: 1}] * 3


def test_neurons_left_out_and_sentences(cli: Cli, make_model: ModelMaker) -> None:
    folder = make_sentence_model(make_model, transformer="0_Transformer")
    flags = ("--method", "magnitude", "--sparsity", "0.5", "--out", "out", "-q")
    assert cli("prune", folder, "--pattern", "neurons", *flags).code == 0
    assert findings(cli, "out") == []
    Path("out/1_Pooling/config.json").unlink()
    assert findings(cli, "out", "--no-load") == [
        "1_Pooling/config.json: missing, and its report names it"
    ]


def test_neurons_left_out_of_a_model_of_two_dtypes(cli: Cli, make_model: ModelMaker) -> None:
    make_model("m", "llama")
    rewrite(
        Path("m/model.safetensors"),
        lambda tensors: tensors.update(
            {name: one.bfloat16() for name, one in tensors.items() if "down_proj" in name}
        ),
    )
    flags = ("--pattern", "neurons", "--method", "magnitude", "--sparsity", "0.5", "--out", "out")
    assert cli("prune", "m", *flags, "-q").code == 0
    assert findings(cli, "out") == []


def test_an_adapter(cli: Cli, make_model: ModelMaker) -> None:
    base, other = make_model("base"), make_model("other", seed=1)
    flags = ("--base", base, "--as-lora", "2", "--out", "out", "-q")
    assert cli("merge", other, other, *flags, "--method", "linear").code == 0
    assert findings(cli, "out") == []
    path = Path("out/adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 3, "rank_pattern": {}}))
    assert "but adapter_config.json gives rank 3" in findings(cli, "out")[0]


def test_a_sidecar(cli: Cli, make_model: ModelMaker, estimated: Estimate) -> None:
    kinds = "diagonal,factored,kronecker,mean-gradient,rank-one"
    sidecar = estimated(make_model("m"), kinds)
    assert findings(cli, sidecar) == []
    result = cli("verify", sidecar, "--json")
    assert result.report["inputs"][0]["role"] == "fisher"
    assert result.report["summary"]["files"] == 5

    def negative(name: str, *place: int) -> Change:
        return lambda tensors: tensors[name].__setitem__(place, -1.0)

    for file, change, told in (
        ("diagonal", negative(QUERY, 3, 4), QUERY),
        ("factored", negative(f"{QUERY}#rows", 2), f"{QUERY}#rows"),
        ("kronecker", negative(f"{QUERY}#output", 5, 5), f"{QUERY}#output"),
        ("kronecker", negative(f"{QUERY}#output", 5, 6), None),
        ("mean-gradient", negative(QUERY, 0, 0), None),
    ):
        shutil.rmtree("odd", ignore_errors=True)
        shutil.copytree(sidecar, "odd")
        rewrite(Path("odd", f"{file}.safetensors"), change)
        retell(Path("odd"))
        wanted = [f"a mean of squares is below zero in {told} ({file}.safetensors)"]
        assert findings(cli, "odd") == (wanted if told else [])

    def untrue(report: dict[str, Any]) -> None:
        rows = {(row["kind"], row["name"]): row for row in report["tensors"]}
        rows["diagonal", QUERY]["shape"] = [16, 17]
        rows["factored", QUERY]["dtype"] = "BF16"
        rows["kronecker", QUERY]["shape"] = [256]
        rows["rank-one", QUERY]["name"] = "gone"
        report["summary"]["fingerprint"] = "other"

    retell(Path("odd"), untrue)
    found = findings(cli, "odd")
    assert f"diagonal.safetensors: tensor {QUERY} is [16, 16], but [16, 17] in {REPORT}" in found
    assert f"factored: has another dtype in {QUERY} (F32, and BF16 in the report)" in found
    assert f"kronecker: has factors of {QUERY}, no matrix by its report" in found
    assert f"rank-one: has {QUERY}, of which its report does not tell" in found
    assert "rank-one: lacks gone, of which its report tells" in found
    assert "mean-gradient: is of another model than its report's" in found
    rewrite(Path("odd/diagonal.safetensors"), lambda tensors: tensors.pop(QUERY))
    assert "odd: its header and its tensors have different names" in findings(cli, "odd")


def test_a_part(cli: Cli, make_model: ModelMaker, data: Path) -> None:
    make_model("m")
    flags = ("--kind", "diagonal,rank-one", "--part", "1/2", "--out", "part", "-q")
    assert cli("estimate-fisher", "m", "--data", data, *flags).code == 0
    assert findings(cli, "part") == []
    content = bytearray(Path("part/rank-one.safetensors").read_bytes())
    content[-1] ^= 64
    Path("part/rank-one.safetensors").write_bytes(content)
    assert "rank-one.safetensors: has other bytes" in findings(cli, "part", "--allow-nonfinite")[0]


def test_refusals(cli: Cli, make_model: ModelMaker, merged: Path) -> None:
    result = cli("verify", "nowhere")
    assert (result.code, result.out) == (3, "")
    assert "nowhere: no such folder, and not a Hub id" in result.err
    Path("empty").mkdir()
    assert findings(cli, "empty")[0].startswith("empty: no model.safetensors in it")
    result = cli("verify", "out", "--report", f"out/{REPORT}")
    assert result.code == 2
    assert "is what an output's own report is called" in result.err
    assert cli("verify", "out", "--no-lod").code == 2
    report = json.loads((merged / REPORT).read_text()) | {"command": "search", "output": None}
    (merged / REPORT).write_text(json.dumps(report))
    result = cli("verify", "out")
    assert result.code == 3
    assert "out: is a search, whose report names no files; it picked no merge" in result.err


def test_ctrl_c(cli: Cli, merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify_module, "place_of", stop)
    assert cli("verify", merged).code == 130


def test_flags_in_a_file(cli: Cli, merged: Path) -> None:
    rewrite(merged / "model.safetensors", lambda tensors: tensors[QUERY].fill_(torch.nan))
    retell(merged)
    Path("v.yml").write_text(
        "no-load: true\nallow-nonfinite: true\nthreads: 1\nreport: told.json\n"
    )
    assert cli("verify", merged, "--config", "v.yml", "-q").code == 0
    told = json.loads(Path("told.json").read_text())
    assert told["command"] == "verify"
    assert told["summary"]["loads"] is None
    assert told["environment"]["threads"] == 1
