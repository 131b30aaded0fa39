"""`fishertool inspect`, through the command line."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli, Estimate, ModelMaker
from safetensors.torch import load_file, save_file
from test_sentence import make_sentence_model
from tiny import make_low_rank

from fishertool.checkpoint import reader

QUERY = "bert.encoder.layer.0.attention.self.query"


def told(cli: Cli, *arguments: object) -> dict[str, Any]:
    result = cli("inspect", *arguments, "--json")
    assert result.code == 0, result.err
    assert result.report["command"] == "inspect"
    summary: dict[str, Any] = result.report["summary"]
    return summary


def test_a_checkpoint(cli: Cli, make_model: ModelMaker) -> None:
    folder = make_model("m")
    (folder / "model.py").touch()
    tensors = load_file(folder / "model.safetensors")
    elements = sum(tensor.numel() for tensor in tensors.values())
    size = (folder / "model.safetensors").stat().st_size
    assert told(cli, "m") == {
        "what": "checkpoint",
        "architecture": "BertForSequenceClassification",
        "model_type": "bert",
        "task": "sequence-classification",
        "config_dtype": "float32",
        "tied_embeddings": True,
        "quantization": None,
        "low_rank": None,
        "tensors": len(tensors),
        "parameters": elements,
        "bytes": size,
        "dtypes": {"F32": {"tensors": len(tensors), "parameters": elements, "bytes": 4 * elements}},
        "files": {"model.safetensors": size},
        "companions": ["tokenizer.json", "tokenizer_config.json"],
        "others": ["model.py"],
        "report": None,
    }
    result = cli("inspect", "m")
    lines = [line.split(maxsplit=1) for line in result.out.splitlines()]
    assert ["task", "sequence-classification"] in lines
    assert ["parameters", str(elements)] in lines
    assert result.err == ""
    assert cli("inspect", "m", "--quiet").out == ""


def test_shards_and_dtypes(cli: Cli, make_model: ModelMaker) -> None:
    make_model("m", "llama", dtype=torch.bfloat16, shards="4KB", tied=False)
    found = told(cli, "m")
    assert len(found["files"]) > 2
    assert found["bytes"] == sum(Path("m", file).stat().st_size for file in found["files"])
    assert (found["task"], found["tied_embeddings"]) == ("causal-lm", False)
    assert list(found["dtypes"]) == ["BF16"]


def test_nothing_but_headers_is_read(
    cli: Cli, make_model: ModelMaker, estimated: Estimate, monkeypatch: pytest.MonkeyPatch
) -> None:
    sidecar = estimated(make_model("m"))

    def read(*arguments: object) -> None:
        raise AssertionError("tensor bytes were read")

    monkeypatch.setattr(reader.Shard, "read", read)
    assert told(cli, "m", "--tensors")["what"] == "checkpoint"
    assert told(cli, sidecar, "--tensors")["what"] == "sidecar"


def test_tensors_are_filtered(cli: Cli, make_model: ModelMaker) -> None:
    make_model("m")
    flags = ("--tensors", "--include", "*.0.attention.self.*", "--exclude", "*.bias")
    report = cli("inspect", "m", *flags, "--json").report
    assert report["options"]["path"] == "m"
    assert [row["name"].split(".")[-2] for row in report["tensors"]] == ["key", "query", "value"]
    assert report["tensors"][1] == {
        "name": f"{QUERY}.weight",
        "shape": [16, 16],
        "dtype": "F32",
        "action": "inspect",
        "bytes": 1024,
        "file": "model.safetensors",
    }
    table, rows = cli("inspect", "m", *flags).out.split("\n\n")
    assert table.startswith("what")
    assert f"{QUERY}.weight  F32  [16, 16]  1024  model.safetensors" in rows.splitlines()
    assert cli("inspect", "m", "--json").report["tensors"] == []

    result = cli("inspect", "m", "--tensors", "--include", "qurey*")
    assert result.code == 2
    assert "--include 'qurey*' matches none of 41 tensors" in result.err
    result = cli("inspect", "m", "--include", "*", "--exclude", "x")
    assert result.code == 2
    assert "--include, --exclude: choose among --tensors; give that too" in result.err
    Path("flags.yml").write_text("tensors: true\ninclude: ['*pooler*']\n")
    assert cli("inspect", "m", "--config", "flags.yml").out.count("pooler") == 2


def test_low_rank_and_its_report(cli: Cli, make_model: ModelMaker) -> None:
    make_low_rank(make_model("m"), Path("low"), select=QUERY, rank=3)
    found = told(cli, "low")
    assert found["quantization"] == "low_rank"
    assert found["low_rank"] == {
        "modules": 1,
        "smallest_rank": 3,
        "largest_rank": 3,
        "embedding": None,
        "parameters": 3 * (16 + 16),
        "parameters_dense": 16 * 16,
    }
    assert cli("densify", "low", "dense", "-q").code == 0
    found = told(cli, "dense")
    assert found["low_rank"] is None
    assert found["others"] == []
    assert found["report"]["command"] == "densify"
    assert found["report"]["summary"]["modules"] == 1
    flags = ("--method", "magnitude", "--sparsity", "0.5", "--save-mask", "--out", "pruned", "-q")
    assert cli("prune", "m", *flags).code == 0
    out = cli("inspect", "pruned").out
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    assert ["report.method", "magnitude"] in lines
    assert ["report.summary.sparsity", "0.5"] in lines
    assert told(cli, "pruned")["others"] == ["pruning_mask.safetensors"]


def test_a_sidecar_and_a_part(
    cli: Cli, make_model: ModelMaker, data: Path, estimated: Estimate
) -> None:
    sidecar = estimated(make_model("m"), "diagonal,kronecker,rank-one")
    found = told(cli, sidecar)
    report = json.loads((sidecar / "fishertool_report.json").read_text())
    assert (found["what"], found["model"], found["labels"]) == ("sidecar", "m", "sampled")
    assert (found["examples"], found["tokens"]) == (12, report["summary"]["tokens"])
    assert found["fingerprint"] == report["summary"]["fingerprint"]
    assert found["kinds"]["diagonal"] == {
        "weights": 41,
        "parameters": 5715,
        "without": 0,
        "group": None,
    }
    assert found["kinds"]["kronecker"]["weights"] < 41
    assert found["kinds"]["rank-one"]["group"] == 1
    worst = list(found["largest_relative_errors"].values())
    assert len(worst) == 3
    assert worst == sorted(worst, reverse=True)
    assert worst[0] == pytest.approx(report["summary"]["largest_relative_error"])
    assert set(found["files"]) == {f"{kind}.safetensors" for kind in found["kinds"]}

    flags = ("--kind", "diagonal,rank-one", "--part", "2/2", "--out", "part", "-q")
    assert cli("estimate-fisher", "m", "--data", data, *flags).code == 0
    found = told(cli, "part")
    assert (found["what"], found["part"]) == ("part", "2/2")
    assert found["kinds"] == ["diagonal", "rank-one"]
    assert set(found["files"]) == {"partial.safetensors", "rank-one.safetensors"}


def test_an_adapter(cli: Cli, make_model: ModelMaker) -> None:
    base, other = make_model("base"), make_model("other", seed=1)
    flags = ("--base", base, "--as-lora", "2", "--out", "adapter", "-q")
    assert cli("merge", other, other, *flags, "--method", "linear").code == 0
    found = told(cli, "adapter")
    assert (found["what"], found["type"], found["task"]) == ("adapter", "LORA", "SEQ_CLS")
    assert (found["base"], found["rank"]) == ("base", 2)
    assert f"{QUERY}".removeprefix("bert.") in " ".join(found["target_modules"])
    assert found["report"]["method"] == "linear"


def test_a_sentence_transformers_folder(cli: Cli, make_model: ModelMaker) -> None:
    folder = make_sentence_model(make_model, transformer="0_Transformer")
    found = told(cli, folder)
    assert found["task"] == "embedding"
    assert list(found["files"]) == ["0_Transformer/model.safetensors"]
    assert "modules.json" in found["companions"]
    assert "0_Transformer/config.json" in found["companions"]
    assert found["others"] == []


def test_a_search(cli: Cli) -> None:
    Path("front").mkdir()
    report: dict[str, Any] = {
        "schema": "fishertool.report/1", "command": "search", "options": {}, "output": None,
        "tensors": [], "summary": {"evaluations": 12, "front": 4},
    }  # fmt: skip
    Path("front/fishertool_report.json").write_text(json.dumps(report))
    found = told(cli, "front")
    assert found["what"] == "search"
    assert found["report"]["summary"] == {"evaluations": 12, "front": 4}


def test_a_task_that_is_not_the_tools(cli: Cli, make_model: ModelMaker) -> None:
    config = Path(make_model("m"), "config.json")
    told_before = json.loads(config.read_text())
    config.write_text(json.dumps(told_before | {"architectures": ["BertForMultipleChoice"]}))
    assert told(cli, "m")["task"] is None


def test_what_a_terminal_would_act_on_is_escaped(cli: Cli, make_model: ModelMaker) -> None:
    config = Path(make_model("m"), "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "\x1b[2Jx"}))
    out = cli("inspect", "m").out
    assert "\x1b" not in out
    assert r"\x1b[2Jx" in out


def test_refusals(cli: Cli, make_model: ModelMaker) -> None:
    def refused(*arguments: object) -> str:
        result = cli("inspect", *arguments)
        assert result.code == 3
        assert result.out == ""
        assert result.err.count("\n") == 1
        return result.err

    model = make_model("m")
    assert "nowhere: no such folder, and not a Hub id" in refused("nowhere")
    assert "is a file; give the folder that holds it" in refused(model / "config.json")
    Path("empty").mkdir()
    assert "empty: no model.safetensors in it; give the folder of a model" in refused("empty")
    Path("pickles").mkdir()
    Path("pickles/pytorch_model.bin").touch()
    assert "pickled weights can run code and are not read" in refused("pickles")

    shutil.copytree(model, "bare")
    Path("bare/config.json").unlink()
    assert "bare/config.json: missing" in refused("bare")
    for content, why in (
        (b"x", "truncated or not a safetensors file"),
        (struct.pack("<Q", 3) + b"{]}", "its header is not valid JSON"),
    ):
        Path("bare/model.safetensors").write_bytes(content)
        assert f"bare/model.safetensors: {why}" in refused("bare")
    for text in ("{", "[]", '{"schema": "other"}', '{"schema": "fishertool.report/1"}'):
        (model / "fishertool_report.json").write_text(text)
        assert "m/fishertool_report.json: not " in refused("m")

    Path("odd").mkdir()
    save_file({"a": torch.zeros(2)}, "odd/diagonal.safetensors")
    assert "odd: not a Fisher sidecar" in refused("odd")


def test_its_report_replaces_nothing_there(cli: Cli, make_model: ModelMaker) -> None:
    make_low_rank(make_model("m"), Path("low"))
    assert cli("densify", "low", "out", "-q").code == 0
    for place, why in (
        ("out/fishertool_report.json", "is what an output's own report is called"),
        ("out/told.json", "is in out, which is only read"),
    ):
        for arguments in (("--report", place, "out"), ("out", "--report", place)):
            result = cli("inspect", *arguments)
            assert result.code == 2
            assert f"--report {place}: {why}" in result.err
    assert cli("inspect", "out", "-q", "--report", "told.json").code == 0
    assert json.loads(Path("told.json").read_text())["command"] == "inspect"


def test_a_checkpoint_is_told_of_without_torch(make_model: ModelMaker) -> None:
    code = (
        "import sys; from fishertool.cli import main; code = main(['inspect', *sys.argv[1:]]);"
        "loaded = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules);"
        "sys.exit(str(loaded) if loaded else code)"
    )
    arguments = [sys.executable, "-c", code, str(make_model("m")), "--tensors"]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{QUERY}.weight" in done.stdout
