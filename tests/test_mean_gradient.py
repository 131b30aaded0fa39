"""`estimate-fisher --with-mean-gradient`: against autograd, and through the command line.

That it is exact on every architecture, test_fisher_architectures sees to; that parts, processes and
resumed runs write the same bytes, test_estimate_workers.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import Cli, ModelMaker, make_text, write_rows
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from fishertool.checkpoint.reader import open_checkpoint
from fishertool.fisher.gradients import Gradient, OuterProducts, Placed, ScatteredRows, Whole
from fishertool.fisher.mean_gradient import MeanGradient, add_sum
from fishertool.sidecar import check_fits, open_sidecar


def reference(folder: Path, data: Path) -> dict[str, Tensor]:
    """The gradient of the mean log p of the labels: one backward pass an example, in float64."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).double().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows:
        logits = model(**tokenizer(row["text"], return_tensors="pt")).logits
        loss = functional.cross_entropy(logits, torch.tensor([row["label"]]))
        (-loss / len(rows)).backward()  # type: ignore[no-untyped-call]
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("batch", [1, 5, "auto"])
def test_is_the_mean_of_the_gradients_of_the_datas_labels(
    cli: Cli, make_model: ModelMaker, data: Path, tmp_path: Path, batch: int | str
) -> None:
    model = make_model("a", spread=0.15)
    flags = ("--data", data, "--with-mean-gradient", "--batch-size", batch, "--json")
    result = cli("estimate-fisher", model, *flags, "--out", "f")
    assert result.code == 0, result.err
    summary = result.report["summary"]
    assert (summary["kind"], summary["labels"]) == ("diagonal,mean-gradient", "empirical")
    tensors, header = open_sidecar(tmp_path / "f", "mean-gradient")
    with tensors, open_checkpoint(model) as checkpoint:
        check_fits(tensors, header, checkpoint)
        found = {name: tensors[name] for name in tensors}
    exact = reference(model, data)
    assert found.keys() == exact.keys()
    rows = {row["name"]: row for row in result.report["tensors"] if row["kind"] == "mean-gradient"}
    for name, value in exact.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=2e-7)
        squares = float(found[name].double().square().sum())
        assert header.statistics[name].squares == pytest.approx(squares)
        assert header.statistics[name].total == 0
        assert rows[name]["norm"] == pytest.approx(squares**0.5)
        assert "mean" not in rows[name]


def test_is_the_mean_of_the_bank_of_an_embedding_model(
    cli: Cli, make_model: ModelMaker, tmp_path: Path
) -> None:
    folder = make_model("e", head="Model", spread=0.15)
    write_rows(
        "d.jsonl", [{"query": make_text(n, 2), "positive": make_text(9 + n, 3)} for n in range(5)]
    )
    flags = ("--kind", "rank-one", "--with-mean-gradient", "--bank-dtype", "float32", "--out", "f")
    result = cli("estimate-fisher", folder, "--data", "d.jsonl", *flags)
    assert result.code == 0, result.err
    bank = load_file(tmp_path / "f" / "rank-one.safetensors")
    found = load_file(tmp_path / "f" / "mean-gradient.safetensors")
    assert found.keys() == bank.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, bank[name].mean(0), rtol=1e-4, atol=1e-7)


def test_alone_and_in_a_forecast(
    cli: Cli, make_model: ModelMaker, data: Path, tmp_path: Path
) -> None:
    flags = (make_model("a"), "--data", data, "--kind", "mean-gradient", "--out", "f", "--json")
    planned = cli("estimate-fisher", *flags, "--dry-run").report["summary"]
    result = cli("estimate-fisher", *flags)
    assert result.code == 0, result.err
    assert [path.name for path in (tmp_path / "f").glob("*.safetensors")] == [
        "mean-gradient.safetensors"
    ]
    parameters = result.report["summary"]["parameters"]
    assert planned["bytes_by_kind"] == {"mean-gradient": 4 * parameters}
    assert result.report["summary"]["trace"] is None


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--labels", "sampled"), "--labels sampled: a mean gradient is of the data's labels"),
        (("--labels", "expected"), "--labels expected: a mean gradient is of the data's labels"),
        (("--estimator", "signed"), "diagonal or factored Fisher, not mean-gradient"),
    ],
)
def test_what_has_no_mean_gradient_is_refused(
    cli: Cli, make_model: ModelMaker, data: Path, flags: tuple[str, ...], told: str
) -> None:
    result = cli(
        "estimate-fisher", make_model("a"), "--data", data, "--with-mean-gradient", *flags,
        "--out", "f",
    )  # fmt: skip
    assert (result.code, told in result.err) == (2, True), result.err


def test_every_form_of_a_gradient_is_summed_over_examples() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(3, 4, n, generator=generator) for n in (5, 2))
    ids = torch.tensor([[0, 3, 3, 1], [2, 2, 2, 2], [4, 0, 4, 0]])
    values = torch.randn(3, 4, 2, generator=generator)
    whole = torch.randn(3, 5, 2, generator=generator)
    parts: list[Gradient] = [OuterProducts(left, right), ScatteredRows(ids, values), Whole(whole)]
    for part in (*parts, Placed(Whole(whole[:, :3]), 1, 3)):
        expected = torch.zeros(5, 2, dtype=torch.float64)
        for n in range(3):
            part.add_rows(expected_of := torch.zeros(5, 2), n, 0)
            expected += expected_of
        total = torch.ones(5, 2, dtype=torch.float64)
        add_sum(total, part)
        torch.testing.assert_close(total - 1, expected, rtol=1e-5, atol=1e-6)


def test_half_precision_is_summed_in_float32() -> None:
    """256 + 1 is 256 in bfloat16."""
    gradient = MeanGradient({"w": torch.zeros(1, 1)})
    left = torch.tensor([[[256.0]], [[1.0]]], dtype=torch.bfloat16)
    gradient.add("w", [OuterProducts(left, torch.ones_like(left))])
    assert gradient.mean(2)["w"].item() == 128.5
