"""What a merge's report predicts of every model's loss, and the weights of least predicted loss."""

import math
from pathlib import Path

import pytest
import torch
from conftest import Cli, ModelMaker
from safetensors.torch import load_file

Pair = tuple[Path, Path]


@pytest.fixture
def pair(make_model: ModelMaker) -> Pair:
    return make_model("a", seed=1), make_model("b", seed=2)


@pytest.fixture
def sidecars(cli: Cli, pair: Pair, data: Path) -> tuple[str, ...]:
    flags: tuple[str, ...] = ()
    for model in pair:
        kinds = ("--kind", "diagonal,kronecker")
        out = model.with_name(f"f{model.name}")
        assert cli("estimate-fisher", model, "--data", data, *kinds, "--out", out, "-q").code == 0
        flags += ("--fisher", str(out))
    return flags


def increases(merged: Path, pair: Pair) -> list[float]:
    """1/2 (theta - theta_t)^T F_t (theta - theta_t), a number at a time in float64."""
    found = load_file(merged / "model.safetensors")
    result = []
    for model in pair:
        own = load_file(model / "model.safetensors")
        fisher = load_file(model.with_name(f"f{model.name}") / "diagonal.safetensors")
        terms = [
            0.5 * f * (new - old) ** 2
            for name, values in fisher.items()
            for f, new, old in zip(
                values.double().flatten().tolist(),
                found[name].double().flatten().tolist(),
                own[name].double().flatten().tolist(),
                strict=True,
            )
        ]
        result.append(math.fsum(terms))
    return result


@pytest.mark.parametrize("method", ["linear", "fisher", "regmean", "kronecker"])
def test_the_report_predicts_each_models_loss(
    cli: Cli, pair: Pair, sidecars: tuple[str, ...], method: str, tmp_path: Path
) -> None:
    flags = ("--method", method, *sidecars, "--weights", "0.3,0.7", "--predict")
    result = cli("merge", *pair, *flags, "--out", "o", "--json")
    assert result.code == 0, result.err
    predicted = result.report["summary"]["predicted_loss"]
    assert predicted == pytest.approx(increases(tmp_path / "o", pair), rel=1e-6)
    rows = [row["predicted_loss"] for row in result.report["tensors"]]
    for task in range(2):
        assert math.fsum(row[task] for row in rows) == pytest.approx(predicted[task])


@pytest.mark.parametrize("base", [False, True])
def test_optimal_weights_are_those_of_the_least_predicted_loss(
    cli: Cli, pair: Pair, sidecars: tuple[str, ...], base: bool, tmp_path: Path
) -> None:
    report = cli("merge", *pair, *sidecars, "--weights", "optimal", "--out", "o", "--json").report
    best, weights = sum(report["summary"]["predicted_loss"]), report["summary"]["weights"]
    assert sum(weights) == pytest.approx(1) and min(weights) >= 0
    for step in (-0.02, 0.02):
        near = f"{weights[0] + step},{weights[1] - step}"
        other = cli("merge", *pair, *sidecars, "--weights", near, "--out", f"o{step}", "--json")
        assert sum(other.report["summary"]["predicted_loss"]) > best


def test_free_weights_predict_no_more_than_those_on_the_simplex(
    cli: Cli, make_model: ModelMaker, pair: Pair, sidecars: tuple[str, ...]
) -> None:
    flags = ("--method", "task-arithmetic", "--base", make_model("base", seed=3), *sidecars)
    found = {}
    for weights in ("optimal", "optimal-free"):
        result = cli("merge", *pair, *flags, "--weights", weights, "--out", weights, "--json")
        assert result.code == 0, result.err
        found[weights] = sum(result.report["summary"]["predicted_loss"])
    assert found["optimal-free"] < found["optimal"]


def test_a_search_says_how_well_the_prediction_orders_its_candidates(
    cli: Cli, pair: Pair, sidecars: tuple[str, ...], data: Path
) -> None:
    flags = ("--search-weights", "grid", "--search-points", 5, "--evaluate-on", data)
    result = cli("merge", *pair, *sidecars, *flags, "--out", "o", "--json")
    assert result.code == 0, result.err
    evaluation = result.report["evaluation"]
    rows = evaluation["candidates"]
    assert all(len(row["predicted_loss"]) == 2 for row in rows)
    assert rows[0]["predicted_loss"][0] == rows[-1]["predicted_loss"][1] == 0.0
    assert -1 <= evaluation["predicted_loss_spearman"] <= 1


def test_without_all_sidecars_nothing_is_predicted(cli: Cli, pair: Pair) -> None:
    report = cli("merge", *pair, "--out", "o", "--json").report
    assert report["summary"]["predicted_loss"] is None


TASK = ["--method", "task-arithmetic", "--base", "base", "--set"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--predict"], "--predict needs a --fisher"),
        (["--weights", "optimal"], "--weights optimal needs a --fisher"),
        (["--weights", "optimal", "SIDECARS", "--method", "fisher"], "linear or task-arithmetic"),
        (["--weights", "optimal-free", "SIDECARS"], "for method task-arithmetic, not linear"),
        (["--weights", "best"], "'best' is not a number"),
        (["--weights", "optimal", "SIDECARS", *TASK, "lambda=0.3"], "set neither otherwise"),
        (["--weights", "optimal-free", "SIDECARS", *TASK, "normalize=true"], "for lambda 1 and"),
    ],
)
def test_what_cannot_be_predicted_is_refused(
    cli: Cli,
    make_model: ModelMaker,
    pair: Pair,
    sidecars: tuple[str, ...],
    flags: list[str],
    told: str,
    tmp_path: Path,
) -> None:
    make_model("base", seed=3)
    given = [part for flag in flags for part in (sidecars if flag == "SIDECARS" else [flag])]
    result = cli("merge", *pair, *given, "--out", "o")
    assert result.code == 2 and told in result.err
    assert not (tmp_path / "o").exists()


def test_a_nan_in_a_fisher_stops_the_prediction(
    cli: Cli, pair: Pair, sidecars: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "fa" / "diagonal.safetensors"
    content = bytearray(path.read_bytes())
    content[-4:] = bytes(torch.tensor([float("nan")]).numpy().tobytes())
    path.write_bytes(content)
    result = cli("merge", *pair, *sidecars, "--out", "o")
    assert result.code == 3 and "a Fisher must be finite and not negative" in result.err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("method", ["regmean", "kronecker"])
def test_a_nan_in_a_second_moment_is_refused(
    cli: Cli, pair: Pair, sidecars: tuple[str, ...], method: str, tmp_path: Path
) -> None:
    path = tmp_path / "fa" / "kronecker.safetensors"
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little") + 8
    content[size:] = torch.full(((len(content) - size) // 4,), float("nan")).numpy().tobytes()
    path.write_bytes(content)
    result = cli("merge", *pair, "--method", method, *sidecars, "--out", "o")
    assert result.code == 3 and "second moments have NaN" in result.err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("method", ["regmean", "kronecker"])
def test_a_sidecar_that_tells_of_nothing_merged_is_refused(
    cli: Cli, pair: Pair, sidecars: tuple[str, ...], method: str, tmp_path: Path
) -> None:
    flags = ("--method", method, *sidecars, "--include", "*LayerNorm*")
    result = cli("merge", *pair, *flags, "--out", "o")
    assert result.code == 3
    assert f"{tmp_path / 'fa'}: tells of none of the tensors that are merged" in result.err


def test_second_moments_of_inputs_alone_are_enough_for_regmean(
    cli: Cli, pair: Pair, sidecars: tuple[str, ...], data: Path, tmp_path: Path
) -> None:
    merge = ("merge", *pair, "--method", "regmean", "-q")
    assert cli(*merge, *sidecars, "--out", "o").code == 0
    flags: tuple[str, ...] = ()
    for model in pair:
        out = f"activation-{model.name}"
        kinds = ("--kind", "activation", "--out", out, "-q")
        assert cli("estimate-fisher", model, "--data", data, *kinds).code == 0
        flags += ("--fisher", out)
    result = cli(*merge, *flags, "--out", "p")
    assert result.code == 0, result.err
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in "po")
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in theirs)
