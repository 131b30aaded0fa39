"""`fishertool estimate-fisher`, through the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import VOCABULARY, Cli, ModelMaker, make_text, make_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_fisher_diagonal import assert_same, randomize

from fishertool.checkpoint.reader import open_checkpoint
from fishertool.errors import InputError
from fishertool.sidecar import check_fits, open_sidecar


def reference(folder: Path, rows: list[dict[str, object]], labels: str) -> dict[str, torch.Tensor]:
    """Mean over examples of squared gradients, one example and one label at a time, in float64."""
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(folder).double().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for row in rows:
        logits = model(**tokenizer(row["text"], return_tensors="pt")).logits[0]
        log_p = torch.log_softmax(logits, -1)
        for label in range(len(log_p)):
            share = (
                float(log_p[label].detach().exp())
                if labels == "expected"
                else label == row["label"]
            )
            found = torch.autograd.grad(log_p[label], list(parameters.values()), retain_graph=True)
            for name, gradient in zip(parameters, found, strict=True):
                total[name] += share * gradient**2
    return {name: value / len(rows) for name, value in total.items()}


def read_rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("labels", ["empirical", "expected", "auto"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_sidecar_is_the_definition(
    cli: Cli, make_model: ModelMaker, data: Path, labels: str, batch_size: int, tmp_path: Path
) -> None:
    model = make_model("a")
    flags = ("--labels", labels, "--batch-size", batch_size, "--out", "f", "--json")
    result = cli("estimate-fisher", model, "--data", data, *flags)
    assert result.code == 0, result.err
    resolved = "expected" if labels == "auto" else labels
    assert result.report["summary"]["labels"] == resolved
    expected = reference(model, read_rows(data), resolved)
    found = load_file(tmp_path / "f" / "diagonal.safetensors")
    assert set(found) == set(load_file(model / "model.safetensors"))
    scale = max(float(value.norm()) for value in expected.values())
    for name, value in found.items():
        error = (value.double() - expected[name]).norm()
        noise = 1e-12 * scale  # a key's bias has no gradient at all but rounding
        assert error <= 1e-5 * expected[name].norm() + noise, name


def test_the_header_says_what_was_done(
    cli: Cli, make_model: ModelMaker, data: Path, tmp_path: Path
) -> None:
    model = make_model("g", "gpt2")
    flags = ("--seed", 5, "--labels", "sampled", "--draws", 2, "--out", "f", "--json")
    report = cli("estimate-fisher", model, "--data", data, *flags).report
    tensors, header = open_sidecar(tmp_path / "f")
    with tensors, open_checkpoint(model) as checkpoint:
        check_fits(tensors, header, checkpoint)
        assert header.fingerprint == checkpoint.fingerprint()
        value = tensors["transformer.wte.weight"].double()
    statistic = header.statistics["transformer.wte.weight"]
    assert statistic.total == pytest.approx(float(value.sum()), rel=1e-9)
    assert statistic.squares == pytest.approx(float(value.square().sum()), rel=1e-9)
    assert (header.kind, header.labels, header.draws, header.seed) == ("diagonal", "sampled", 2, 5)
    assert (header.task, header.examples, header.unit) == ("causal-lm", 12, "example")
    assert header.tokens == report["calibration"]["tokens"]
    assert header.token_ids_sha256 == report["calibration"]["token_ids_sha256"]


def test_tied_names_follow_the_disk(
    cli: Cli, make_model: ModelMaker, data: Path, tmp_path: Path
) -> None:
    model = make_model("t", "llama", tied=True)
    assert cli("estimate-fisher", model, "--data", data, "--out", "f").code == 0
    assert set(load_file(tmp_path / "f" / "diagonal.safetensors")) == set(
        load_file(model / "model.safetensors")
    )


SMALL: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "max_position_embeddings": 32,
}
JET = {
    "num_key_value_heads": 2,
    "kv_channels": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
LANDMARKS = {"num_landmarks": 4, "segment_means_seq_len": 4, "conv_kernel_size": 3}


@pytest.mark.parametrize("statistic", ["diagonal", "activation"])
@pytest.mark.parametrize(
    ("kind", "more", "alone"),
    [
        ("FNet", {}, True),  # Fourier transforms over all columns; it has no attention mask
        ("Nystromformer", {"num_attention_heads": 2, **LANDMARKS}, True),  # so has its convolution
        ("JetMoe", JET, True),  # its experts are given tokens that the router sorted
        ("Bert", {"num_attention_heads": 2}, False),
    ],
)
def test_padding_that_the_model_lets_through_is_left_out(
    cli: Cli,
    data: Path,
    tmp_path: Path,
    kind: str,
    more: dict[str, Any],
    alone: bool,
    statistic: str,
) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL, **more, num_labels=3)
    model: Any = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    randomize(model)
    model.save_pretrained(tmp_path / "m")
    make_tokenizer(template=True).save_pretrained(tmp_path / "m")
    found = []
    for size in (1, "auto"):
        flags = ("--kind", statistic, "--batch-size", size, "--out", f"f{size}", "--json")
        result = cli("estimate-fisher", "m", "--data", data, *flags)
        assert result.report["summary"]["one_example_at_a_time"] == alone, result.err
        found.append(load_file(tmp_path / f"f{size}" / f"{statistic}.safetensors"))
    assert_same(found[1], found[0])


def test_a_model_whose_own_code_fails_is_told_in_one_line(cli: Cli) -> None:
    """Funnel halves its sequence twice, and then has too few positions left of four tokens."""
    config = transformers.FunnelConfig(
        vocab_size=len(VOCABULARY),
        d_model=16,
        n_head=2,
        d_head=8,
        d_inner=24,
        block_sizes=[1, 1, 1],
    )
    transformers.FunnelForSequenceClassification(config).save_pretrained("m")
    make_tokenizer(template=False).save_pretrained("m")
    rows = [{"text": make_text(n, n + 2), "label": n % 2} for n in range(3)]
    Path("d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for verb in (("estimate-fisher", "--out", "f"), ("evaluate",)):
        result = cli(verb[0], "m", "--data", "d.jsonl", *verb[1:])
        assert result.code == 3
        assert "FunnelForSequenceClassification fails on input_ids [1, 2]" in result.err


def test_same_seed_same_bytes_and_another_seed_others(
    cli: Cli, make_model: ModelMaker, data: Path, tmp_path: Path
) -> None:
    model = make_model("a")
    flags = ("--data", data, "--labels", "sampled", "-q")
    for out, seed in (("x", 0), ("y", 0), ("z", 1)):
        assert cli("estimate-fisher", model, *flags, "--seed", seed, "--out", out).code == 0
    x, y, z = ((tmp_path / out / "diagonal.safetensors").read_bytes() for out in "xyz")
    assert x == y != z


def test_globs_select_and_shards_are_cut(
    cli: Cli, make_model: ModelMaker, data: Path, tmp_path: Path
) -> None:
    flags = ("--include", "bert.encoder.*", "--exclude", "*.bias", "--max-shard-size", "9KB")
    result = cli("estimate-fisher", make_model("a"), "--data", data, *flags, "--out", "f")
    assert result.code == 0, result.err
    assert (tmp_path / "f" / "diagonal.safetensors.index.json").exists()
    tensors, _ = open_sidecar(tmp_path / "f")
    with tensors:
        assert all(n.startswith("bert.encoder") and not n.endswith("bias") for n in tensors)


def test_labels_are_not_needed_where_the_model_gives_them(cli: Cli, make_model: ModelMaker) -> None:
    Path("plain.txt").write_text("\n".join(make_text(n, 5) for n in range(4)))
    flags = ("estimate-fisher", make_model("a"), "--data", "plain.txt", "--out", "f")
    report = cli(*flags, "--json").report
    assert report["summary"]["labels"] == "expected"
    assert "no column 'label'" in cli(*flags, "--overwrite", "--labels", "empirical").err
    result = cli(*flags, "--overwrite", "--label-column", "nope")  # asked for, and not there
    assert (result.code, "no column 'nope'; it has 'text'" in result.err) == (3, True)


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (["--kind", "diagnal"], 2, "did you mean 'diagonal'?"),
        (["--labels", "gold"], 2, "known: auto, empirical"),
        (["--include", "nothing"], 2, "matches none"),
        (["--max-shard-size", "big"], 2, "5GB, 500MB"),
        (["--task", "causal-lm"], 3, "lacks tensors the model needs"),
        (["--device", "abacus"], 2, "--device abacus"),
    ],
)
def test_refusals(
    cli: Cli,
    make_model: ModelMaker,
    data: Path,
    flags: list[str],
    code: int,
    told: str,
    tmp_path: Path,
) -> None:
    result = cli("estimate-fisher", make_model("a"), "--data", data, "--out", "f", *flags)
    assert result.code == code, result.err
    assert told in result.err
    assert not (tmp_path / "f").exists()


def test_expected_labels_of_text_are_out_of_reach(
    cli: Cli, make_model: ModelMaker, data: Path
) -> None:
    model = make_model("g", "gpt2")
    result = cli("estimate-fisher", model, "--data", data, "--labels", "expected", "--out", "f")
    assert result.code == 2
    assert "use expected-signed or sampled" in result.err


def test_nan_weights_are_refused_by_name(cli: Cli, make_model: ModelMaker, data: Path) -> None:
    model = make_model("a")
    tensors = load_file(model / "model.safetensors")
    tensors["bert.embeddings.position_embeddings.weight"][-1] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    flags = ("estimate-fisher", model, "--data", data, "--out", "f")
    result = cli(*flags)
    assert result.code == 3
    assert "bert.embeddings.position_embeddings.weight has NaN or Inf" in result.err
    assert cli(*flags, "--allow-nonfinite").code == 0  # no text is long enough to meet it


def test_dry_run_and_overwrite(
    cli: Cli, make_model: ModelMaker, data: Path, tmp_path: Path
) -> None:
    flags = ("estimate-fisher", make_model("a"), "--data", data, "--out", "f")
    planned = cli(*flags, "--dry-run", "--json").report
    assert planned["status"] == "dry-run"
    assert not (tmp_path / "f").exists()
    for told in ("missing.jsonl: no such file", "a/model.safetensors: unknown suffix"):
        result = cli(
            "estimate-fisher", "a", "--data", told.split(":")[0], "--out", "f", "--dry-run"
        )
        assert (result.code, told in result.err) == (3, True), result.err
    written = cli(*flags, "--json").report
    assert written["output"]["bytes"] >= planned["summary"]["bytes_to_write"]
    assert cli(*flags).code == 7
    assert cli(*flags, "--overwrite").code == 0


def test_a_foreign_file_is_no_sidecar(
    cli: Cli, make_model: ModelMaker, data: Path, tmp_path: Path
) -> None:
    model = make_model("a")
    assert cli("estimate-fisher", model, "--data", data, "--out", "f", "-q").code == 0
    path = tmp_path / "f" / "diagonal.safetensors"
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["fishertool.fisher"])
    tensors = load_file(path)
    spoilt: list[dict[str, object]] = [
        {"format": 99},
        {"statistics": {}},
        {"kind": "factored"},
        {"surprise": 1},
    ]
    for spoil in spoilt:
        save_file(tensors, path, {"fishertool.fisher": json.dumps(header | spoil)})
        with pytest.raises(InputError, match="f"):
            open_sidecar(tmp_path / "f")
