"""`fishertool merge`, through the command line."""

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import VOCABULARY, Cli, ModelMaker, files_of, weights_of
from safetensors.torch import load_file, save_file

from fishertool.checkpoint.compare import settings_that_differ
from fishertool.checkpoint.dtypes import TORCH
from fishertool.checkpoint.stored import FLOATING
from fishertool.searching.weights import MergesJudge

MakePair = Callable[..., tuple[Path, Path]]


@pytest.fixture
def pair(make_model: ModelMaker) -> tuple[Path, Path]:
    return make_model("a", seed=1), make_model("b", seed=2)


@pytest.fixture
def sidecars(cli: Cli, pair: tuple[Path, Path], data: Path) -> tuple[Path, Path]:
    for model in pair:
        out = model.with_name(f"f{model.name}")
        assert cli("estimate-fisher", model, "--data", data, "--out", out, "-q").code == 0
    return pair[0].with_name("fa"), pair[1].with_name("fb")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "shards"), [("bert", "5GB"), ("llama", "6KB"), ("gpt2", "5GB")])
def test_linear_is_the_average_rounded_once_and_loads(
    cli: Cli, make_model: ModelMaker, dtype: torch.dtype, kind: str, shards: str, tmp_path: Path
) -> None:
    a = make_model("a", kind, 1, dtype, shards)
    b = make_model("b", kind, 2, dtype)
    result = cli("merge", a, b, "--weights", "3,1", "--out", "o", "--json")
    assert result.code == 0, result.err
    first, second, merged = weights_of(a), weights_of(b), weights_of(tmp_path / "o")
    assert set(merged) == set(first)
    for name, value in merged.items():
        expected = (0.75 * first[name].double() + 0.25 * second[name].double()).to(dtype)
        exact = dtype != torch.float32
        torch.testing.assert_close(
            value, expected, rtol=0 if exact else 1e-6, atol=0 if exact else 1e-8
        )
    auto = {"bert": transformers.AutoModelForSequenceClassification}.get(
        kind, transformers.AutoModelForCausalLM
    )
    _, found = auto.from_pretrained(tmp_path / "o", output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    transformers.AutoTokenizer.from_pretrained(tmp_path / "o")


def test_fisher_merge_follows_the_definition(
    cli: Cli, pair: tuple[Path, Path], sidecars: tuple[Path, Path], tmp_path: Path
) -> None:
    flags = ("--fisher", sidecars[0], "--fisher", sidecars[1], "--weights", "0.6,0.4")
    result = cli("merge", *pair, "--method", "fisher", *flags, "--set", "floor=0.001", "--out", "o")
    assert result.code == 0, result.err
    models = [{k: v.double() for k, v in weights_of(folder).items()} for folder in pair]
    fishers = [{k: v.double() for k, v in weights_of(folder).items()} for folder in sidecars]
    means = [torch.cat([v.flatten() for v in fisher.values()]).mean() for fisher in fishers]
    for name, value in weights_of(tmp_path / "o").items():
        amounts = [
            c * fisher[name].clamp(min=0.001 * float(fisher[name].mean())) / mean
            for c, fisher, mean in zip((0.6, 0.4), fishers, means, strict=True)
        ]
        total = amounts[0] + amounts[1]
        average = 0.6 * models[0][name] + 0.4 * models[1][name]
        expected = torch.where(
            total > 0,
            (amounts[0] * models[0][name] + amounts[1] * models[1][name]) / total,
            average,
        )
        torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=1e-8)


def test_factored_sidecars_weight_by_the_product_of_their_sums(
    cli: Cli, pair: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    merge = (
        "merge",
        *pair,
        "--method",
        "fisher",
        "--set",
        "floor=0",
        "--set",
        "normalization=none",
    )
    for model in pair:
        for kind in ("diagonal", "factored"):
            flags = ("--data", data, "--kind", kind, "--out", f"{kind}-{model.name}", "-q")
            assert cli("estimate-fisher", model, *flags).code == 0
    assert cli(*merge, "--fisher", "factored-a", "--fisher", "factored-b", "--out", "o").code == 0
    models = [{k: v.double() for k, v in weights_of(folder).items()} for folder in pair]
    fishers = [weights_of(tmp_path / f"diagonal-{model.name}") for model in pair]
    for name, value in weights_of(tmp_path / "o").items():
        amounts = [fisher[name].double() for fisher in fishers]
        if value.dim() == 2:
            amounts = [f.sum(1).outer(f.sum(0)) / f.sum().clamp(min=1e-300) for f in amounts]
        total = amounts[0] + amounts[1]
        known = total > 1e-6 * total.mean()
        expected = (amounts[0] * models[0][name] + amounts[1] * models[1][name]) / total
        torch.testing.assert_close(value.double()[known], expected[known], rtol=1e-4, atol=1e-7)
    wrong = cli(*merge, "--fisher", "factored-b", "--fisher", "factored-a", "--out", "p")
    assert (wrong.code, "was estimated on other weights" in wrong.err) == (3, True)


def test_matena_keeps_the_first_head_and_survives_zero_weights(
    cli: Cli, pair: tuple[Path, Path], sidecars: tuple[Path, Path], tmp_path: Path
) -> None:
    flags = ("--method", "fisher", "--fisher", sidecars[0], "--fisher", sidecars[1])
    result = cli(
        "merge", *pair, *flags, "--preset", "matena", "--weights", "0,1", "--out", "o", "--json"
    )
    assert result.code == 0, result.err
    assert result.report["options"]["recipe"]["head"] == "keep-first"
    assert result.report["options"]["recipe"]["parameters"]["normalization"] == "l2"
    merged, first, second = (weights_of(p) for p in (tmp_path / "o", *pair))
    for name, value in merged.items():
        assert value.isfinite().all()
        torch.testing.assert_close(
            value, (first if name.startswith("classifier") else second)[name]
        )


def test_base_anchors_what_nobody_knows(
    cli: Cli,
    make_model: ModelMaker,
    pair: tuple[Path, Path],
    sidecars: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    base = make_model("base", seed=3)
    flags = ("--method", "fisher", "--fisher", sidecars[0], "--fisher", sidecars[1], "--base", base)
    results = {}
    for anchor in ("0.001", "1e9"):
        out = tmp_path / anchor
        assert cli("merge", *pair, *flags, "--anchor", anchor, "--out", out).code == 0
        results[anchor] = weights_of(out)
    original = weights_of(base)
    unseen = "bert.embeddings.position_embeddings.weight"
    for name, value in results["1e9"].items():
        torch.testing.assert_close(value, original[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(results["0.001"][unseen][-1], original[unseen][-1])
    assert not torch.allclose(results["0.001"][unseen][1], original[unseen][1])


def test_trim_is_the_setting_of_that_name_and_needs_a_base(
    cli: Cli,
    make_model: ModelMaker,
    pair: tuple[Path, Path],
    sidecars: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    flags = ("--method", "fisher", "--fisher", sidecars[0], "--fisher", sidecars[1], "-q")
    based = (*flags, "--base", make_model("base", seed=3))
    for out, more in (("all", ()), ("flag", ("--trim", 0.2)), ("set", ("--set", "trim=0.2"))):
        assert cli("merge", *pair, *based, *more, "--out", out).code == 0
    whole, flag, named = (files_of(tmp_path / out) for out in ("all", "flag", "set"))
    assert flag == named != whole
    refused = cli("merge", *pair, *flags, "--trim", 0.2, "--out", "no")
    assert (refused.code, "needs a base" in refused.err) == (2, True)


def test_the_output_has_the_dtype_of_the_flag(
    cli: Cli, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    assert cli("merge", *pair, "--dtype", "bfloat16", "--out", "o", "-q").code == 0
    first, second = map(weights_of, pair)
    for name, value in weights_of(tmp_path / "o").items():
        exact = (0.5 * first[name].double() + 0.5 * second[name].double()).to(torch.bfloat16)
        assert torch.equal(value, exact)


def test_power_changes_the_weighting(
    cli: Cli, pair: tuple[Path, Path], sidecars: tuple[Path, Path], tmp_path: Path
) -> None:
    flags = ("--method", "fisher", "--fisher", sidecars[0], "--fisher", sidecars[1], "-q")
    assert cli("merge", *pair, *flags, "--power", "0", "--out", "zero").code == 0
    assert cli("merge", *pair, "--out", "linear", "-q").code == 0
    linear = weights_of(tmp_path / "linear")
    for name, value in weights_of(tmp_path / "zero").items():
        torch.testing.assert_close(value, linear[name])


def test_same_bytes_at_any_thread_count_shard_layout_and_run(
    cli: Cli, make_model: ModelMaker, tmp_path: Path
) -> None:
    a, b = make_model("a", "llama", 1), make_model("b", "llama", 2, shards="5KB")
    for out, threads in (("one", 1), ("four", 4)):
        assert (
            cli("merge", a, b, "--out", out, "--threads", threads, "--max-shard-size", "9KB").code
            == 0
        )
    assert files_of(tmp_path / "one") == files_of(tmp_path / "four")
    reports = [
        json.loads((tmp_path / out / "fishertool_report.json").read_text())
        for out in ("one", "four")
    ]
    for report in reports:
        del report["environment"], report["phases"], report["options"]["out"]
    assert reports[0] == reports[1]


def test_report_digests_are_those_of_the_files(
    cli: Cli, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    flags = ("--max-shard-size", "10KB", "--json", "--report", "copy.json")
    report = cli("merge", *pair, "--out", "o", *flags).report
    assert "model.safetensors.index.json" in [row["file"] for row in report["output"]["files"]]
    total = sum(row["bytes"] for row in report["output"]["files"])
    assert report["output"]["bytes"] == report["summary"]["bytes"] == total
    for place, folder in ((report["output"], tmp_path / "o"), (report["inputs"][1], pair[1])):
        for row in place["files"]:
            content = (folder / row["file"]).read_bytes()
            assert (row["bytes"], row["sha256"]) == (
                len(content),
                hashlib.sha256(content).hexdigest(),
            )
    written = json.loads((tmp_path / "o" / "fishertool_report.json").read_text())
    assert written == report == json.loads((tmp_path / "copy.json").read_text())
    assert str(tmp_path) not in json.dumps(report)


def test_output_modes_follow_the_umask(cli: Cli, pair: tuple[Path, Path], tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        assert cli("merge", *pair, "--out", "o").code == 0
    finally:
        os.umask(previous)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "o").iterdir()}
    assert modes == {0o640}
    assert stat.S_IMODE((tmp_path / "o").stat().st_mode) == 0o750


def test_companions_go_along_and_code_does_not(
    cli: Cli, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    for name in ("evil.py", "old.bin", "README.md", "LICENSE", "generation_config.json"):
        (pair[0] / name).write_text("{}")
    report = cli("merge", *pair, "--out", "o", "--json").report
    names = {path.name for path in (tmp_path / "o").iterdir()}
    assert {"LICENSE", "generation_config.json", "tokenizer.json", "config.json"} <= names
    assert not {"evil.py", "old.bin", "README.md"} & names
    assert report["output"]["left_out"] == ["README.md", "evil.py", "old.bin"]


def test_dry_run_plans_and_writes_nothing(
    cli: Cli, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    report = cli("merge", *pair, "--out", "o", "--dry-run", "--json").report
    assert report["status"] == "dry-run"
    summary = report["summary"]
    size = (pair[0] / "model.safetensors").stat().st_size
    assert abs(summary["bytes_to_write"] - size) < 200
    assert {"bytes_to_read", "free_bytes", "estimated_peak_bytes", "shards"} <= set(summary)
    assert sorted(tmp_path.iterdir()) == before
    done = cli("merge", *pair, "--out", "o", "--json").report["summary"]
    assert summary["tensors"] == done["tensors"]


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (["--evaluate-on", "no.jsonl"], 3, "no.jsonl: no such file"),
        (
            ["--evaluate-on", "data.jsonl", "--search-weights", "grid", "--metric", "acuracy"],
            2,
            "did you mean 'accuracy'?",
        ),
    ],
)
def test_what_cannot_be_measured_is_told_before_any_work(
    cli: Cli, pair: tuple[Path, Path], data: Path, dry_run: list[str], flags: list[str],
    code: int, told: str,
) -> None:  # fmt: skip
    result = cli("merge", *pair, "--out", "o", *flags, *dry_run)
    assert (result.code, told in result.err) == (code, True), result.err
    assert not Path("o").exists()


def test_weights_are_told_where_the_method_has_a_use_for_them(
    cli: Cli, pair: tuple[Path, Path]
) -> None:
    for method, weights in (("linear", [0.5, 0.5]), ("nearswap", None)):
        result = cli("merge", *pair, "--method", method, "--out", method, "--json")
        assert result.code == 0, result.err
        assert result.report["summary"]["weights"] == weights


def test_include_and_exclude_keep_the_first_models_tensors(
    cli: Cli, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    flags = ("--include", "bert.encoder.*", "--exclude", "*.bias")
    assert cli("merge", *pair, *flags, "--out", "o").code == 0
    first, merged = weights_of(pair[0]), weights_of(tmp_path / "o")
    changed = {name for name in merged if not torch.equal(merged[name], first[name])}
    assert changed
    assert all(n.startswith("bert.encoder") and not n.endswith("bias") for n in changed)
    assert cli("merge", *pair, "--include", "nothing*", "--out", "p").code == 2


@pytest.mark.parametrize(("head", "code"), [("error", 3), ("merge", 3), ("keep-first", 0)])
def test_heads_of_another_size(
    cli: Cli, make_model: ModelMaker, head: str, code: int, tmp_path: Path
) -> None:
    a, c = make_model("a", seed=1), make_model("c", seed=2, labels=4)
    result = cli("merge", a, c, "--head", head, "--out", "o")
    assert result.code == code, result.err
    if code:
        assert "--head keep-first" in result.err
        assert not (tmp_path / "o").exists()
    else:
        head_weight = weights_of(tmp_path / "o")["classifier.weight"]
        torch.testing.assert_close(head_weight, weights_of(a)["classifier.weight"], rtol=0, atol=0)


def test_a_base_without_the_head_needs_it_left_out(
    cli: Cli, make_model: ModelMaker, pair: tuple[Path, Path]
) -> None:
    base = make_model("base", seed=3, head="ForMaskedLM")
    command = ("merge", *pair, "--base", base, "--method", "ties", "--out", "o", "-q")
    refused = cli(*command)
    assert refused.code == 3
    assert f"{base}: lacks " in refused.err and "--exclude it" in refused.err
    assert "--head keep-first" in refused.err
    left_out = cli(*command, "--exclude", "*pooler*", "--head", "keep-first")
    assert left_out.code == 0, left_out.err


def test_a_base_model_alone_is_the_base_of_models_with_heads(
    cli: Cli, make_model: ModelMaker, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """Its tensors lack the prefix of theirs."""
    base = make_model("base", seed=3, head="Model")
    command = ("merge", *pair, "--base", base, "--method", "task-arithmetic", "-q", "--out", "o")
    assert cli(*command, "--head", "keep-first", "--dry-run").code == 0
    result = cli(*command, "--weights", "1,-1", "--head", "keep-first")
    assert result.code == 0, result.err
    a, b, ours, merged = map(weights_of, (*pair, base, tmp_path / "o"))
    for name, value in merged.items():
        expected = a[name]
        if name.startswith("bert."):
            expected = ours[name.removeprefix("bert.")] + a[name] - b[name]
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("method", ["task-arithmetic", "ties", "breadcrumbs", "dare-linear"])
def test_one_task_vector_is_scaled_or_negated(
    cli: Cli, pair: tuple[Path, Path], tmp_path: Path, method: str
) -> None:
    model, base = pair
    keep_all = [] if method == "task-arithmetic" else ["--set", "density=1"]
    keep_all += ["--set", "gamma=0"] if method == "breadcrumbs" else []
    normalize = ["--set", "normalize=false"]
    flags = ["--base", base, "--method", method, *keep_all, *normalize, "--weights", "-0.5"]
    result = cli("merge", model, *flags, "--out", "o")
    assert result.code == 0, result.err
    theirs, ours, merged = weights_of(model), weights_of(base), weights_of(tmp_path / "o")
    for name, value in merged.items():
        torch.testing.assert_close(value, ours[name] - 0.5 * (theirs[name] - ours[name]))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--method", "ties", "--weights", "0.5"], "--set normalize=false"),
        (["--method", "multislerp", "--weights", "-1"], "merges two or more models; 1 given"),
    ],
)
def test_a_weight_of_one_model_that_has_no_effect_is_refused(
    cli: Cli, pair: tuple[Path, Path], flags: list[str], told: str
) -> None:
    result = cli("merge", pair[0], "--base", pair[1], *flags, "--out", "o")
    assert (result.code, told in result.err) == (2, True), result.err


def test_a_model_that_is_the_base_is_not_counted(cli: Cli, pair: tuple[Path, Path]) -> None:
    flags = ("--base", pair[1], "--method", "model-stock", "--out", "o")
    result = cli("merge", *pair, *flags)
    assert result.code == 2
    assert "model-stock merges two or more models; 1 given beside the base" in result.err


@pytest.mark.parametrize(
    ("mine", "theirs", "told"),
    [
        ({"rms_norm_eps": 1e-6, "use_cache": 1}, {"rms_norm_eps": 1, "use_cache": 0},
         ["rms_norm_eps 1 for 1e-06"]),
        ({"n_head": 2}, {"n_head": 4}, ["n_head 4 for 2"]),
        ({"rope_theta": 1e4, "rope_scaling": None},
         {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, []),
        ({"rope_theta": 1e4}, {"rope_parameters": {"rope_theta": 1e6}},
         ["rope_theta 1000000.0 for 10000.0"]),
        ({"rope_scaling": {"type": "linear", "factor": 2}},
         {"rope_parameters": {"rope_type": "linear", "factor": 4}}, ["factor 4 for 2"]),
        ({"rope_scaling": None}, {"rope_scaling": {"type": "yarn", "factor": 4}},
         ["rope_type yarn for default"]),
        ({"rope_scaling": "hostile"}, {"rope_scaling": {"type": "yarn"}},
         ["rope_type yarn for default"]),
        ({"text_config": {"head_dim": 8}}, {"text_config": {"head_dim": 4}},
         ["text_config.head_dim 4 for 8"]),
        ({"max_window_layers": 2, "use_sliding_window": False},
         {"max_window_layers": 3, "use_sliding_window": False}, []),
    ],
)  # fmt: skip
def test_settings_that_use_the_same_weights_otherwise(
    mine: dict[str, Any], theirs: dict[str, Any], told: list[str]
) -> None:
    assert settings_that_differ(mine, theirs) == told


def test_configs_that_use_the_same_weights_otherwise_are_told_of(
    cli: Cli, make_model: ModelMaker
) -> None:
    a, b = make_model("a", "llama", 1), make_model("b", "llama", 2)
    config = json.loads((b / "config.json").read_text())
    config |= {"rms_norm_eps": 0.5, "use_cache": False}
    (b / "config.json").write_text(json.dumps(config))
    result = cli("merge", a, b, "--out", "o", "--json")
    assert result.code == 0, result.err
    [told] = result.report["warnings"]
    assert told == (
        "b: its config.json has rms_norm_eps 0.5 for 1e-06 in a, whose config the output has"
    )


def test_what_is_left_out_may_be_missing_or_of_another_shape(
    cli: Cli, make_model: ModelMaker, tmp_path: Path
) -> None:
    a, b = make_model("a", seed=1), make_model("b", seed=2, labels=4)
    extra = {**weights_of(b), "bert.embeddings.more": torch.arange(3)}
    save_file(extra, b / "model.safetensors", {"format": "pt"})
    flags = ("--exclude", "classifier*", "--exclude", "*.more", "--head", "merge", "-q")
    for first, second, out in ((a, b, "o"), (b, a, "p")):
        assert cli("merge", first, second, *flags, "--out", out, "--dry-run").code == 0
        result = cli("merge", first, second, *flags, "--out", out)
        assert result.code == 0, result.err
        mine, merged = weights_of(first), weights_of(tmp_path / out)
        assert merged.keys() == mine.keys()
        kept = {name for name in merged if torch.equal(merged[name], mine[name])}
        assert {name for name in merged if "classifier" in name or "more" in name} <= kept
    assert cli("merge", a, b, *flags, "--exclude", "nothing*", "--out", "q").code == 2


@pytest.mark.parametrize("old", ["first", "second"])
def test_a_buffer_that_only_older_files_have_is_in_nobodys_way(
    cli: Cli, pair: tuple[Path, Path], tmp_path: Path, old: str
) -> None:
    name = "bert.embeddings.position_ids"
    folder = pair[0 if old == "first" else 1]
    save_file(
        {**weights_of(folder), name: torch.arange(32)[None]},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    assert cli("merge", *pair, "--out", "o", "--dry-run").code == 0
    assert cli("merge", *pair, "--out", "o", "-q").code == 0
    assert (name in weights_of(tmp_path / "o")) == (old == "first")


def test_heads_with_other_class_names(cli: Cli, pair: tuple[Path, Path]) -> None:
    config = json.loads((pair[1] / "config.json").read_text())
    config["id2label"] = {"0": "x", "1": "y", "2": "z"}
    (pair[1] / "config.json").write_text(json.dumps(config))
    refused = cli("merge", *pair, "--out", "o")
    assert refused.code == 3
    assert "x, y, z" in refused.err
    assert cli("merge", *pair, "--head", "merge", "--out", "o").code == 0


@pytest.mark.parametrize("tied", [False, True])
def test_the_first_head_is_kept_or_told_to_be_none(
    cli: Cli, make_model: ModelMaker, tied: bool, tmp_path: Path
) -> None:
    a, b = (make_model(x, "t5", ord(x)) for x in "ab")
    for folder in () if tied else (a, b):
        tensors = weights_of(folder)
        tensors["lm_head.weight"] = tensors["shared.weight"] + 1
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    result = cli("merge", a, b, "--head", "keep-first", "--out", "o", "-q")
    assert result.code == 0, result.err
    assert ("no model has a head of its own" in result.err) is tied
    if not tied:
        heads = (weights_of(folder)["lm_head.weight"] for folder in (a, tmp_path / "o"))
        assert torch.equal(*heads)


@pytest.mark.parametrize("labels", [["a", "b", "c"], "abc"])
def test_class_names_that_are_no_mapping_are_refused(
    cli: Cli, pair: tuple[Path, Path], labels: object
) -> None:
    path = pair[1] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": labels}))
    result = cli("merge", *pair, "--out", "o")
    assert result.code == 3
    assert f"{path}: id2label maps no ids to names" in result.err


def test_tied_weights_are_written_once(cli: Cli, make_model: ModelMaker, tmp_path: Path) -> None:
    a, b = make_model("a", "llama", 1, tied=True), make_model("b", "llama", 2, tied=True)
    tensors = load_file(a / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, a / "model.safetensors", {"format": "pt"})
    result = cli("merge", a, b, "--out", "o")
    assert result.code == 0, result.err
    assert "lm_head.weight" not in weights_of(tmp_path / "o")


def change(folder: Path, name: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def write_header(folder: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + data
    (folder / "model.safetensors").write_bytes(content)


WORD = "bert.embeddings.word_embeddings.weight"
BREAK: dict[str, tuple[Callable[[Path], object], str]] = {
    "half bytes": (
        lambda folder: write_header(
            folder, {"w": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}, b"ab"
        ),
        "tensor w: F4 cannot be computed with",
    ),
    "truncated": (
        lambda folder: os.truncate(folder / "model.safetensors", 9000),
        "truncated",
    ),
    "missing tensor": (
        lambda folder: change(folder, WORD, lambda t: t.pop(WORD)),
        f"lacks {WORD}",
    ),
    "extra tensor": (
        lambda folder: change(folder, WORD, lambda t: t.update(extra=torch.ones(2))),
        "lacks extra",
    ),
    "another shape": (
        lambda folder: change(folder, WORD, lambda t: t.update({WORD: torch.ones(5, 16)})),
        f"{WORD} is F32 [5, 16], but F32 [{len(VOCABULARY)}, 16]",
    ),
    "nan": (
        lambda folder: change(folder, WORD, lambda t: t[WORD][3].fill_(float("nan"))),
        f"{WORD}: has NaN or Inf",
    ),
    "inf": (
        lambda folder: change(folder, WORD, lambda t: t[WORD][3].fill_(float("-inf"))),
        f"{WORD}: has NaN or Inf",
    ),
    "quantized": (
        lambda folder: (folder / "config.json").write_text(
            json.dumps({"quantization_config": {"quant_method": "fp8"}})
        ),
        "quantized (fp8)",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: missing"),
    "pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "pickled weights",
    ),
}


def test_a_bad_input_is_refused_by_a_dry_run_that_reads_headers(
    cli: Cli, pair: tuple[Path, Path]
) -> None:
    break_it, told = BREAK["half bytes"]
    break_it(pair[1])
    result = cli("merge", *pair, "--out", "o", "--dry-run")
    assert result.code == 3 and told in result.err


@pytest.mark.parametrize("fault", BREAK)
def test_bad_inputs_are_refused_and_an_older_output_is_intact(
    cli: Cli, pair: tuple[Path, Path], fault: str, tmp_path: Path
) -> None:
    assert cli("merge", *pair, "--out", "o", "-q").code == 0
    before, listing = files_of(tmp_path / "o"), sorted(tmp_path.iterdir())
    break_it, told = BREAK[fault]
    break_it(pair[1])
    result = cli("merge", *pair, "--out", "o", "--overwrite")
    assert result.code == 3, result.err
    assert told in result.err
    assert str(pair[1]) in result.err
    assert result.err.count("\n") == 1
    assert files_of(tmp_path / "o") == before
    assert sorted(tmp_path.iterdir()) == listing


def test_allow_nonfinite_takes_them_as_they_come(
    cli: Cli, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    BREAK["nan"][0](pair[1])
    assert cli("merge", *pair, "--out", "o", "--allow-nonfinite").code == 0
    assert weights_of(tmp_path / "o")[WORD][3].isnan().all()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", sorted(FLOATING))
def test_what_is_not_finite_is_refused_whatever_it_is_rounded_to(
    dtype: str, value: float, cli: Cli, tmp_path: Path
) -> None:
    for name, tensor in (("a", torch.ones(4, 3).to(TORCH[dtype])), ("b", torch.ones(4, 3))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        if name == "b":
            tensor[1, 2] = value
        save_file({"w": tensor}, tmp_path / name / "model.safetensors")
    result = cli("merge", tmp_path / "a", tmp_path / "b", "--out", "o")
    assert result.code == 3
    assert f"{tmp_path / 'b' / 'model.safetensors'}: tensor w: has NaN or Inf" in result.err


def test_a_result_that_does_not_fit_its_dtype_is_refused(
    cli: Cli, make_model: ModelMaker, tmp_path: Path
) -> None:
    a, b = make_model("a", dtype=torch.float16), make_model("b", dtype=torch.float16)
    change(a, WORD, lambda t: t[WORD].fill_(60000))
    change(b, WORD, lambda t: t[WORD].fill_(60000))
    result = cli("merge", a, b, "--weights", "1,1", "--set", "normalize=false", "--out", "o")
    assert result.code == 3
    assert "do not fit F16" in result.err


@pytest.mark.parametrize(("value", "code"), [(448.0, 0), (464.0, 0), (465.0, 3), (1e9, 3)])
def test_what_a_small_float_has_no_room_for_is_refused(
    value: float, code: int, cli: Cli, tmp_path: Path
) -> None:
    """torch rounds it to the largest number there is."""
    zeros = torch.zeros(4, 3).to(torch.float8_e4m3fn)  # what is written is of the first's dtype
    for name, tensor in (("a", zeros), ("b", torch.full((4, 3), value))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        save_file({"w": tensor}, tmp_path / name / "model.safetensors")
    result = cli("merge", tmp_path / "a", tmp_path / "b", "--weights", "0,1", "--out", "o")
    assert result.code == code, result.err
    assert ("do not fit F8_E4M3" in result.err) == (code == 3)
    if code == 0:
        assert (load_file(tmp_path / "o" / "model.safetensors")["w"].float() == 448).all()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--method", "fisher"], "one --fisher for each"),
        (["--fisher", "fa"], "1 sidecars for 2 models"),
        (["--base", "c"], "takes no --base"),
        (["--method", "fishr"], "did you mean 'fisher'?"),
        (["--set", "normalise=1"], "did you mean 'normalize'?"),
        (["--set", "normalize=2"], "is not a bool"),
        (["--preset", "matena"], "is for --method fisher"),
        (["--weights", "1"], "1 numbers for 2 models"),
        (["--method", "nearswap", "--weights", "1,2"], "takes no --weights"),
        (["--method", "nearswap", "--set", "t=-0.5"], "method nearswap: t -0.5 is negative"),
        (["--method", "karcher", "--set", "tol=0"], "method karcher: tol 0.0 is not above zero"),
        (["--dtype", "bf16"], "did you mean 'bfloat16'?"),
        (["--weights", "0,0"], "--weights must not all be 0"),
        (["--weights", "0.1,-0.1"], "weights that sum to 0 cannot be normalized"),
        (["--weights", "nan,2"], "--weights nan,2: are finite numbers"),
        (["--method", "slerp", "--set", "t=0.2", "--weights", "1,2"], "give one of them"),
        (["--head", "keep-frist"], "did you mean 'keep-first'?"),
        (["--max-shard-size", "5XB"], "5GB, 500MB"),
        (["--search-weights", "grid"], "--evaluate-on"),
        (["--label-column", "y"], "--label-column: needs --evaluate-on"),
        (["--num-examples", "3"], "--num-examples: needs --evaluate-on"),
        (["--shuffle"], "--shuffle: needs --evaluate-on"),
        (["--batch-size", "2"], "--batch-size: needs --evaluate-on"),
        (["--metric", "loss"], "--metric: needs --search-weights"),
        (["--search-points", "3", "--evaluate-on", "d"], "--search-points: needs --search-weights"),
    ],
)
def test_bad_flags(cli: Cli, pair: tuple[Path, Path], flags: list[str], told: str) -> None:
    result = cli("merge", *pair, "--out", "o", *flags)
    assert result.code == 2, result.err
    assert told in result.err


def test_sidecars_in_the_wrong_order_are_refused(
    cli: Cli, pair: tuple[Path, Path], sidecars: tuple[Path, Path], tmp_path: Path
) -> None:
    flags = ("--method", "fisher", "--fisher", sidecars[1], "--fisher", sidecars[0])
    result = cli("merge", *pair, *flags, "--out", "o")
    assert result.code == 3
    assert "in the order of the models" in result.err
    assert not (tmp_path / "o").exists()


def test_a_sidecar_that_lacks_a_tensor_is_refused_by_name(
    cli: Cli, pair: tuple[Path, Path], sidecars: tuple[Path, Path], data: Path
) -> None:
    flags = ("--exclude", "classifier.*", "--overwrite", "-q")
    assert cli("estimate-fisher", pair[1], "--data", data, "--out", sidecars[1], *flags).code == 0
    merge = ("merge", *pair, "--method", "fisher", "--fisher", sidecars[0], "--fisher", sidecars[1])
    result = cli(*merge, "--out", "o")
    assert result.code == 3
    assert "no Fisher of classifier" in result.err
    assert cli(*merge, "--exclude", "classifier.*", "--out", "o").code == 0


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_a_spoilt_sidecar_is_refused(
    cli: Cli, pair: tuple[Path, Path], sidecars: tuple[Path, Path], value: float
) -> None:
    from safetensors import safe_open

    path = sidecars[1] / "diagonal.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors[WORD][0, 0] = value
    save_file(tensors, path, metadata)
    flags = ("--method", "fisher", "--fisher", sidecars[0], "--fisher", sidecars[1])
    result = cli("merge", *pair, *flags, "--out", "o")
    assert result.code == 3
    assert f"{WORD}: a Fisher must be finite and not negative" in result.err
    save_file(tensors, path, {"format": "pt"})
    assert "not a Fisher sidecar" in cli("merge", *pair, *flags, "--out", "o").err


def test_existing_outputs(cli: Cli, pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert cli("merge", *pair, "--out", "o", "--max-shard-size", "10KB").code == 0
    refused = cli("merge", *pair, "--out", "o")
    assert refused.code == 7
    assert "--overwrite" in refused.err
    assert cli("merge", *pair, "--out", "o", "--overwrite").code == 0
    assert [path.name for path in (tmp_path / "o").glob("*.safetensors*")] == ["model.safetensors"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert cli("merge", *pair, "--out", "mine", "--overwrite").code == 7
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert cli("merge", *pair, "--out", pair[0], "--overwrite").code == 2


def test_whole_numbers_must_agree(cli: Cli, pair: tuple[Path, Path], tmp_path: Path) -> None:
    for folder in pair:
        change(folder, "", lambda t: t.update(ids=torch.arange(5)))
    assert cli("merge", *pair, "--out", "o").code == 0
    assert weights_of(tmp_path / "o")["ids"].tolist() == [0, 1, 2, 3, 4]
    change(pair[1], "", lambda t: t.update(ids=torch.arange(5) + 1))
    result = cli("merge", *pair, "--out", "p")
    assert result.code == 3
    assert "tensor ids: its whole numbers differ" in result.err


def test_config_states_the_dtype_of_the_weights(
    cli: Cli, make_model: ModelMaker, tmp_path: Path
) -> None:
    a, b = make_model("a", dtype=torch.bfloat16), make_model("b", dtype=torch.bfloat16)
    config = json.loads((a / "config.json").read_text()) | {"dtype": "float32"}
    (a / "config.json").write_text(json.dumps(config))
    assert cli("merge", a, b, "--out", "o").code == 0
    assert json.loads((tmp_path / "o" / "config.json").read_text())["dtype"] == "bfloat16"


def test_weight_search_finds_the_best_of_the_grid(
    cli: Cli, pair: tuple[Path, Path], sidecars: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    flags = (
        "--search-weights",
        "grid",
        "--search-points",
        5,
        "--evaluate-on",
        data,
        "--metric",
        "loss",
    )
    fisher = ("--method", "fisher", "--fisher", sidecars[0], "--fisher", sidecars[1])
    result = cli("merge", *pair, *fisher, *flags, "--out", "o", "--json")
    assert result.code == 0, result.err
    rows = result.report["evaluation"]["candidates"]
    assert [row["weights"][0] for row in rows] == [1.0, 0.75, 0.5, 0.25, 0.0]
    best = min(rows, key=lambda row: row["loss"])
    assert result.report["summary"]["weights"] == best["weights"]
    measured = cli("evaluate", tmp_path / "o", "--data", data, "--json").report["summary"]
    assert measured["loss"] == pytest.approx(best["loss"], rel=1e-6)
    assert sorted(path.name for path in (tmp_path / "o").iterdir() if path.is_dir()) == []


def test_dirichlet_search_is_seeded(cli: Cli, make_model: ModelMaker, data: Path) -> None:
    models = [make_model(name, seed=n) for n, name in enumerate("abc")]
    flags = ("--search-weights", "dirichlet", "--search-points", 3, "--evaluate-on", data, "--json")
    runs = [
        cli("merge", *models, *flags, "--seed", seed, "--out", f"o{n}").report
        for n, seed in enumerate((0, 0, 1))
    ]
    candidates = [run["evaluation"]["candidates"] for run in runs]
    assert candidates[0] == candidates[1] != candidates[2]
    for row in candidates[0]:
        assert sum(row["weights"]) == pytest.approx(1)
    grid = cli("merge", *models, "--search-weights", "grid", "--evaluate-on", data, "--out", "p")
    assert grid.code == 2
    assert "use dirichlet" in grid.err


def test_sentence_transformers_folders_keep_their_modules(
    cli: Cli, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    (pair[0] / "modules.json").write_text(
        json.dumps([{"idx": 0, "path": ""}, {"path": "1_Pooling"}])
    )
    (pair[0] / "1_Pooling").mkdir()
    (pair[0] / "1_Pooling" / "config.json").write_text("{}")
    assert cli("merge", *pair, "--out", "o").code == 0
    assert (tmp_path / "o" / "1_Pooling" / "config.json").exists()


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_weights_whose_merge_is_not_finite_are_the_last_choice(metric: str) -> None:
    judge = MergesJudge.__new__(MergesJudge)
    judge.metric = metric
    sound = {"accuracy": 0.1, "loss": 9.0}
    for metrics in (
        [dict.fromkeys(sound, math.nan), sound],
        [sound, dict.fromkeys(sound, math.nan)],
    ):
        assert min(metrics, key=judge.key) is sound


@pytest.mark.parametrize(("second", "told"), [(0, False), (1, True), (None, True)])
def test_weights_of_other_modules_that_differ_are_told_of(
    cli: Cli, pair: tuple[Path, Path], second: float | None, told: bool
) -> None:
    for folder, value in zip(pair, (0, second), strict=True):
        (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}]))
        (folder / "2_Dense").mkdir()
        if value is not None:
            dense = {"linear.weight": torch.full((4, 16), float(value))}
            save_file(dense, folder / "2_Dense" / "model.safetensors")
    result = cli("merge", *pair, "--out", "o", "--json")
    assert result.code == 0, result.err
    wanted = "2_Dense/model.safetensors is taken from a as it is, not merged; b has another or none"
    assert result.report["warnings"] == ([wanted] if told else [])


def test_a_seed_where_nothing_is_drawn_is_refused(cli: Cli, make_model: ModelMaker) -> None:
    pair = (make_model("a"), make_model("b"))
    result = cli("merge", *pair, "--seed", 4, "--out", "o", "--dry-run")
    told = "--seed: method linear draws nothing; leave it out"
    assert (result.code, told in result.err) == (2, True), result.err
    draws = ("--method", "dare-linear", "--base", pair[0], "--set", "density=0.5")
    assert cli("merge", *pair, "--seed", 4, *draws, "--out", "o", "--dry-run", "-q").code == 0
