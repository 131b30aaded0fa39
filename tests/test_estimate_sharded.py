"""Weights over processes (FSDP2) or devices: the sidecar of one process that has them all."""

import json
import re
from math import isclose
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Cli, ModelMaker, make_llama, make_text, write_rows
from test_estimate_workers import torchrun, weights_in
from test_fisher_diagonal import relative_error
from torch import Tensor

from fishertool.errors import InputError
from fishertool.fisher.header import FisherHeader
from fishertool.fisher.labels import SEED_STRIDE
from fishertool.fisher.signed import SIGNS
from fishertool.models.loading import LoadedModel
from fishertool.models.sharding import shard
from fishertool.sidecar import open_sidecar

KINDS = "diagonal,factored"
SIGNED = ("--estimator", "signed", "--threads", 1)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Of 27 texts, batches of 3 leave the second of two processes without one in the last step."""
    path = tmp_path / "texts.jsonl"
    write_rows(path, [{"text": make_text(n, 2 + n % 9), "label": n % 3} for n in range(27)])
    return path


def opened(folder: Path, kind: str) -> tuple[dict[str, Tensor], FisherHeader]:
    tensors, header = open_sidecar(folder, kind)
    with tensors:
        return {name: tensors[name].clone() for name in tensors}, header


def assert_same_estimate(one: Path, other: Path, kind: str) -> None:
    """But for rounding, which the order of sums decides."""
    (found, header), (expected, wanted) = opened(one, kind), opened(other, kind)
    assert list(found) == list(expected)
    largest = max(float(value.max()) for value in expected.values())
    for name, value in expected.items():
        assert found[name].shape == value.shape
        if float(value.max()) > 1e-12 * largest:
            assert relative_error(found[name], value) < 1e-5, name
    largest = max(statistic.total for statistic in wanted.statistics.values())
    for name, statistic in wanted.statistics.items():
        if statistic.total > 1e-12 * largest:
            mine = header.statistics[name]
            assert mine.standard_error is not None and statistic.standard_error is not None
            assert isclose(mine.total, statistic.total, rel_tol=1e-5)
            assert isclose(mine.standard_error, statistic.standard_error, rel_tol=1e-4), name


@pytest.mark.parametrize(
    ("kind", "flags", "more"),
    [
        ("llama", ("--kind", "factored", "--until-relative-error", 0.0), {"tied": True}),
        ("bert", ("--kind", KINDS, "--labels", "expected", "--exclude", "*embed*"), {}),
        ("t5", ("--kind", "factored", "--target-column", "text", "--skip-nonfinite"), {}),
    ],
)
def test_sharded_is_one_process_with_the_batches_of_all(
    cli: Cli,
    make_model: ModelMaker,
    texts: Path,
    tmp_path: Path,
    kind: str,
    flags: tuple[Any, ...],
    more: dict[str, Any],
) -> None:
    """A step of two processes with batches of 3 is one with a batch of 6, as lengths sort them."""
    model = make_model("m", kind, spread=0.1, **more)
    run = ("estimate-fisher", model, "--data", texts, *flags, *SIGNED)
    assert cli(*run, "--batch-size", 6, "--out", "one").code == 0
    many = ("--batch-size", 3, "--fsdp", "--accumulate-on", "cpu", "--json")
    done = torchrun(2, *run, *many, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    whole = json.loads((tmp_path / "one" / "fishertool_report.json").read_text())
    assert report["environment"]["world_size"] == 2 and report["options"]["fsdp"] is True
    assert report["calibration"] == whole["calibration"]
    for key in ("examples", "tokens", "parameters", "skipped"):
        assert report["summary"][key] == whole["summary"][key]
    assert isclose(report["summary"]["loss"], whole["summary"]["loss"], rel_tol=1e-6)
    for one in flags[1].split(","):
        assert_same_estimate(tmp_path / "two", tmp_path / "one", one)


def test_sharded_by_the_definition(
    cli: Cli, make_model: ModelMaker, texts: Path, tmp_path: Path
) -> None:
    """1/N sum over steps of (sum over examples of both processes' batches of sign * gradient)^2."""
    folder = make_model("g", "gpt2", spread=0.1)
    run = ("estimate-fisher", folder, "--data", texts, "--batch-size", 3, *SIGNED, "--seed", 5)
    done = torchrun(2, *run, "--fsdp", "--quiet", "--out", tmp_path / "f")
    assert done.returncode == 0, done.stderr[-2000:]
    found, header = opened(tmp_path / "f", "diagonal")

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    ids = [tokenizer(row, return_tensors="pt").input_ids for row in rows]
    order = sorted(range(len(ids)), key=lambda n: -ids[n].shape[1])
    parameters = dict(model.named_parameters())
    sums = {name: torch.zeros_like(value) for name, value in parameters.items()}
    traces = []
    for start in range(0, len(order), 6):
        score = torch.zeros(())
        for n in order[start : start + 6]:
            generator = torch.Generator().manual_seed(5 * SEED_STRIDE + n ^ SIGNS)
            sign = int(torch.randint(0, 2, (1,), generator=generator, dtype=torch.int8)) * 2 - 1
            log_p = torch.log_softmax(model(ids[n]).logits[0, :-1], -1)
            score = score + sign * log_p.gather(1, ids[n][0, 1:, None]).sum()
        gradients = torch.autograd.grad(score, list(parameters.values()))
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total += gradient**2 / len(order)
        norms = [float(gradient.square().sum()) for gradient in gradients]
        traces.append(dict(zip(parameters, norms, strict=True)))
    assert found.keys() == sums.keys()
    for name, value in sums.items():
        assert relative_error(found[name], value) < 1e-4, name
        spread = torch.tensor([step[name] for step in traces]).std() * len(traces) ** 0.5
        error = header.statistics[name].standard_error
        assert error == pytest.approx(float(spread) / len(order), rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--fsdp",), "--fsdp needs --estimator signed"),
        (("--fsdp", *SIGNED), "--fsdp shards the weights over several processes"),
        (("--fsdp", *SIGNED, "--kind", "kronecker"), "diagonal or factored Fisher, not kron"),
        (("--fsdp", *SIGNED, "--resume"), "--checkpoint-every and --resume: processes that share"),
        (("--device-map", "auto", "--device", "cpu"), "--device and --device-map: give one"),
        (("--device-map", "atuo"), "--device-map 'atuo'"),
        (("--accumulate-on", "disk"), "--accumulate-on 'disk'"),
    ],
)
def test_what_does_not_go_together_is_refused(
    cli: Cli, make_model: ModelMaker, texts: Path, flags: tuple[str, ...], told: str
) -> None:
    result = cli("estimate-fisher", make_model("g"), "--data", texts, *flags, "--out", "f")
    assert (result.code, told in result.err) == (2, True), result.err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("tie", "cannot shard model.layers.0.mlp.up_proj.weight, which several blocks share"),
        ("dtype", "one dtype, this model has bfloat16, float32"),
        ("view", "cannot serve weights that are fused on load: half"),
        ("scalar", "cannot shard weights of no dimension: model.temperature"),
    ],
)
def test_what_cannot_be_sharded_is_refused_by_name(change: str, told: str) -> None:
    model = make_llama()
    first, last = (layer.mlp.up_proj for layer in model.model.layers)
    if change == "tie":
        last.weight = first.weight
    elif change == "dtype":
        last.to(torch.bfloat16)
    elif change == "scalar":
        model.model.temperature = torch.nn.Parameter(torch.ones(()))
    parameters = {"half": first.weight[:2]} if change == "view" else {}
    with pytest.raises(InputError, match=re.escape(told)):
        shard(LoadedModel(model, None, 0, None, None), parameters, torch.device("cpu"), 2)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_a_device_map_changes_nothing(
    cli: Cli, make_model: ModelMaker, texts: Path, tmp_path: Path, kind: str
) -> None:
    kinds = "diagonal,factored,kronecker,rank-one"
    target = ("--target-column", "text") if kind == "t5" else ()
    labels = ("--labels", "empirical")
    run = ("estimate-fisher", make_model("m", kind), "--data", texts, "--kind", kinds, *labels)
    assert cli(*run, *target, "--out", "plain").code == 0
    places = ("--device-map", "auto", "--accumulate-on", "cpu", "--json")
    result = cli(*run, *target, *places, "--out", "mapped")
    assert result.code == 0, result.err
    assert result.report["environment"]["device"] == "cpu"
    assert weights_in(tmp_path / "mapped") == weights_in(tmp_path / "plain")


def test_a_device_map_of_an_embedding_model(
    cli: Cli, make_model: ModelMaker, tmp_path: Path
) -> None:
    write_rows(
        tmp_path / "pairs.jsonl",
        [{"query": make_text(n, 4), "positive": make_text(n + 50, 5)} for n in range(6)],
    )
    model = make_model("e", "bert", head="Model", add_pooling_layer=False)
    run = ("estimate-fisher", model, "--data", "pairs.jsonl", "--in-batch-negatives", 3)
    assert cli(*run, "--out", "plain").code == 0
    result = cli(*run, "--device-map", "auto", "--out", "mapped")
    assert result.code == 0, result.err
    assert weights_in(tmp_path / "mapped") == weights_in(tmp_path / "plain")


def test_a_device_map_needs_accelerate(
    cli: Cli, make_model: ModelMaker, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run = ("estimate-fisher", make_model("g"), "--data", texts, "--out", "f")
    result = cli(*run, "--device-map", "auto")
    assert (result.code, "needs the package accelerate" in result.err) == (2, True)


def test_offloaded_weights_are_refused_by_name(
    cli: Cli, make_model: ModelMaker, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = transformers.AutoModelForCausalLM
    real = auto.from_pretrained

    def offloading(*arguments: Any, **options: Any) -> Any:
        model, found = real(*arguments, **options)
        model.transformer.h[1].mlp.to("meta")
        return model, found

    monkeypatch.setattr(auto, "from_pretrained", offloading)
    run = ("estimate-fisher", make_model("g", "gpt2"), "--data", texts, "--out", "f")
    result = cli(*run, "--device-map", "auto")
    assert result.code == 3
    assert "have no room for transformer.h.1.mlp.c_fc.weight" in result.err
