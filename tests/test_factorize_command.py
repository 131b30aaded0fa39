"""`fishertool factorize`, through the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import TEMPLATED, Cli, ModelMaker, make_tokenizer
from safetensors.torch import load_file, save_file
from test_merge_command import files_of, weights_of
from tiny import ARCHITECTURES
from torch import Tensor

from fishertool.factorization.fwsvd import fwsvd
from fishertool.factorization.kronecker import kronecker
from fishertool.factorization.svd import svd
from fishertool.factorization.whitened import whitened
from fishertool.registry import method_names

QUERY = "bert.encoder.layer.0.attention.self.query"
METHODS = method_names("fishertool.factorization")
Sidecar = Any


@pytest.fixture
def estimated(cli: Cli, data: Path) -> Sidecar:
    """Estimate the kinds of a model's Fisher; the sidecar's folder."""

    def estimate(model: Path, kinds: str = "diagonal,factored,kronecker") -> Path:
        out = model.with_name(f"fisher-{model.name}")
        result = cli("estimate-fisher", model, "--data", data, "--kind", kinds, "--out", out, "-q")
        assert result.code == 0, result.err
        return out

    return estimate


def rows_of(result: Any, action: str = "factorize") -> dict[str, Any]:
    return {row["name"]: row for row in result.report["tensors"] if row["action"] == action}


def product(weights: dict[str, Tensor], module: str) -> Tensor:
    """Of a module's factors, [out, in]."""
    return weights[f"{module}.up.weight"].double() @ weights[f"{module}.down.weight"].double()


@pytest.mark.parametrize(
    ("kind", "module", "turned"),
    [("bert", QUERY, False), ("gpt2", "transformer.h.0.attn.c_attn", True),
     ("llama", "model.layers.1.mlp.down_proj", False)],
)  # fmt: skip
def test_factors_follow_the_definition_and_stand_where_the_weight_was(
    cli: Cli, make_model: ModelMaker, estimated: Sidecar, tmp_path: Path,
    kind: str, module: str, turned: bool,
) -> None:  # fmt: skip
    model = make_model("m", kind, spread=0.1)
    sidecar = estimated(model)
    before = weights_of(model)
    weight = before[f"{module}.weight"].T if turned else before[f"{module}.weight"]
    moments = load_file(sidecar / "kronecker.safetensors")
    fisher = load_file(sidecar / "diagonal.safetensors")[f"{module}.weight"]
    fisher = fisher.T if turned else fisher
    rank = 4
    # Where query, key and value share an input, its moment is under the first name.
    inputs = next(
        moments[f"{name}.weight#input"]
        for name in (module, "bert.encoder.layer.0.attention.self.key")
        if f"{name}.weight#input" in moments
    )
    gradients = moments[f"{module}.weight#output"]
    assert len(inputs) == weight.shape[1]
    assert len(gradients) == weight.shape[0]
    for method, expected in {
        "svd": svd(weight),
        "fwsvd": fwsvd(weight, fisher.sum(1), fisher.sum(0)),
        "whitened": whitened(weight, inputs),
        "kronecker": kronecker(weight, inputs, gradients),
    }.items():
        flags = ("--method", method, "--fisher", sidecar, "--rank", rank, "--out", method)
        result = cli("factorize", model, *flags, "--json")
        assert result.code == 0, result.err
        after = weights_of(tmp_path / method)
        assert after[f"{module}.down.weight"].shape == (rank, weight.shape[1])
        assert after[f"{module}.up.weight"].shape == (weight.shape[0], rank)
        assert after[f"{module}.weight"].shape == (0,)
        torch.testing.assert_close(
            product(after, module), torch.matmul(*expected.truncate(rank)), rtol=1e-4, atol=1e-5
        )
        if (bias := f"{module}.bias") in before:
            assert bias not in after
            assert torch.equal(after[f"{module}.up.bias"], before[bias])
        row = rows_of(result)[f"{module}.weight"]
        lost = (weight - product(after, module)).double().square()
        assert row["rank"] == rank
        assert row["error"] == pytest.approx(float(lost.sum() / weight.square().sum()), rel=1e-4)
        weighted = (fisher * lost).sum() / (fisher * weight.square()).sum()
        assert row["weighted_error"] == pytest.approx(float(weighted), rel=1e-4)
        error = weight.double() - torch.matmul(*expected.truncate(rank))
        share = expected.square_norm(error) / expected.square_norm(weight.double())
        assert row["energy"] == pytest.approx(1 - float(share), rel=1e-5)


def test_the_output_says_what_is_low_rank_and_keeps_all_else(
    cli: Cli, make_model: ModelMaker, tmp_path: Path
) -> None:
    model = make_model("m", shards="9KB")
    flags = ("--method", "svd", "--keep", "0.5", "--max-shard-size", "7KB")
    result = cli("factorize", model, *flags, "--out", "o", "--json")
    assert result.code == 0, result.err
    before, after = weights_of(model), weights_of(tmp_path / "o")
    config = json.loads((tmp_path / "o/config.json").read_text())
    settings = config.pop("quantization_config")
    assert config == json.loads((model / "config.json").read_text())
    assert settings["quant_method"] == "low_rank"
    assert settings["format_version"] == 1
    assert len(settings["ranks"]) == 12
    assert settings["ranks"][QUERY] == 4
    assert len(list((tmp_path / "o").glob("*.safetensors"))) > 1
    factored = {f"{module}.{part}" for module in settings["ranks"] for part in ("weight", "bias")}
    for name in before.keys() - factored:
        assert torch.equal(after[name], before[name])
    assert all("LayerNorm" in name or "embed" in name or "layer" not in name
               for name in before.keys() - factored)  # fmt: skip
    # Counted in the files, and by hand.
    summary = result.report["summary"]
    linear = sum(before[f"{module}.weight"].numel() for module in settings["ranks"])
    factors = sum(t.numel() for name, t in after.items() if ".up.weight" in name or "down" in name)
    whole = sum(tensor.numel() for tensor in before.values())
    assert summary["kept_of_factorized"] == pytest.approx(factors / linear)
    assert summary["kept_of_selected"] == summary["kept_of_factorized"]
    heads = 16 * 16 + 3 * 16  # pooler and classifier are linear too
    assert summary["kept_of_linear"] == pytest.approx((factors + heads) / (linear + heads))
    assert summary["kept_of_model"] == pytest.approx((whole - linear + factors) / whole)
    assert result.report["output"]["parameters"] == sum(t.numel() for t in after.values())
    assert summary["parameters_after"] == result.report["output"]["parameters"]
    assert rows_of(result, "keep")["classifier.weight"]["why"] == "outside the blocks"
    assert {row["name"] for row in result.report["tensors"]} == before.keys()
    assert "nothing was measured" in result.err


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_is_the_product_and_loads_everywhere(
    cli: Cli, make_model: ModelMaker, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    model = make_model("m", kind, dtype=dtype)
    flags = ("factorize", model, "--method", "svd", "--keep", "0.6", "-q")
    assert cli(*flags, "--format", "dense", "--out", "d").code == 0
    assert cli(*flags, "--out", "l").code == 0
    dense, pairs = weights_of(tmp_path / "d"), weights_of(tmp_path / "l")
    ranks = json.loads((tmp_path / "l/config.json").read_text())["quantization_config"]["ranks"]
    assert len(ranks) > 7
    before = weights_of(model)
    assert dense.keys() == before.keys()
    step = torch.finfo(dtype).eps
    for module in ranks:
        weight = dense[f"{module}.weight"]
        assert weight.dtype == dtype
        turned = kind == "gpt2"
        torch.testing.assert_close(
            (weight.T if turned else weight).double(), product(pairs, module),
            rtol=4 * step, atol=step * float(weight.abs().max()) * 4,
        )  # fmt: skip
    auto = {"bert": "SequenceClassification", "t5": "Seq2SeqLM"}.get(kind, "CausalLM")
    loader = getattr(transformers, f"AutoModelFor{auto}")
    _, found = loader.from_pretrained(tmp_path / "d", output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert "quantization_config" not in json.loads((tmp_path / "d/config.json").read_text())


@pytest.mark.parametrize(
    ("method", "allocate"),
    [
        *[(method, "auto") for method in METHODS],
        *[("svd", allocate) for allocate in ("uniform", "energy", "global")],
    ],
)
def test_every_method_and_allocation_meets_the_budget(
    cli: Cli, make_model: ModelMaker, estimated: Sidecar, data: Path, method: str, allocate: str
) -> None:
    model = make_model("m", spread=0.2)
    sidecar = estimated(model)
    flags = ("--keep", "0.5", "--allocate", allocate, "--evaluate-on", data, "--out", "o")
    result = cli("factorize", model, "--method", method, "--fisher", sidecar, *flags, "--json")
    assert result.code == 0, result.err
    assert "nothing was measured" not in result.err
    summary, evaluation = result.report["summary"], result.report["evaluation"]
    assert 0.4 < summary["kept_of_selected"] <= 0.5
    rows = rows_of(result).values()
    assert all(0 < row["energy"] <= 1 and row["error"] > 0 for row in rows)
    assert evaluation["metrics"]["kl"] > 0
    assert evaluation["against"]["loss"] != evaluation["metrics"]["loss"]
    assert not (Path("o") / "terms").exists()
    if allocate != "auto":
        assert summary["allocate"] == allocate
        return
    by_name = {row["allocate"]: row["kl"] for row in evaluation["candidates"]}
    assert set(by_name) == {"uniform", "energy", "global"}
    assert by_name[summary["allocate"]] == min(by_name.values())
    assert evaluation["metrics"]["kl"] == pytest.approx(min(by_name.values()), rel=1e-5)


def test_what_is_measured_is_what_evaluate_measures(
    cli: Cli, make_model: ModelMaker, estimated: Sidecar, data: Path
) -> None:
    model = make_model("m", "gpt2", spread=0.2)
    sidecar = estimated(model)
    flags = ("--fisher", sidecar, "--keep", "0.4", "--format", "dense", "--evaluate-on", data)
    result = cli("factorize", model, *flags, "--out", "o", "--json")
    assert result.code == 0, result.err
    again = cli("evaluate", "o", "--data", data, "--against", model, "--json")
    for name, value in result.report["evaluation"]["metrics"].items():
        assert value == pytest.approx(again.report["summary"][name], rel=1e-5, abs=1e-7)


def test_refining_lowers_the_fisher_weighted_error(
    cli: Cli, make_model: ModelMaker, estimated: Sidecar
) -> None:
    model = make_model("m", spread=0.2)
    sidecar = estimated(model)
    errors = {}
    for name, flags in {
        "both": ("fwsvd", "--sides", "both"),
        "from both": ("tfwsvd",),
        "whitened": ("whitened",),
        "from whitened": ("tfwsvd", "--start", "whitened"),
    }.items():
        base = ("--fisher", sidecar, "--keep", "0.4", "--out", name, "--json", "--method")
        result = cli("factorize", model, *base, *flags)
        assert result.code == 0, result.err
        rows = rows_of(result)
        errors[name] = [row["weighted_error"] for row in rows.values()]
        if "from" in name:  # which is the norm that it keeps
            for row in rows.values():
                assert row["energy"] == pytest.approx(1 - row["weighted_error"], abs=1e-5)
    for refined, first in (("from both", "both"), ("from whitened", "whitened")):
        assert all(a <= b for a, b in zip(errors[refined], errors[first], strict=True))
        assert sum(errors[refined]) < 0.98 * sum(errors[first])


def test_a_factored_sidecar_gives_the_same_as_its_diagonal(
    cli: Cli, make_model: ModelMaker, estimated: Sidecar, tmp_path: Path
) -> None:
    model = make_model("m", "gpt2")
    sidecar = estimated(model, "diagonal,factored")
    base = ("--method", "fwsvd", "--sides", "both", "--keep", "0.5", "-q")
    for kind, other in (("factored", "diagonal"), ("diagonal", "factored")):
        (sidecar / f"{other}.safetensors").rename(tmp_path / "aside")
        assert cli("factorize", model, "--fisher", sidecar, *base, "--out", kind).code == 0
        (tmp_path / "aside").rename(sidecar / f"{other}.safetensors")
    first, second = weights_of(tmp_path / "factored"), weights_of(tmp_path / "diagonal")
    for module in ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"):
        torch.testing.assert_close(
            product(first, module), product(second, module), rtol=1e-4, atol=1e-6
        )


def test_the_target_is_of_the_whole_model(cli: Cli, make_model: ModelMaker, tmp_path: Path) -> None:
    model = make_model("m")
    whole = sum(tensor.numel() for tensor in weights_of(model).values())
    flags = ("factorize", model, "--method", "svd")
    for allocate in ("uniform", "global"):
        more = ("--target-parameters", whole - 1500, "--allocate", allocate)
        result = cli(*flags, *more, "--out", allocate, "--json")
        assert result.code == 0, result.err
        after = sum(tensor.numel() for tensor in weights_of(tmp_path / allocate).values())
        assert whole - 2300 < after <= whole - 1500
    for target, told in ((whole, "which is no more"), (10, "already take")):
        result = cli(*flags, "--target-parameters", target, "--out", "x")
        assert result.code == 2
        assert told in result.err
        assert not (tmp_path / "x").exists()


def test_at_break_even_a_layer_stays_dense_and_that_is_said(
    cli: Cli, make_model: ModelMaker, tmp_path: Path
) -> None:
    model = make_model("m")
    # 16 x 16 breaks even at rank 8, and 16 x 32 at 11.
    result = cli("factorize", model, "--method", "svd", "--rank", "8", "--out", "o", "--json")
    assert result.code == 0, result.err
    assert all(row["shape"] != [16, 16] for row in rows_of(result).values())
    why = rows_of(result, "keep")[f"{QUERY}.weight"]["why"]
    assert why == "at break-even: factors would have no fewer parameters"
    assert torch.equal(weights_of(tmp_path / "o")[f"{QUERY}.weight"],
                       weights_of(model)[f"{QUERY}.weight"])  # fmt: skip
    ranks = json.loads((tmp_path / "o/config.json").read_text())["quantization_config"]["ranks"]
    assert set(ranks.values()) == {8}
    flags = ("--method", "svd", "--keep", "1", "--out", "all", "-q")
    assert cli("factorize", model, *flags).code == 0
    assert files_of(tmp_path / "all").keys() == files_of(model).keys()
    assert (tmp_path / "all/config.json").read_bytes() == (model / "config.json").read_bytes()
    more = ("--keep", "0.9", "--rank-multiple", "4", "--out", "multiple", "--json")
    result = cli("factorize", model, "--method", "svd", *more)
    assert {row["rank"] for row in rows_of(result).values()} == {4, 8}


def test_the_bytes_do_not_depend_on_threads(
    cli: Cli, make_model: ModelMaker, estimated: Sidecar, tmp_path: Path
) -> None:
    model = make_model("m", "llama")
    sidecar = estimated(model)
    for allocate in ("uniform", "global"):
        found = []
        for threads in (1, 3):
            flags = ("--keep", "0.5", "--allocate", allocate, "--threads", threads)
            out = tmp_path / f"{allocate}{threads}"
            assert cli("factorize", model, "--fisher", sidecar, *flags, "--out", out).code == 0
            found.append(files_of(out))
        assert found[0] == found[1]


def save(kind: str, folder: Path) -> Path:
    torch.manual_seed(0)
    ARCHITECTURES[kind]().save_pretrained(folder)
    make_tokenizer(template=kind in TEMPLATED).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
def test_experts_are_listed_as_skipped_or_factorized_one_by_one(
    cli: Cli, estimated: Sidecar, tmp_path: Path, kind: str
) -> None:
    model = save(kind, tmp_path / "m")
    flags = ("factorize", model, "--method", "svd", "--keep", "0.5", "--json")
    result = cli(*flags, "--out", "l")
    assert result.code == 0, result.err
    skipped = [name for name, row in rows_of(result, "keep").items() if ".experts." in name]
    assert len(skipped) == 24
    assert not any(".experts." in name for name in rows_of(result))
    assert "--format dense takes it" in rows_of(result, "keep")[skipped[0]]["why"]
    result = cli(*flags, "--format", "dense", "--out", "d")
    assert result.code == 0, result.err
    rows = {name: row for name, row in rows_of(result).items() if ".experts." in name}
    assert set(rows) == set(skipped)
    after = weights_of(tmp_path / "d")
    for name, row in rows.items():
        assert torch.linalg.matrix_rank(after[name]) == row["rank"]
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "d")


def test_experts_that_are_one_stack_on_disk_are_factorized_each(
    cli: Cli, estimated: Sidecar, tmp_path: Path
) -> None:
    config = transformers.GptOssConfig(
        vocab_size=23, hidden_size=16, intermediate_size=12, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
        pad_token_id=0, bos_token_id=2, eos_token_id=3, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GptOssForCausalLM(config).save_pretrained(tmp_path / "m")
    make_tokenizer(template=False).save_pretrained(tmp_path / "m")
    flags = ("factorize", tmp_path / "m", "--method", "svd", "--keep", "0.5", "--json")
    result = cli(*flags, "--format", "dense", "--out", "d")
    assert result.code == 0, result.err
    name = "model.layers.0.mlp.experts.down_proj"
    row = rows_of(result)[f"{name}[2]"]
    assert row["shape"] == [16, 12]  # [in, out] on disk
    before, after = weights_of(tmp_path / "m")[name], weights_of(tmp_path / "d")[name]
    for expert in range(4):
        best = torch.matmul(*svd(before[expert]).truncate(row["rank"]))
        torch.testing.assert_close(after[expert].double(), best, rtol=1e-4, atol=1e-6)
    result = cli(*flags, "--out", "l")
    assert result.code == 0, result.err
    assert name in rows_of(result, "keep")


def test_a_sentence_transformers_folder_stays_one(
    cli: Cli, make_model: ModelMaker, tmp_path: Path
) -> None:
    model = make_model("m", head="Model")
    (model / "1_Pooling").mkdir()
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_Pooling",
            "type": "sentence_transformers.models.Pooling",
        },
    ]
    (model / "modules.json").write_text(json.dumps(modules))
    (model / "1_Pooling/config.json").write_text('{"pooling_mode_mean_tokens": true}')
    result = cli("factorize", model, "--method", "svd", "--keep", "0.5", "--out", "o", "--json")
    assert result.code == 0, result.err
    for name in ("modules.json", "1_Pooling/config.json", "tokenizer.json"):
        assert (tmp_path / "o" / name).read_bytes() == (model / name).read_bytes()
    assert "encoder.layer.0.attention.self.query.weight" in rows_of(result)


def test_embeddings_on_request(cli: Cli, make_model: ModelMaker, tmp_path: Path) -> None:
    model = make_model("m")
    name = "bert.embeddings.word_embeddings.weight"
    flags = ("factorize", model, "--method", "svd", "--keep", "0.5", "--include", name)
    result = cli(*flags, "--format", "dense", "--out", "d", "--json")
    assert result.code == 0, result.err
    rank = rows_of(result)[name]["rank"]
    assert torch.linalg.matrix_rank(weights_of(tmp_path / "d")[name]) == rank
    assert result.report["summary"]["kept_of_linear"] == 1  # an embedding is no linear weight
    result = cli(*flags, "--out", "l")
    assert result.code == 2
    assert "is an embedding" in result.err
    assert "--format dense" in result.err


@pytest.mark.parametrize(
    ("kind", "name"), [("gpt2", "transformer.wte.weight"), ("t5", "shared.weight")]
)
def test_tied_weights_are_refused_with_the_way_out(
    cli: Cli, make_model: ModelMaker, kind: str, name: str
) -> None:
    model = make_model("m", kind)
    flags = ("--method", "svd", "--keep", "0.5", "--format", "dense", "--out", "o")
    result = cli("factorize", model, *flags, "--include", "*")
    assert result.code == 3
    assert name in result.err
    assert f"--exclude '{name}'" in result.err
    result = cli("factorize", model, *flags, "--include", "*", "--exclude", name, "-q")
    assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (("--keep", "0"), 2, "--keep 0 is not in (0, 1]"),
        (("--keep", "1.5"), 2, "--keep 1.5 is not in (0, 1]"),
        (("--keep", "nan"), 2, "--keep nan is not in (0, 1]"),
        (("--energy", "-1"), 2, "--energy -1 is not in (0, 1]"),
        (("--rank", "0"), 2, "--rank 0 is not at least 1"),
        (("--rank", "17"), 2, "--rank 17: is above the smaller side of bert.encoder.layer.0"),
        (("--keep", "0.5", "--rank-multiple", "0"), 2, "--rank-multiple 0 is not at least 1"),
        (("--keep", "0.01"), 2, "ranks of 1 already take"),
        ((), 2, "give one of --keep, --rank, --energy, --target-parameters; 0 given"),
        (("--keep", "0.5", "--rank", "3"), 2, "; 2 given"),
        (("--rank", "3", "--allocate", "global"), 2, "--allocate global divides a budget"),
        (("--keep", "0.5", "--allocate", "globl"), 2, "did you mean 'global'?"),
        (("--keep", "0.5", "--allocate", "auto"), 2, "--allocate auto needs --evaluate-on"),
        (("--keep", "0.5", "--format", "sparse"), 2, "--format 'sparse'"),
        (("--keep", "0.5", "--method", "svdd"), 2, "did you mean 'svd'?"),
        (("--keep", "0.5", "--set", "sides=both"), 2, "method svd has no setting 'sides'"),
        (("--keep", "0.5", "--start", "fwsvd"), 2, "--start is for methods that refine"),
        (("--keep", "0.5", "--include", "*LayerNorm*"), 2, "matches none of"),
        (("--keep", "0.5", "--exclude", "*"), 2, "leave no tensor"),
        (("--keep", "0.5", "--exclude", "*.layer.*"), 2, "nothing is selected: an embedding"),
        (("--keep", "0.5", "--method", "fwsvd"), 2, "needs a Fisher of kind factored or diagonal"),
    ],
)  # fmt: skip
def test_bad_flags_are_told_before_any_work(
    cli: Cli, make_model: ModelMaker, tmp_path: Path, flags: tuple[str, ...], code: int, told: str
) -> None:
    model = make_model("m")
    method = () if "--method" in flags else ("--method", "svd")
    result = cli("factorize", model, *method, *flags, "--out", "o")
    assert result.code == code
    assert told in result.err
    assert len(result.err.splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_a_sidecar_that_does_not_serve_is_refused(
    cli: Cli, make_model: ModelMaker, estimated: Sidecar, tmp_path: Path
) -> None:
    model, other = make_model("m"), make_model("other", seed=1)
    sidecar = estimated(model, "diagonal")
    base = ("--keep", "0.5", "--out", "o", "--fisher")
    for target, method, told in (
        (other, "fwsvd", "was estimated on other weights"),
        (model, "kronecker", "method kronecker needs a Fisher of kind kronecker"),
        (model, "asvd", "of kind kronecker or activation, which this has not"),
    ):
        result = cli("factorize", target, "--method", method, *base, sidecar)
        assert result.code == 3
        assert told in result.err
    part = tmp_path / "part"
    flags = ("--data", tmp_path / "data.jsonl", "--include", "*query*", "--out", part, "-q")
    assert cli("estimate-fisher", model, *flags).code == 0
    result = cli("factorize", model, "--method", "fwsvd", *base, part)
    assert result.code == 3
    assert "has no diagonal statistic of bert.encoder.layer.0" in result.err
    assert "--exclude" in result.err
    more = ("--include", "*query.weight", "-q")
    assert cli("factorize", model, "--method", "fwsvd", *base, part, *more).code == 0


def test_a_fisher_of_nothing_is_refused(
    cli: Cli, make_model: ModelMaker, estimated: Sidecar, tmp_path: Path
) -> None:
    model = make_model("m")
    weights = weights_of(model)
    weights["classifier.weight"].zero_()  # nothing below it moves the predictions
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    sidecar = estimated(model)
    for method in ("fwsvd", "kronecker", "tfwsvd"):
        flags = ("--method", method, "--fisher", sidecar, "--keep", "0.5", "--out", "o")
        result = cli("factorize", model, *flags)
        assert result.code == 3
        assert "is zero everywhere: the data did not reach it" in result.err
    assert not (tmp_path / "o").exists()
    result = cli("factorize", model, "--method", "whitened", *flags[2:], "-q")
    assert result.code == 0, result.err


def test_weights_that_are_not_finite_are_refused_by_name(
    cli: Cli, make_model: ModelMaker, tmp_path: Path
) -> None:
    model = make_model("m")
    flags = ("factorize", model, "--method", "svd", "--keep", "0.5", "--out", "o", "-q")
    for name, allowed in ((f"{QUERY}.weight", 3), ("classifier.weight", 0)):
        weights = weights_of(model)
        clean = weights[name].clone()
        weights[name][0, 0] = torch.nan
        save_file(weights, model / "model.safetensors", {"format": "pt"})
        result = cli(*flags)
        assert result.code == 3
        assert f"tensor {name}: has NaN or Inf" in result.err
        assert cli(*flags, "--allow-nonfinite").code == allowed
        weights[name] = clean
        save_file(weights, model / "model.safetensors", {"format": "pt"})


def test_a_dry_run_plans_and_writes_nothing(
    cli: Cli, make_model: ModelMaker, tmp_path: Path
) -> None:
    model = make_model("m")
    flags = ("factorize", model, "--method", "svd", "--keep", "0.5", "--out", "o", "--json")
    planned = cli(*flags, "--dry-run")
    assert planned.code == 0, planned.err
    assert not (tmp_path / "o").exists()
    assert planned.report["status"] == "dry-run"
    done = cli(*flags)
    summary = planned.report["summary"]
    assert summary["bytes_to_write"] == done.report["output"]["bytes"]
    assert summary["parameters_after"] == done.report["summary"]["parameters_after"]
    assert rows_of(planned)[f"{QUERY}.weight"]["rank"] == rows_of(done)[f"{QUERY}.weight"]["rank"]
    unknown = cli(*flags, "--dry-run", "--allocate", "global", "--overwrite")
    assert unknown.code == 0
    assert "parameters_after" not in unknown.report["summary"]
    assert cli(*flags).code == 7


def test_methods_are_listed_with_their_settings(cli: Cli) -> None:
    result = cli("factorize", "--methods")
    assert result.code == 0
    for method in METHODS:
        assert f"{method}  " in result.out
    assert "--set sides=in" in result.out
