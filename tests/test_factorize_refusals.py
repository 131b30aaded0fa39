"""What `fishertool factorize` refuses: one line, the right exit code, and nothing written."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import Cli, Estimate, ModelMaker, weights_of
from safetensors.torch import load_file, save_file
from test_factorize_command import QUERY

from fishertool.checkpoint.reader import open_checkpoint


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
        (("--rank", "40", "--rank-multiple", "40"), 2, "than the matrix; lower --rank-multiple"),
        (("--rank", "3", "--rank-multiple", "4"), 2, "--rank 3: is no multiple of --rank-multiple 4"),
        (("--rank", "6", "--rank-multiple", "4"), 2, "--rank 6: is no multiple of --rank-multiple 4"),
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
        (("--keep", "0.5", "--finetune-steps", "3"), 2, "--finetune-steps and --data"),
        (("--keep", "0.5", "--finetune-steps", "0", "--data", "d"), 2, "0 is not at least 1"),
        (
            ("--keep", "0.5", "--finetune-steps", "3", "--data", "d", "--learning-rate", "0"),
            2,
            "--learning-rate 0 is not above 0",
        ),
        (
            ("--keep", "0.5", "--finetune-steps", "3", "--data", "d", "--format", "dense"),
            2,
            "--finetune-steps trains factors",
        ),
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


@pytest.mark.parametrize(
    "budget", [("--keep", 1), ("--energy", 0.5), ("--keep", 1, "--allocate", "global")]
)
def test_vectors_are_not_factorized(
    cli: Cli, make_model: ModelMaker, tmp_path: Path, budget: tuple[str, ...]
) -> None:
    model = make_model("m", labels=1)
    flags = ("--method", "svd", "--include", "classifier.weight", *budget, "--out", "o")
    result = cli("factorize", model, *flags)
    assert result.code == 2
    assert "of none of 1 selected matrices have factors of rank 1 fewer" in result.err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("kind", "dtype", "rate", "told"),
    [
        ("llama", torch.float16, "1e6", "is not finite as float16 after training; lower the learn"),
        ("bert", torch.float32, "1e37", "recovery: the loss is not finite after step 1; lower"),
    ],
)
def test_factors_that_training_has_spoilt_are_not_written(
    cli: Cli, make_model: ModelMaker, data: Path, tmp_path: Path,
    kind: str, dtype: torch.dtype, rate: str, told: str,
) -> None:  # fmt: skip
    model = make_model("m", kind, dtype=dtype)
    flags = ("--finetune-steps", 1, "--learning-rate", rate, "--data", data, "--out", "o", "-q")
    result = cli("factorize", model, "--method", "svd", "--keep", "0.5", *flags)
    assert result.code == 3
    assert told in result.err
    assert len(result.err.splitlines()) == 1
    if dtype == torch.float16:
        assert ".down.weight" in result.err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("flags", [("--evaluate-on",), ("--finetune-steps", 1, "--data")])
@pytest.mark.parametrize("more", [(), ("--dry-run",), ("--keep", "1")])
def test_data_are_looked_for_before_any_work(
    cli: Cli, tmp_path: Path, flags: tuple[str, ...], more: tuple[str, ...]
) -> None:
    keep = () if "--keep" in more else ("--keep", "0.5")
    result = cli("factorize", "no model", "--method", "svd", *keep, *more, "--out", "o",
                 *flags, "typo.jsonl")  # fmt: skip
    assert result.code == 3
    assert result.err == "fishertool: typo.jsonl: no such file\n"


def test_data_to_train_on_are_read_before_any_work(
    cli: Cli, make_model: ModelMaker, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("m")
    flags = ("factorize", model, "--method", "svd", "--out", "o", "--finetune-steps", 1)
    result = cli(*flags, "--keep", "1", "--data", data)
    assert result.code == 0, result.err
    assert "nothing was trained: no matrix has factors" in result.err
    monkeypatch.setattr("fishertool.commands.factorize.staged", None)
    (tmp_path / "others.jsonl").write_text('{"words": "the cat"}\n')
    result = cli(*flags, "--keep", "0.5", "--overwrite", "--data", "others.jsonl")
    assert result.code == 3, result.err
    assert "others.jsonl" in result.err and "'text'" in result.err


def test_a_sidecar_that_does_not_serve_is_refused(
    cli: Cli, make_model: ModelMaker, estimated: Estimate, tmp_path: Path
) -> None:
    model, other = make_model("m"), make_model("other", seed=1)
    sidecar = estimated(model, "diagonal")
    base = ("--keep", "0.5", "--out", "o", "--fisher")
    for target, method, told in (
        (other, "fwsvd", "was estimated on other weights"),
        (
            model,
            "kronecker",
            "method kronecker needs a Fisher of kind kronecker, which this has not",
        ),
        (model, "asvd", "of kind activation or kronecker, which this has not"),
    ):
        result = cli("factorize", target, "--method", method, *base, sidecar)
        assert result.code == 3
        assert told in result.err
    (tmp_path / "empty").mkdir()
    result = cli("factorize", model, "--method", "svd", *base, tmp_path / "empty")
    assert result.code == 3
    assert "method svd reads none; leave --fisher out" in result.err
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
    cli: Cli, make_model: ModelMaker, estimated: Estimate, tmp_path: Path
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


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (math.nan, "self.query.weight#output: has NaN or Inf"),
        (-9.0, "is zero everywhere, or"),
    ],
)
def test_second_moments_that_are_none_are_refused(
    cli: Cli, make_model: ModelMaker, estimated: Estimate, value: float, told: str
) -> None:
    model = make_model("m")
    path = estimated(model, "kronecker") / "kronecker.safetensors"
    moments = load_file(path)
    with open_checkpoint(path.parent, stem="kronecker") as stored:
        metadata = dict(stored.metadata)
    moments[f"{QUERY}.weight#output"].fill_diagonal_(value)
    save_file(moments, path, metadata)
    result = cli("factorize", model, "--fisher", path.parent, "--keep", "0.5", "--out", "o")
    assert result.code == 3
    assert told in result.err
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize("method", ["kronecker", "whitened"])
@pytest.mark.parametrize("more", [(), ("--allocate", "global")])
def test_moments_that_are_not_positive_are_counted(
    cli: Cli, make_model: ModelMaker, estimated: Estimate, method: str, more: tuple[str, ...]
) -> None:
    model = make_model("m")
    path = estimated(model, "kronecker") / "kronecker.safetensors"
    flags = ("--method", method, "--fisher", path.parent, "--keep", "0.5", "--json", *more)
    result = cli("factorize", model, *flags, "--out", "sound")
    assert result.code == 0 and "positive" not in result.err
    moments = load_file(path)
    with open_checkpoint(path.parent, stem="kronecker") as stored:
        metadata = dict(stored.metadata)
    for name in (f"{QUERY}.weight#input", f"{QUERY}.weight#output"):
        moments[name][0, 1] = moments[name][1, 0] = 9 * moments[name].diagonal().max()
    save_file(moments, path, metadata)
    result = cli("factorize", model, *flags, "--out", "o")
    assert result.code == 0, result.err
    names = [f"{QUERY}.weight#input", f"{QUERY}.weight#output"][: 2 if method == "kronecker" else 1]
    told = f"{len(names)} moments are not positive semi-definite: {', '.join(names)}; "
    assert any(one.startswith(told) for one in result.report["warnings"])


def test_a_statistic_that_settings_swamp_is_refused(
    cli: Cli, make_model: ModelMaker, estimated: Estimate, tmp_path: Path
) -> None:
    model = make_model("m")
    flags = ("--fisher", estimated(model, "kronecker"), "--keep", "0.5", "--out", "o")
    result = cli("factorize", model, *flags, "--method", "kronecker", "--set", "damping=1e300")
    assert result.code == 3
    assert "the eigenvalues of method kronecker do not converge" in result.err
    assert not (tmp_path / "o").exists()


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


def test_data_that_is_not_utf_8_is_refused(cli: Cli, make_model: ModelMaker) -> None:
    Path("latin.jsonl").write_bytes(b'{"text": "caf\xe9", "label": 0}\n')
    result = cli("evaluate", make_model("m"), "--data", "latin.jsonl")
    assert result.code == 3
    assert "latin.jsonl: has text that is not UTF-8" in result.err


@pytest.mark.parametrize(("key", "value"), [("hidden_size", 32), ("intermediate_size", 64)])
def test_a_config_of_other_shapes_is_refused_by_name(
    cli: Cli, make_model: ModelMaker, key: str, value: int
) -> None:
    """Else the tensors it is wrong about would stay as they are, and nobody would be told."""
    model = make_model("m")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {key: value}))
    for verb in (("factorize", "--method", "svd", "--keep", 0.5), ("prune", "--sparsity", 0.5)):
        result = cli(*verb, model, "--out", "o")
        assert (result.code, Path("o").exists()) == (3, False)
        assert "m: has tensors of another shape than config.json gives them: bert.e" in result.err
        assert "on disk" in result.err and result.err.count("\n") == 1
