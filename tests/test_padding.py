"""Models whose outputs padding changes are measured one example at a time."""

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import VOCABULARY, Cli, ModelMaker, make_text, make_tokenizer, write_rows
from test_estimate_command import SMALL
from test_fisher_diagonal import randomize
from test_structured import loaded_from

from fishertool.checkpoint.reader import open_checkpoint
from fishertool.estimation.measuring import loss_of
from fishertool.models.loading import load_model
from fishertool.models.padding import ALONE
from fishertool.models.tasks import TASKS
from fishertool.models.vectors import vectors_of

XLNET = {"vocab_size": len(VOCABULARY), "d_model": 16, "d_inner": 32, "n_layer": 2, "n_head": 2}
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "FNet": (SMALL, True),  # Fourier transforms over all columns; it has no attention mask
    "XLNet": (XLNET, True),  # its classifier reads the last column
    "Bert": (SMALL | {"num_attention_heads": 2}, False),
}


def make(folder: Path, kind: str, head: str = "ForSequenceClassification") -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**KINDS[kind][0], num_labels=3)
    randomize(model := getattr(transformers, kind + head)(config))
    model.save_pretrained(folder)
    make_tokenizer(template=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_is_measured_as_without_padding(
    cli: Cli, data: Path, tmp_path: Path, kind: str
) -> None:
    make(tmp_path / "m", kind)
    one, many = (
        cli("evaluate", "m", "--data", data, "--batch-size", size, "--json") for size in (1, 8)
    )
    assert many.report["summary"] == pytest.approx(one.report["summary"], rel=1e-5), many.err
    assert not any("padding" in told for told in one.report["warnings"])
    assert many.report["warnings"].count(ALONE) == KINDS[kind][1]


def test_against_a_model_that_padding_matters_to(cli: Cli, data: Path, tmp_path: Path) -> None:
    make(tmp_path / "bert", "Bert")
    make(tmp_path / "fnet", "FNet")
    one, many = (
        cli("evaluate", "bert", "--against", "fnet", "--data", data, "--batch-size", n, "--json")
        for n in (1, 8)
    )
    assert many.report["summary"] == pytest.approx(one.report["summary"], rel=1e-5), many.err
    theirs = [found.report["evaluation"]["against"] for found in (one, many)]
    assert theirs[1] == pytest.approx(theirs[0], rel=1e-5)
    assert many.report["warnings"].count(ALONE) == 1


@pytest.mark.parametrize(("kind", "alone"), [("FNet", True), ("XLNet", False), ("Bert", False)])
def test_an_embedder_is_measured_as_without_padding(
    cli: Cli, tmp_path: Path, kind: str, alone: bool
) -> None:
    make(tmp_path / "m", kind, "Model")
    write_rows(
        "d.jsonl",
        [{"query": make_text(n, 2 + n), "positive": make_text(20 + n, 14 - n)} for n in range(12)],
    )
    one, many = (
        cli("evaluate", "m", "--data", "d.jsonl", "--batch-size", n, "--json") for n in (1, 8)
    )
    assert many.report["summary"] == pytest.approx(one.report["summary"], rel=1e-5), many.err
    assert many.report["warnings"].count(ALONE) == alone


def test_vectors_to_choose_by_are_those_without_padding(tmp_path: Path) -> None:
    make(tmp_path / "m", "FNet")
    with open_checkpoint(tmp_path / "m") as checkpoint:
        loaded = load_model(checkpoint, TASKS["sequence-classification"])
    texts = [{"input_ids": [4 + n] * (2 + n)} for n in range(5)]
    torch.testing.assert_close(vectors_of(loaded, texts), vectors_of(loaded, texts, 1))


@pytest.mark.parametrize(
    "verb",
    [
        ("merge", "a", "b", "--method", "linear", "--search-weights", "grid"),
        ("factorize", "a", "--method", "svd", "--keep", "0.5"),
    ],
)
def test_the_other_verbs_measure_so_too(
    cli: Cli, data: Path, tmp_path: Path, verb: tuple[str, ...]
) -> None:
    make(tmp_path / "a", "FNet")
    make(tmp_path / "b", "FNet")
    losses = []
    for size in (1, 8):
        flags = ("--evaluate-on", data, "--batch-size", size, "--out", f"o{size}", "--json")
        found = cli(*verb, *flags)
        assert found.code == 0, found.err
        losses.append(found.report["evaluation"]["metrics"]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and math.isfinite(losses[0])
    assert found.report["warnings"].count(ALONE) == 1


def test_a_language_model_takes_its_batches(cli: Cli, make_model: ModelMaker) -> None:
    """A causal one never sees what is behind a token."""
    Path("text.txt").write_text(make_text(1, 70) + "\n" + make_text(2, 5) + "\n")
    result = cli("evaluate", make_model("g", "gpt2"), "--data", "text.txt", "--json")
    assert ALONE not in result.report["warnings"], result.err


def test_what_prune_measures_is_without_padding(cli: Cli, data: Path, tmp_path: Path) -> None:
    make(tmp_path / "m", "FNet")
    with ExitStack() as opened:
        loaded = loaded_from(opened, tmp_path / "m", data, "empirical")
    alone = cli("evaluate", "m", "--data", data, "--batch-size", 1, "--json")
    assert loss_of(loaded) == pytest.approx(alone.report["summary"]["loss"], rel=1e-6)
