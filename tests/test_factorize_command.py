"""`fishertool factorize`, through the command line."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers
from conftest import Cli, Estimate, ModelMaker, files_of, make_text, weights_of
from safetensors.torch import load_file
from test_sentence import make_sentence_model
from torch import Tensor

import fishertool
from fishertool.factorization.fwsvd import fwsvd
from fishertool.factorization.kronecker import kronecker
from fishertool.factorization.rank import Ranks, under_budget_globally
from fishertool.factorization.svd import svd
from fishertool.factorization.whitened import whitened
from fishertool.models.low_rank_layers import LowRankLinear
from fishertool.registry import method_names
from fishertool.searching.ranks import OriginalsJudge, best_allocation
from fishertool.sidecar import open_sidecar, read_kronecker
from fishertool.surgery.factorize_plan import FactorizePlan
from fishertool.surgery.factorize_terms import KeptTerms

QUERY = "bert.encoder.layer.0.attention.self.query"
METHODS = method_names("fishertool.factorization")


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
    cli: Cli, make_model: ModelMaker, estimated: Estimate, tmp_path: Path,
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
    report = cli(*flags, "--format", "dense", "--out", "d", "--json").report
    assert report["summary"]["parameters_after"] == report["output"]["parameters"]
    assert cli(*flags, "--out", "l").code == 0
    dense, pairs = weights_of(tmp_path / "d"), weights_of(tmp_path / "l")
    ranks = json.loads((tmp_path / "l/config.json").read_text())["quantization_config"]["ranks"]
    assert len(ranks) > 7
    before = weights_of(model)
    assert dense.keys() == before.keys()
    for row in report["tensors"]:
        assert row["shape"] == list(dense[row["name"]].shape)
        assert row.get("parameters_after", 0) in (0, dense[row["name"]].numel())
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


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
def test_low_rank_loads_and_computes_what_its_products_do(
    cli: Cli, make_model: ModelMaker, tmp_path: Path, kind: str
) -> None:
    model = make_model("m", kind, spread=0.1, **({"tied": True} if kind == "llama" else {}))
    flags = ("factorize", model, "--method", "svd", "--keep", "0.5", "-q")
    assert cli(*flags, "--out", "l").code == 0
    assert cli(*flags, "--format", "dense", "--out", "d").code == 0
    pairs = fishertool.load_model(tmp_path / "l").eval()
    ranks = json.loads((tmp_path / "l/config.json").read_text())["quantization_config"]["ranks"]
    assert sum(isinstance(one, LowRankLinear) for one in pairs.modules()) == len(ranks)
    dense = type(pairs).from_pretrained(tmp_path / "d").eval()
    ids = torch.tensor([[2, 5, 9, 7, 3]])
    more = {"decoder_input_ids": ids} if kind == "t5" else {}
    with torch.no_grad():
        first, second = (one(input_ids=ids, **more).logits for one in (pairs, dense))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "allocate"),
    [
        *[(method, "auto") for method in METHODS],
        *[("svd", allocate) for allocate in ("uniform", "energy", "global")],
    ],
)
def test_every_method_and_allocation_meets_the_budget(
    cli: Cli, make_model: ModelMaker, estimated: Estimate, data: Path, method: str, allocate: str
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
    assert evaluation["chosen_by"] == "kl"
    assert by_name[summary["allocate"]] == min(by_name.values())
    assert evaluation["metrics"]["kl"] == pytest.approx(min(by_name.values()), rel=0.01, abs=1e-6)


def test_a_budget_for_all_compares_layers_by_the_loss_of_an_example(
    cli: Cli, make_model: ModelMaker, estimated: Estimate
) -> None:
    """The pooler sees one token of an example, and the blocks all of them."""
    model = make_model("m", spread=0.2)
    sidecar, weights = estimated(model), weights_of(model)
    names = ["bert.pooler.dense.weight", "bert.encoder.layer.1.output.dense.weight"]
    tensors, header = open_sidecar(sidecar, "kronecker")
    with tensors:
        found = {
            name: kronecker(weights[name], *read_kronecker(tensors, header, name)) for name in names
        }
    spectra = {name: one.singular_values(one.length) for name, one in found.items()}
    shapes = {name: (len(weights[name]), weights[name].shape[1]) for name in names}
    budget = sum(weights[name].numel() for name in names) // 2
    flags = ("--keep", "0.5", "--allocate", "global", *(f"--include={name}" for name in names))
    result = cli("factorize", model, "--fisher", sidecar, *flags, "--out", "o", "--json")
    assert result.code == 0, result.err
    ranks = {name: row["rank"] for name, row in rows_of(result).items()}
    assert ranks == under_budget_globally(spectra, shapes, budget)


def test_an_embedding_models_allocation_is_chosen_by_its_vectors(
    cli: Cli, make_model: ModelMaker, tmp_path: Path
) -> None:
    model = make_sentence_model(make_model)
    pairs = [{"query": make_text(n, 6), "positive": make_text(n + 9, 8)} for n in range(6)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    flags = ("--method", "svd", "--keep", "0.5", "--allocate", "auto", "--out", "o", "--json")
    result = cli("factorize", model, *flags, "--evaluate-on", "pairs.jsonl")
    assert result.code == 0, result.err
    evaluation = result.report["evaluation"]
    by_name = {row["allocate"]: row["mean_cosine"] for row in evaluation["candidates"]}
    assert evaluation["chosen_by"] == "mean_cosine"
    assert by_name[result.report["summary"]["allocate"]] == max(by_name.values())
    assert min(by_name.values()) < max(by_name.values()) < 1


def test_an_embedding_models_texts_are_cut_as_evaluate_cuts_them(
    cli: Cli, make_model: ModelMaker, tmp_path: Path
) -> None:
    model = make_sentence_model(make_model)
    pairs = [{"query": make_text(n, 60), "positive": make_text(n + 9, 60)} for n in range(6)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    for length in ((), ("--max-length", 8)):
        flags = ("--method", "svd", "--keep", "0.5", "--out", "o", "--overwrite", "--json")
        result = cli("factorize", model, *flags, "--evaluate-on", "pairs.jsonl", *length)
        assert result.code == 0, result.err
        ours = result.report
        theirs = cli("evaluate", "o", "--data", "pairs.jsonl", *length, "--json").report
        assert ours["calibration"]["truncated"] == theirs["calibration"]["truncated"] == 6
        ndcg = theirs["summary"]["ndcg_at_10"]
        assert ours["evaluation"]["metrics"]["ndcg_at_10"] == pytest.approx(ndcg)


def test_what_is_measured_is_what_evaluate_measures(
    cli: Cli, make_model: ModelMaker, estimated: Estimate, data: Path
) -> None:
    model = make_model("m", "gpt2", spread=0.2)
    sidecar = estimated(model)
    for form in ("dense", "low-rank"):
        flags = ("--fisher", sidecar, "--keep", "0.4", "--format", form, "--evaluate-on", data)
        result = cli("factorize", model, *flags, "--out", form, "--json")
        assert result.code == 0, result.err
        again = cli("evaluate", form, "--data", data, "--against", model, "--json")
        assert again.code == 0, again.err
        for name, value in result.report["evaluation"]["metrics"].items():
            assert value == pytest.approx(again.report["summary"][name], rel=1e-4, abs=1e-6)


def test_refining_lowers_the_fisher_weighted_error(
    cli: Cli, make_model: ModelMaker, estimated: Estimate
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


def test_terms_that_nobody_reads_are_not_kept(
    cli: Cli, make_model: ModelMaker, estimated: Estimate, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("m", spread=0.2)
    sidecar = estimated(model, "diagonal")
    kept: list[int] = []
    discard = KeptTerms.discard

    def weigh(self: KeptTerms) -> None:
        kept.append(sum(path.stat().st_size for path in self._folder.iterdir()))
        discard(self)

    monkeypatch.setattr(KeptTerms, "discard", weigh)
    flags = ("--keep", "0.5", "--allocate", "global", "--fisher", sidecar, "--json")
    planned = {}
    for method in ("fwsvd", "tfwsvd"):
        base = ("factorize", model, "--method", method, *flags, "--out", method)
        planned[method] = cli(*base, "--dry-run").report["summary"]["bytes_of_working_files"]
        assert cli(*base).code == 0
    assert kept[0] > 0 and kept[1] == 0
    assert planned["tfwsvd"] < planned["fwsvd"]


def test_a_factored_sidecar_gives_the_same_as_its_diagonal(
    cli: Cli, make_model: ModelMaker, estimated: Estimate, tmp_path: Path
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
    least = int(
        cli(*flags, "--target-parameters", 1, "--out", "x").err.split()[-1].replace(",", "")
    )
    for allocate in ("uniform", "energy", "global"):  # what is told to be possible is
        more = ("--target-parameters", least, "--allocate", allocate)
        result = cli(*flags, *more, "--out", f"least {allocate}", "--json")
        assert result.code == 0, result.err
        assert result.report["summary"]["parameters_after"] == least
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
    result = cli("factorize", model, *flags)
    assert result.code == 0
    assert "nothing was factorized: every selected matrix stays dense" in result.err
    assert files_of(tmp_path / "all").keys() == files_of(model).keys()
    assert (tmp_path / "all/config.json").read_bytes() == (model / "config.json").read_bytes()
    more = ("--keep", "0.9", "--rank-multiple", "4", "--out", "multiple", "--json")
    result = cli("factorize", model, "--method", "svd", *more)
    assert {row["rank"] for row in rows_of(result).values()} == {4, 8}


def test_the_bytes_do_not_depend_on_threads(
    cli: Cli, make_model: ModelMaker, estimated: Estimate, tmp_path: Path
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


@pytest.mark.parametrize(("kind", "dtype"), [("bert", torch.float32), ("gpt2", torch.float16)])
def test_factors_are_trained_and_nothing_else_is(
    cli: Cli, make_model: ModelMaker, data: Path, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    model = make_model("m", kind, spread=0.2, dtype=dtype)
    flags = ("factorize", model, "--method", "svd", "--keep", "0.5", "--evaluate-on", data)
    assert cli(*flags, "--out", "before", "-q").code == 0
    more = ("--finetune-steps", "20", "--data", data, "--learning-rate", "0.01")
    result = cli(*flags, *more, "--out", "after", "--json")
    assert result.code == 0, result.err
    before, after = weights_of(tmp_path / "before"), weights_of(tmp_path / "after")
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".up." in name or ".down." in name for name in changed)
    assert {name for name in after if name.endswith(".down.weight")} <= changed
    recovery, evaluation = result.report["summary"]["recovery"], result.report["evaluation"]
    assert result.report["options"]["finetune"]["data"]["data"] == data.name
    assert recovery["loss_after"] < recovery["loss_before"]
    assert evaluation["metrics"]["loss"] < evaluation["before_recovery"]["loss"]
    again = cli("evaluate", "after", "--data", data, "--json").report["summary"]
    assert evaluation["metrics"]["loss"] == pytest.approx(again["loss"], rel=1e-3)
    assert not (tmp_path / "after/trained").exists()
    outputs = {one["file"]: one["sha256"] for one in result.report["output"]["files"]}
    assert {name: files_of(tmp_path / "after")[name] for name in outputs} == outputs
    assert cli(*flags, *more, "--out", "again", "-q").code == 0
    assert files_of(tmp_path / "again") == files_of(tmp_path / "after")


@pytest.mark.parametrize("criterion", ["kl", "mean_cosine"])
def test_ranks_whose_model_is_not_finite_are_the_last_choice(criterion: str) -> None:
    measured = iter([math.nan, 0.5, math.nan])
    judge = cast(OriginalsJudge, SimpleNamespace(measure=lambda rows: {criterion: next(measured)}))
    plan = cast(FactorizePlan, SimpleNamespace(shapes={}))
    candidates: dict[str, Ranks] = {"uniform": {}, "energy": {}, "global": {}}
    best, tried = best_allocation(plan, candidates, cast(Any, None), judge, lambda count: None)
    assert best == "energy" and len(tried["candidates"]) == 3
    assert tried["chosen_by"] == criterion
