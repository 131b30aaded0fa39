"""`fishertool densify`, through the command line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import Cli, ModelMaker, files_of
from safetensors.torch import load_file, save_file
from test_sentence import make_sentence_model
from tiny import BLOCK_LINEARS, make_low_rank

import fishertool
from fishertool.errors import InputError

QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("kind", "more", "select"),
    [
        ("bert", {}, BLOCK_LINEARS),
        ("bert", {}, BLOCK_LINEARS + r"|word_embeddings\.weight"),
        ("gpt2", {}, BLOCK_LINEARS),
        ("llama", {"tied": True}, BLOCK_LINEARS),
        ("t5", {}, BLOCK_LINEARS),
    ],
)
def test_full_rank_gives_the_original_back(
    cli: Cli, make_model: ModelMaker, kind: str, more: dict[str, bool], select: str
) -> None:
    dense = make_model("dense", kind, spread=0.1, **more)
    ranks = make_low_rank(dense, Path("low"), select)
    result = cli("densify", "low", "out", "--json")
    assert result.code == 0, result.err
    ours, theirs = load_file("out/model.safetensors"), load_file(dense / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        bound = 1e-5 if name.removesuffix(".weight") in ranks else 0.0
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=bound)
    assert json.loads(Path("out/config.json").read_text()) == json.loads(
        (dense / "config.json").read_text()
    )
    assert not getattr(fishertool.load_model("out"), "is_quantized", False)
    assert (Path("out") / "tokenizer.json").is_file()
    summary = result.report["summary"]
    assert summary["modules"] == len(ranks)
    assert summary["parameters"] == sum(tensor.numel() for tensor in theirs.values())
    assert summary["bytes"] < summary["bytes_before"]  # full rank takes more than dense
    written = json.loads(Path("out/fishertool_report.json").read_text())
    assert written["output"]["parameters"] == summary["parameters"]
    rows = {row["name"]: row for row in written["tensors"]}
    assert {name for name, row in rows.items() if row["action"] == "densify"} == {
        f"{module}.weight" for module in ranks
    }
    assert all(rows[f"{module}.weight"]["rank"] == rank for module, rank in ranks.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_product_is_rounded_once(
    cli: Cli, make_model: ModelMaker, kind: str, dtype: torch.dtype
) -> None:
    ranks = make_low_rank(make_model("dense", kind, dtype=dtype, spread=0.1), Path("low"), rank=5)
    assert cli("densify", "low", "out", "-q").code == 0
    factors, dense = load_file("low/model.safetensors"), load_file("out/model.safetensors")
    for module in ranks:
        up, down = factors[f"{module}.up.weight"], factors[f"{module}.down.weight"]
        wanted = up.double() @ down.double()
        ours = dense[f"{module}.weight"]
        assert ours.dtype == dtype
        half_a_step = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(
            ours.double(), wanted.T if kind == "gpt2" else wanted, rtol=half_a_step, atol=1e-6
        )
    assert json.loads(Path("out/config.json").read_text())["dtype"] == str(dtype)[6:]


def test_bytes_depend_on_neither_threads_nor_pieces(
    cli: Cli, make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_low_rank(make_model("dense", "gpt2"), Path("low"), rank=7)
    assert cli("densify", "low", "one", "--threads", 1, "-q").code == 0
    assert cli("densify", "low", "two", "--threads", 2, "-q").code == 0
    first = Path("one/model.safetensors").read_bytes()
    assert Path("two/model.safetensors").read_bytes() == first

    monkeypatch.setattr("fishertool.checkpoint.stream.pieces.__defaults__", (40,))
    assert cli("densify", "low", "small", "-q").code == 0
    wanted = load_file("one/model.safetensors")
    for name, tensor in load_file("small/model.safetensors").items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-7)


def test_shards_in_and_out(cli: Cli, make_model: ModelMaker) -> None:
    make_low_rank(make_model("dense", "llama"), Path("low"))
    model = fishertool.load_model("low")
    model.save_pretrained("shards", max_shard_size="6KB")
    assert cli("densify", "shards", "out", "--max-shard-size", "5KB", "-q").code == 0
    assert len(list(Path("out").glob("*.safetensors"))) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained("out")
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transformer", ["", "0_Transformer"])
def test_sentence_transformers_folder(cli: Cli, make_model: ModelMaker, transformer: str) -> None:
    dense, low = make_sentence_model(make_model, transformer=transformer), Path("low")
    shutil.copytree(dense, low)
    shutil.rmtree(low / transformer)
    make_low_rank(dense / transformer, low / transformer)
    result = cli("densify", low, "out", "-q")
    assert result.code == 0, result.err
    assert set(files_of(Path("out"))) == set(files_of(dense))


@pytest.mark.parametrize(
    "flags",
    [
        "factorize dense --method svd --keep 0.5 --out out",
        "prune dense --method magnitude --sparsity 0.5 --out out",
        "prune dense --method magnitude --pattern neurons --sparsity 0.5 --out out",
        "merge dense dense --out out",
        "densify low out",
    ],
)
def test_code_that_config_names_is_left_out_and_told(
    cli: Cli, make_model: ModelMaker, flags: str
) -> None:
    dense = make_model("dense")
    (dense / "own.py").touch()
    config = json.loads((dense / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "own.Own"}
    (dense / "config.json").write_text(json.dumps(config))
    make_low_rank(dense, Path("low"))
    result = cli(*flags.split())
    assert result.code == 0, result.err
    assert "config.json names code of the model's own (auto_map), which is never" in result.err
    assert not Path("out/own.py").exists()
    # Where there is no architecture of this name without it, densify cannot go on.
    config = json.loads(Path("low/config.json").read_text()) | {"model_type": "own"}
    Path("low/config.json").write_text(json.dumps(config))
    result = cli("densify", "low", "other")
    assert result.code == 3
    assert "which densify does not run; load it in transformers" in result.err


def test_evaluate_finds_no_difference(cli: Cli, make_model: ModelMaker, data: Path) -> None:
    make_low_rank(make_model("dense", spread=0.1), Path("low"), rank=3)
    assert cli("densify", "low", "out", "-q").code == 0
    result = cli("evaluate", "out", "--data", data, "--against", "low", "--json")
    assert result.report["summary"]["kl"] == pytest.approx(0, abs=1e-7)


def test_dry_run_overwrite_config_and_report(cli: Cli, make_model: ModelMaker) -> None:
    make_low_rank(make_model("dense"), Path("low"))
    result = cli("densify", "low", "out", "--dry-run", "--json")
    assert result.code == 0
    assert result.report["status"] == "dry-run"
    told = result.report["summary"]
    assert told["free_bytes"] > 0
    assert not Path("out").exists()

    Path("densify.yml").write_text("threads: 1\nquiet: true\nreport: told.json\n")
    result = cli("densify", "low", "out", "--config", "densify.yml")
    assert (result.code, result.out) == (0, "")
    assert json.loads(Path("told.json").read_text())["command"] == "densify"
    result = cli("densify", "low", "out")
    assert result.code == 7
    assert "out: exists; --overwrite replaces it" in result.err
    assert cli("densify", "low", "out", "--overwrite", "-q").code == 0
    for folder, size in (("low", "bytes_before"), ("out", "bytes")):
        assert told[size] == Path(folder, "model.safetensors").stat().st_size


def test_refusals(cli: Cli, make_model: ModelMaker) -> None:
    dense = make_model("dense")
    result = cli("densify", dense, "out")
    assert result.code == 3
    assert "is not low-rank, so it is dense already; use it as it is" in result.err

    config = json.loads((dense / "config.json").read_text())
    make_low_rank(dense, Path("low"))
    shutil.copytree(dense, "other")
    quantized = config | {"quantization_config": {"quant_method": "gptq"}}
    Path("other/config.json").write_text(json.dumps(quantized))
    result = cli("densify", "other", "out")
    assert result.code == 3
    assert "quantized otherwise; dequantize it with transformers" in result.err

    tensors = load_file("low/model.safetensors")
    shutil.copytree("low", "lost")
    del tensors[f"{QUERY}.up.weight"]
    save_file(tensors, "lost/model.safetensors", {"format": "pt"})
    result = cli("densify", "lost", "out")
    assert result.code == 3
    assert f"lacks {QUERY}.up.weight" in result.err

    make_low_rank(dense, Path("head"), select="classifier")
    head = json.loads(Path("head/config.json").read_text()) | {"architectures": ["BertModel"]}
    Path("head/config.json").write_text(json.dumps(head))
    result = cli("densify", "head", "out")
    assert result.code == 3
    assert "has factors of classifier, and a BertModel no such module" in result.err

    Path("head/config.json").write_text(json.dumps(head | {"architectures": ["OddModel"]}))
    assert "its architecture is not in transformers" in cli("densify", "head", "out").err

    result = cli("densify", "low", "low")
    assert result.code == 2
    assert "overlaps the input" in result.err
    assert not Path("out").exists()


def test_values_that_are_not_finite_are_refused(cli: Cli, make_model: ModelMaker) -> None:
    make_low_rank(make_model("dense", dtype=torch.float16), Path("low"))
    tensors = load_file("low/model.safetensors")
    for name, value, told in (
        (f"{QUERY}.up.weight", torch.nan, f"{QUERY}.up.weight: has NaN or Inf"),
        ("classifier.weight", torch.inf, "classifier.weight: has NaN or Inf"),
        (f"{QUERY}.down.weight", 6e4, "the product of its factors does not fit F16"),
    ):
        shutil.rmtree("odd", ignore_errors=True)
        shutil.copytree("low", "odd")
        changed = tensors | {name: torch.full_like(tensors[name], value)}
        changed |= {f"{QUERY}.up.weight": changed[f"{QUERY}.up.weight"] + 3}
        save_file(changed, "odd/model.safetensors", {"format": "pt"})
        result = cli("densify", "odd", "out")
        assert result.code == 3
        assert told in result.err
        assert cli("densify", "odd", "out", "--allow-nonfinite", "--overwrite", "-q").code == 0
        shutil.rmtree("out")


def test_other_verbs_name_densify(cli: Cli, make_model: ModelMaker) -> None:
    make_low_rank(make_model("dense"), Path("low"))
    result = cli("merge", "low", "low", "--out", "out")
    assert result.code == 3
    assert "low: its layers are low-rank pairs; make them dense first with fishertool densify" in (
        result.err
    )


def test_homes_are_found_wherever_a_place_is_named(
    cli: Cli, make_model: ModelMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shell does so only at the beginning of a word, and never in a file."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    make_low_rank(make_model("m"), home / "low")
    (home / "flags.yml").write_text("model: ~/low\nout: ~/dense\nreport: ~/report.json\n")
    result = cli("densify", "--config=~/flags.yml", "-q")
    assert result.code == 0, result.err
    assert {path.name for path in home.iterdir()} == {"low", "dense", "flags.yml", "report.json"}
    assert not (tmp_path / "~").exists()


def test_only_a_model_is_loaded_by_its_architecture(make_model: ModelMaker) -> None:
    folder = make_model("a")
    path = folder / "config.json"
    for name in ("AutoConfig", "pipeline", "Unheard"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [name]}))
        with pytest.raises(InputError, match=f"architecture {name} is not in transformers"):
            fishertool.load_model(folder)
