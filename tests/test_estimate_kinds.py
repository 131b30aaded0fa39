"""`estimate-fisher --kind`: what each kind leaves on disk, and what is refused."""

import errno
import os
from pathlib import Path

import pytest
import torch
from conftest import Cli, ModelMaker, make_tokenizer
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES

from fishertool.checkpoint.reader import open_checkpoint
from fishertool.errors import InputError
from fishertool.fisher.kinds import KINDS
from fishertool.sidecar import check_fits, open_sidecar

SOME = ("--include", "bert.encoder.layer.0.*")


def test_all_kinds_in_one_pass(
    cli: Cli, make_model: ModelMaker, data: Path, tmp_path: Path
) -> None:
    """Each reads back, fits the model, and agrees with the others where they tell the same."""
    model = make_model("a")
    flags = ("--data", data, "--kind", ",".join(KINDS), "--bank-dtype", "float32", "--json")
    result = cli("estimate-fisher", model, *flags, "--out", "f")
    assert result.code == 0, result.err
    assert result.report["summary"]["labels"] == "empirical"  # a mean gradient is of the data's
    opened = {kind: open_sidecar(tmp_path / "f", kind) for kind in KINDS}
    with open_checkpoint(model) as checkpoint:
        for tensors, header in opened.values():
            check_fits(tensors, header, checkpoint)
    values = {kind: load_file(tmp_path / "f" / f"{kind}.safetensors") for kind in KINDS}
    diagonal = values["diagonal"]
    name = "bert.encoder.layer.1.output.dense.weight"
    torch.testing.assert_close(values["factored"][f"{name}#rows"], diagonal[name].sum(1))
    torch.testing.assert_close(values["factored"][f"{name}#columns"], diagonal[name].sum(0))
    assert values["rank-one"][name].shape == (12, *diagonal[name].shape)
    for weight, value in diagonal.items():
        mean_square = values["rank-one"][weight].square().mean(0)
        torch.testing.assert_close(mean_square, value, rtol=1e-4, atol=1e-12)
    leader = opened["kronecker"][1].leaders["bert.encoder.layer.1.attention.self.value.weight"]
    assert leader == "bert.encoder.layer.1.attention.self.query.weight"
    assert values["kronecker"][f"{leader}#input"].equal(values["activation"][f"{leader}#input"])
    assert "bert.embeddings.word_embeddings.weight" in opened["kronecker"][1].without
    kinds = {row["kind"] for row in result.report["tensors"]}
    assert kinds == set(KINDS)
    for tensors, _ in opened.values():
        tensors.close()


def test_activation_alone_needs_no_backward_pass(
    cli: Cli, make_model: ModelMaker, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("a backward pass")

    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    result = cli(
        "estimate-fisher", make_model("a"), "--data", data, "--kind", "activation", "--out", "f"
    )
    assert result.code == 0, result.err


def test_weights_of_gpt2_are_marked_as_transposed(
    cli: Cli, make_model: ModelMaker, data: Path, tmp_path: Path
) -> None:
    flags = ("--data", data, "--kind", "kronecker", "--out", "f")
    assert cli("estimate-fisher", make_model("g", "gpt2"), *flags).code == 0
    tensors, header = open_sidecar(tmp_path / "f", "kronecker")
    with tensors:
        name = "transformer.h.0.mlp.c_fc.weight"
        assert name in header.transposed
        assert (tensors.info(f"{name}#input").shape, tensors.info(f"{name}#output").shape) == (
            (16, 16),
            (64, 64),
        )


def test_experts_go_by_their_names_on_disk(cli: Cli, data: Path, tmp_path: Path) -> None:
    """One text of few tokens leaves experts without any: zero, and counted."""
    torch.manual_seed(0)
    ARCHITECTURES["mixtral"]().save_pretrained(tmp_path / "moe")
    make_tokenizer(template=False).save_pretrained(tmp_path / "moe")
    flags = ("--data", data, "--num-examples", 1, "--kind", "diagonal,factored,rank-one", "--json")
    result = cli("estimate-fisher", "moe", *flags, "--bank-dtype", "float32", "--out", "f")
    assert result.code == 0, result.err
    values = {kind: load_file(tmp_path / "f" / f"{kind}.safetensors") for kind in KINDS[:2]}
    values["rank-one"] = load_file(tmp_path / "f" / "rank-one.safetensors")
    with open_checkpoint(tmp_path / "moe") as checkpoint:
        assert set(values["diagonal"]) == set(values["rank-one"]) == set(checkpoint)
        for kind in values:
            tensors, header = open_sidecar(tmp_path / "f", kind)
            with tensors:
                check_fits(tensors, header, checkpoint)
    tokens = {
        row["name"]: row["tokens"]
        for row in result.report["tensors"]
        if row["kind"] == "diagonal" and "tokens" in row
    }
    experts = {name for name in values["diagonal"] if ".experts." in name}
    assert set(tokens) == experts and min(tokens.values()) == 0
    for name in experts:
        fisher = values["diagonal"][name]
        assert tokens[name] or not fisher.any(), name
        torch.testing.assert_close(values["rank-one"][name][0].square(), fisher)
        torch.testing.assert_close(values["factored"][f"{name}#rows"], fisher.sum(1))
    summary = result.report["summary"]
    assert (summary["by_autograd"], summary["one_example_at_a_time"]) == ([], False)
    without = summary["expert_weights_without_tokens"]
    assert without == sum(count == 0 for count in tokens.values())


@pytest.mark.parametrize("batch_size", ["auto", 1, 5])
def test_bank_of_groups_is_the_mean_of_its_examples(
    cli: Cli, make_model: ModelMaker, data: Path, batch_size: object, tmp_path: Path
) -> None:
    model = make_model("a")
    common = ("--data", data, "--kind", "rank-one", "--labels", "empirical", *SOME)
    single = ("--bank-dtype", "float32", "--out", "one")
    assert cli("estimate-fisher", model, *common, *single).code == 0
    grouped = ("--group", 5, "--bank-dtype", "float32", "--batch-size", batch_size, "--out", "five")
    assert cli("estimate-fisher", model, *common, *grouped).code == 0
    one, five = (load_file(tmp_path / out / "rank-one.safetensors") for out in ("one", "five"))
    tensors, header = open_sidecar(tmp_path / "five", "rank-one")
    tensors.close()
    assert header.group == 5
    for name, members in one.items():
        expected = torch.stack([chunk.mean(0) for chunk in torch.split(members, 5)])
        torch.testing.assert_close(five[name], expected, rtol=1e-4, atol=1e-7)


def test_bank_reports_its_rounding(cli: Cli, make_model: ModelMaker, data: Path) -> None:
    flags = ("--data", data, "--kind", "rank-one", *SOME, "--out", "f", "--json")
    report = cli("estimate-fisher", make_model("a"), *flags).report
    assert report["output"]["dtype"] == "bfloat16"
    errors = [row["rounding_error"] for row in report["tensors"] if row["mean"] > 1e-15]
    assert all(1e-4 < error < 4e-3 for error in errors)


def test_bank_too_large_for_the_disk_is_refused_before_the_run(
    cli: Cli, make_model: ModelMaker, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("fishertool.estimation.bank.free_bytes", lambda folder: 1_000)
    flags = ("--data", data, "--kind", "rank-one", "--out", "f")
    result = cli("estimate-fisher", make_model("a"), *flags)
    assert result.code == 5
    assert "the bank takes" in result.err and "--num-examples" in result.err
    assert not (tmp_path / "f").exists()


def test_disk_that_fills_up_during_the_bank_leaves_nothing(
    cli: Cli, make_model: ModelMaker, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pwrite, calls = os.pwrite, iter(range(1_000_000))

    def fill(*arguments: object) -> int:
        if next(calls) > 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pwrite", fill)
    flags = ("--data", data, "--kind", "rank-one", "--out", "f")
    result = cli("estimate-fisher", make_model("a"), *flags)
    assert (result.code, "free some space" in result.err) == (5, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "data.jsonl"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--kind", "diagonal,factord"], "did you mean 'factored'?"),
        (["--kind", ""], "--kind"),
        (["--kind", "rank-one", "--labels", "expected"], "one gradient an example"),
        (["--kind", "rank-one", "--labels", "sampled", "--draws", 2], "one gradient an example"),
        (["--kind", "diagonal", "--group", 2], "--group is for --kind rank-one"),
        (["--kind", "diagonal", "--bank-dtype", "float32"], "--bank-dtype is for --kind rank-one"),
        (["--kind", "rank-one", "--bank-dtype", "float16"], "--bank-dtype"),
        (["--draws", 5, "--labels", "empirical"], "--draws 5: labels are empirical"),
        (["--draws", 5], "--draws 5: labels are expected, and none is drawn; use --labels sampled"),
        (["--kind", "kronecker", "--include", "*LayerNorm*"], "--kind kronecker: none of the"),
        (["--kind", "diagonal,activation", "--include", "*bias"], "--kind activation: none of"),
        (["--batch-size", "many"], "--batch-size 'many'"),
        (["--batch-size", 0], "--batch-size '0'"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    cli: Cli, make_model: ModelMaker, data: Path, flags: list[object], told: str, tmp_path: Path
) -> None:
    result = cli("estimate-fisher", make_model("a"), "--data", data, *flags, "--out", "f")
    assert (result.code, told in result.err) == (2, True), result.err
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("kind", ["diagonal", "factored", "rank-one"])
def test_gradients_that_overflow_are_refused_by_name(
    cli: Cli, make_model: ModelMaker, data: Path, tmp_path: Path, kind: str
) -> None:
    """A norm of a constant divides by nearly nothing: there the gradients, not the loss, overflow."""
    model = make_model("a", layer_norm_eps=1e-38)
    tensors = load_file(model / "model.safetensors")
    for name in tensors:
        if "_embeddings" in name:
            tensors[name].zero_()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    flags = ("estimate-fisher", model, "--data", data, "--kind", kind, "--labels", "empirical")
    result = cli(*flags, "--out", "f")
    assert result.code == 3, result.err
    assert "the Fisher of bert.embeddings." in result.err
    assert "has NaN or Inf; --exclude these, or go on with --allow-nonfinite" in result.err
    assert not (tmp_path / "f").exists()
    assert cli(*flags, "--out", "f", "--allow-nonfinite").code == 0


def test_plan_counts_each_kind(cli: Cli, make_model: ModelMaker, data: Path) -> None:
    flags = ("--data", data, "--kind", "diagonal,factored,kronecker,rank-one", "--dry-run")
    model = make_model("a")
    report = cli("estimate-fisher", model, *flags, "--out", "f", "--json").report
    sizes = report["summary"]["bytes_by_kind"]
    assert sizes["rank-one"] * 2 == sizes["diagonal"] > sizes["factored"]
    assert "--num-examples" in report["warnings"][0]
    more = ("--num-examples", 10, "--group", 3, "--json")
    report = cli("estimate-fisher", model, *flags, *more, "--out", "f").report
    assert report["summary"]["bytes_by_kind"]["rank-one"] == 4 * sizes["rank-one"]
    assert report["warnings"] == []


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("moments", ["kronecker", "activation"])
def test_plan_counts_moments_by_their_sides(
    cli: Cli, make_model: ModelMaker, data: Path, tmp_path: Path, kind: str, moments: str
) -> None:
    """Each layer's by itself, of weights that lie either way; they may share some."""
    flags = ("--data", data, "--kind", moments, "--include", "*.0.*", "--out", "f", "--json")
    command = ("estimate-fisher", make_model("m", kind), *flags)
    told = cli(*command, "--dry-run").report["summary"]["bytes_by_kind"][moments]
    assert cli(*command).code == 0
    tensors, header = open_sidecar(tmp_path / "f", moments)
    with tensors:
        once = {name: tensors.info(name).nbytes for name in tensors}
    shared = [leader for name, leader in header.leaders.items() if name != leader]
    assert told == sum(once.values()) + sum(once[f"{leader}#input"] for leader in shared)


def test_a_kind_that_is_not_there_is_named(
    cli: Cli, make_model: ModelMaker, data: Path, tmp_path: Path
) -> None:
    flags = ("--data", data, "--kind", "kronecker", "--out", "f")
    model = make_model("a")
    assert cli("estimate-fisher", model, *flags).code == 0
    with pytest.raises(InputError, match="no Fisher of kind diagonal, but kronecker"):
        open_sidecar(tmp_path / "f")
    merge = ("merge", model, model, "--method", "fisher", "--fisher", "f", "--fisher", "f")
    result = cli(*merge, "--out", "m")
    assert (result.code, "diagonal" in result.err) == (3, True)


def test_how_well_totals_are_known_does_not_count_what_is_rounding(
    cli: Cli, make_model: ModelMaker, data: Path
) -> None:
    """The gradient of a key's bias is zero, and what rounding leaves of it depends on batches."""
    model = make_model("m")
    flags = ("estimate-fisher", model, "--data", data, "--until-relative-error", 0.001, "--json")
    found = [cli(*flags, "--batch-size", size, "--out", f"f{size}") for size in (1, 5)]
    errors = [one.report["summary"]["largest_relative_error"] for one in found]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)
    told = (
        f"--until-relative-error 0.001 was not reached: it is {errors[0]:.3g} with all 12 examples"
    )
    assert told in found[0].err
    worst = cli("inspect", "f1", "--json").report["summary"]["largest_relative_errors"]
    assert not any("key.bias" in name for name in worst)
    rows = {row["name"]: row for row in found[0].report["tensors"]}
    name = "bert.encoder.layer.0.attention.self.key.bias"
    assert 0 < rows[name]["mean"] < 1e-15
