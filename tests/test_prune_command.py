"""`fishertool prune`, through the command line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Cli, ModelMaker, files_of, make_text, make_tokenizer, write_rows
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_sentence import make_sentence_model
from tiny import _decoder
from torch import Tensor

from fishertool.checkpoint.reader import Checkpoint
from fishertool.fisher.columns import HeldGradients
from fishertool.fisher.rank_one import RankOneFisher
from fishertool.pruning.parts import columnwise
from fishertool.pruning.parts.compensation import joint
from fishertool.sidecar import open_sidecar, write_sidecar
from fishertool.surgery import prune_run, prune_step
from fishertool.surgery.prune_recipe import resolve_recipe
from fishertool.surgery.prune_step import _told_apart

SPREAD = 0.15
NO_FISHER = ("magnitude", "random")
FROM_DATA = ("wanda", "fisher", "obs", "mfac", "sparsegpt")


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def is_pruned(name: str) -> bool:
    """Linear weights inside the blocks, of a tiny BERT or GPT-2."""
    inside = ".layer." in name or ".h." in name
    return inside and name.endswith(".weight") and "Norm" not in name and ".ln_" not in name


def smallest(values: Tensor, count: int) -> Tensor:
    """True where kept, by a stable sort."""
    order = sorted(range(values.numel()), key=lambda place: -values.flatten()[place].item())
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[order[: values.numel() - count]] = True
    return mask.reshape(values.shape)


@pytest.fixture
def model(make_model: ModelMaker) -> Path:
    return make_model("model", spread=SPREAD)


@pytest.fixture
def sidecar(cli: Cli, model: Path, data: Path, tmp_path: Path) -> Path:
    """Every kind that a method needs."""
    kinds = "diagonal,activation,rank-one"
    flags = ("--kind", kinds, "--bank-dtype", "float32", "--out", "fisher", "-q")
    result = cli("estimate-fisher", model, "--data", data, *flags)
    assert result.code == 0, result.err
    return tmp_path / "fisher"


@pytest.mark.parametrize("method", [*NO_FISHER, *FROM_DATA])
def test_counts_are_exact_and_nothing_else_changes(
    cli: Cli, model: Path, sidecar: Path, tmp_path: Path, method: str
) -> None:
    fisher = () if method in NO_FISHER else ("--fisher", sidecar)
    flags = ("--method", method, "--sparsity", 0.6, "--compensate", "none", *fisher)
    result = cli("prune", model, *flags, "--out", "o", "--json")
    assert result.code == 0, result.err
    before, after = weights_of(model), weights_of(tmp_path / "o")
    assert before.keys() == after.keys()
    for name, old in before.items():
        if not is_pruned(name):
            assert torch.equal(after[name], old), name
            continue
        gone = after[name] == 0
        expected = int(0.6 * old.numel() + 0.5)
        if method in ("wanda", "fisher"):
            expected = len(old) * int(0.6 * old.shape[1] + 0.5)
        assert int(gone.sum()) == expected, name
        assert torch.equal(after[name][~gone], old[~gone]), name
    rows = {row["name"]: row for row in result.report["tensors"]}
    assert {name for name, row in rows.items() if row["action"] == "prune"} == set(
        filter(is_pruned, before)
    )
    assert rows["bert.embeddings.word_embeddings.weight"]["why"] == "an embedding"
    assert rows["classifier.weight"]["why"] == "outside the blocks"
    transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "o")


@pytest.mark.parametrize(
    ("method", "compensate"),
    [("magnitude", "none"), ("wanda", "none"), ("fisher", "summed"), ("obs", "auto"),
     ("mfac", "joint"), ("sparsegpt", "columnwise")],
)  # fmt: skip
def test_zero_sparsity_changes_nothing(
    cli: Cli, model: Path, data: Path, tmp_path: Path, method: str, compensate: str
) -> None:
    flags = ("--method", method, "--sparsity", 0, "--compensate", compensate, "--data", data)
    result = cli("prune", model, *flags, "--out", "o", "-q")
    assert result.code == 0, result.err
    assert files_of(tmp_path / "o") == files_of(model)


@pytest.mark.parametrize(
    ("flags", "fisher", "moment"),
    [
        ("--method obs", 0.001, None),
        ("--method sparsegpt", None, 0.01),
        ("--method sparsegpt --compensate joint", 0.001, 0.01),
        ("--method obs --compensate columnwise", 0.001, 0.01),
        ("--method sparsegpt --compensate joint --set damping=0.02", 0.001, 0.02),
        ("--method sparsegpt --compensate joint --damping 0.5", 0.5, 0.5),
        ("--method magnitude", None, None),
    ],
)
def test_each_statistic_has_a_damping_of_its_own(
    cli: Cli,
    model: Path,
    sidecar: Path,
    tmp_path: Path,
    flags: str,
    fisher: float | None,
    moment: float | None,
) -> None:
    given = () if "magnitude" in flags else ("--fisher", sidecar)
    result = cli("prune", model, *flags.split(), *given, "--sparsity", 0.5, "--out", "o", "--json")
    assert result.code == 0, result.err
    summary = result.report["summary"]
    assert (summary["damping"], summary["moment_damping"]) == (fisher, moment)
    name = "bert.encoder.layer.0.output.dense.weight"
    weight, after = weights_of(model)[name], weights_of(tmp_path / "o")[name]
    mask = after != 0
    if "joint" in flags:
        assert fisher is not None
        gradients = load_file(sidecar / "rank-one.safetensors")[name]
        held = HeldGradients({"w": gradients})
        curvature = RankOneFisher(held, fisher, 32, relative=True)
        expected = joint(weight.flatten(), mask.flatten(), curvature, held).reshape(weight.shape)
        torch.testing.assert_close(after.double(), expected, rtol=0, atol=1e-6)
    if "columnwise" in flags:
        assert moment is not None
        inputs = load_file(sidecar / "activation.safetensors")[f"{name}#input"]
        expected, _ = columnwise.columnwise(weight, inputs, lambda s, start: mask, damping=moment)
        torch.testing.assert_close(after.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "budget"),
    [
        ("--method fisher --sparsity 0.3", "row"),
        ("--method magnitude --sparsity 0.3", "tensor"),
        ("--method sparsegpt --sparsity 0.3 --budget row", "row"),
        ("--method fisher --sparsity 0.7 --budget global", "global"),
        ("--method magnitude --sparsity 0.3 --pattern 1x8", "tensor"),
        ("--method wanda --sparsity 0.3 --pattern 4x8", "row"),
        ("--method magnitude --pattern 3:8 --steps 2 --data data.jsonl", None),
    ],
)
def test_a_dry_run_counts_what_will_be_pruned(
    cli: Cli, model: Path, sidecar: Path, flags: str, budget: str | None
) -> None:
    given = [*flags.split(), "--out", "o", "--json"]
    given += [] if "magnitude" in flags else ["--fisher", str(sidecar)]
    told = cli("prune", model, *given, "--dry-run").report
    done = cli("prune", model, *given).report
    assert told["summary"]["weights_to_prune"] == done["summary"]["weights_pruned"]
    assert told["options"]["budget"] == done["options"]["budget"] == budget


@pytest.mark.parametrize("budget", [None, "row", "tensor"])
def test_the_mask_is_that_of_the_sidecars_fisher(
    cli: Cli, model: Path, sidecar: Path, tmp_path: Path, budget: str | None
) -> None:
    flags = ["--method", "fisher", "--sparsity", 0.5, "--fisher", sidecar, "--json"]
    flags += ["--budget", budget] if budget else []
    result = cli("prune", model, *flags, "--out", "o")
    before, after = weights_of(model), weights_of(tmp_path / "o")
    tensors = load_file(sidecar / "diagonal.safetensors")
    predicted = 0.0
    for name in filter(is_pruned, before):
        rise = 0.5 * before[name].double() ** 2 * tensors[name].double()
        groups = [rise] if budget == "tensor" else rise
        kept = torch.stack([smallest(group, group.numel() // 2) for group in groups])
        kept = kept.reshape(rise.shape)
        assert torch.equal(after[name] != 0, kept), name
        predicted += float(rise[~kept].sum())
    found = result.report["summary"]["predicted_loss_change"]
    assert found == pytest.approx(predicted, rel=1e-6)
    assert "nothing was measured" in result.report["warnings"][0]


def test_a_global_budget_is_of_all_matrices(
    cli: Cli, model: Path, sidecar: Path, tmp_path: Path
) -> None:
    before = weights_of(model)
    names = list(filter(is_pruned, before))
    for normalize in ("none", "mean"):
        flags = ("--budget", "global", "--normalize", normalize, "--sparsity", 0.7)
        result = cli("prune", model, *flags, "--out", normalize, "--json")
        assert result.code == 0, result.err
        saliencies = [before[name].abs().double() for name in names]
        if normalize == "mean":
            saliencies = [one / one.mean() for one in saliencies]
        whole = torch.cat([one.flatten() for one in saliencies])
        after = weights_of(tmp_path / normalize)
        found = torch.cat([(after[name] != 0).flatten() for name in names])
        expected = smallest(whole.float(), int(0.7 * len(whole) + 0.5))
        assert torch.equal(found, expected)
        assert result.report["summary"]["weights_pruned"] == int((~expected).sum())
        assert result.report["summary"]["overlap_with_magnitude"] == 1


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize(
    ("method", "pattern"),
    [("magnitude", "1:4"), ("magnitude", "4x4"), ("obs", "2:4"), ("sparsegpt", "2:4"),
     ("sparsegpt", "4x4")],
)  # fmt: skip
def test_patterns_run_along_inputs_whatever_is_on_disk(
    cli: Cli,
    make_model: ModelMaker,
    data: Path,
    tmp_path: Path,
    kind: str,
    method: str,
    pattern: str,
) -> None:
    model = make_model("m", kind, spread=SPREAD)
    sparsity = ("--sparsity", 0.5) if pattern == "4x4" else ()
    fisher = () if method == "magnitude" else ("--data", data)
    flags = ("--method", method, "--pattern", pattern, *sparsity, *fisher)
    result = cli("prune", model, *flags, "--out", "o", "--json")
    assert result.code == 0, result.err
    after = weights_of(tmp_path / "o")
    for value in (after[name] for name in after if is_pruned(name)):
        kept = (value.T if kind == "gpt2" else value) != 0  # Conv1D is [in, out]
        if pattern == "4x4":
            blocks = kept.reshape(len(kept) // 4, 4, -1, 4).sum((1, 3))
            assert sorted(blocks.flatten().tolist()) == [0] * (blocks.numel() // 2) + [16] * (
                blocks.numel() // 2
            )
        else:
            assert set(kept.reshape(-1, 4).sum(1).tolist()) == {int(pattern[0])}


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_joint_moves_are_those_of_the_bank(
    cli: Cli, make_model: ModelMaker, data: Path, tmp_path: Path, kind: str
) -> None:
    model = make_model("m", kind, spread=SPREAD)
    bank = ("--kind", "rank-one", "--bank-dtype", "float32", "--out", "bank", "-q")
    assert cli("estimate-fisher", model, "--data", data, *bank).code == 0
    flags = ("--method", "obs", "--fisher", "bank", "--block", 8, "--damping", 0.01)
    for update in ("none", "summed", "joint"):
        more = ("--compensate", update, "--out", update, "--json", "--sparsity", 0.5)
        result = cli("prune", model, *flags, *more)
        assert result.code == 0, result.err
        (tmp_path / f"{update}.json").write_text(result.out)
    predicted = {
        update: json.loads((tmp_path / f"{update}.json").read_text())["summary"][
            "predicted_loss_change"
        ]
        for update in ("none", "summed", "joint")
    }
    assert predicted["joint"] < min(predicted["none"], predicted["summed"])
    before, after = weights_of(model), weights_of(tmp_path / "joint")
    plain = weights_of(tmp_path / "none")
    tensors = load_file(tmp_path / "bank" / "rank-one.safetensors")
    for name in filter(is_pruned, before):
        weight, gradients, mask = before[name], tensors[name], plain[name] != 0
        if kind == "gpt2":
            weight, gradients, mask = weight.T, gradients.mT, mask.T
        held = HeldGradients({"w": gradients})
        fisher = RankOneFisher(held, 0.01, 8, relative=True)
        expected = joint(weight.flatten(), mask.flatten(), fisher, held).reshape(weight.shape)
        found = after[name].T if kind == "gpt2" else after[name]
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-7)
        assert torch.equal(after[name] != 0, plain[name] != 0)


def test_auto_keeps_an_update_only_where_the_held_out_loss_falls(
    cli: Cli, model: Path, data: Path
) -> None:
    flags = ("--method", "obs", "--sparsity", 0.7, "--data", data, "--held-out", 0.4, "--json")
    plain = cli("prune", model, *flags, "--out", "plain").report["summary"]
    result = cli("prune", model, *flags, "--compensate", "auto", "--out", "auto")
    assert result.code == 0, result.err
    assert result.report["calibration"]["labels"] == "expected-signed"
    rows = [row for row in result.report["tensors"] if row["action"] == "prune"]
    loss = plain["loss_after"]
    for row in rows:
        losses = row["held_out_loss"]
        assert losses["none"] == pytest.approx(loss, abs=1e-6)
        assert row["update"] == min(losses, key=losses.__getitem__)
        loss = min(losses.values())
    assert result.report["summary"]["loss_after"] == pytest.approx(loss, abs=1e-6)
    assert loss < plain["loss_after"]
    assert sum(result.report["summary"]["updates"].values()) == len(rows)


def test_damping_auto_takes_the_best_on_held_out_examples(
    cli: Cli, model: Path, data: Path, tmp_path: Path
) -> None:
    flags = ("--method", "obs", "--sparsity", 0.6, "--compensate", "joint", "--data", data)
    result = cli("prune", model, *flags, "--damping", "auto", "--out", "auto", "--json")
    assert result.code == 0, result.err
    tried = {
        row["damping"]: row["held_out_loss"] for row in result.report["evaluation"]["dampings"]
    }
    best = min(tried, key=tried.__getitem__)
    assert len(tried) == 6 and result.report["summary"]["damping"] == best
    assert result.report["summary"]["loss_after"] == tried[best]
    again = cli("prune", model, *flags, "--damping", best, "--out", "given", "-q")
    assert again.code == 0, again.err
    assert files_of(tmp_path / "auto") == files_of(tmp_path / "given")


def test_steps_go_geometrically_and_never_bring_a_weight_back(
    cli: Cli, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Tensor]] = []
    run_step = prune_step.run_step

    def watched(*arguments: Any) -> Path:
        folder = run_step(*arguments)
        found = load_file(folder / "tensors.safetensors")
        seen.append({name: found[name] for name in found if is_pruned(name)})
        return folder

    monkeypatch.setattr(prune_run, "run_step", watched)
    flags = ("--method", "obs", "--sparsity", 0.8, "--steps", 3, "--data", data, "--json")
    result = cli("prune", model, *flags, "--compensate", "joint", "--out", "o")
    assert result.code == 0, result.err
    sparsities = [row["sparsity"] for row in result.report["evaluation"]["steps"]]
    assert sparsities == pytest.approx([1 - 0.2 ** (k / 3) for k in (1, 2, 3)])
    for earlier, later, sparsity in zip(seen, seen[1:], sparsities[1:], strict=False):
        for name, value in later.items():
            assert not value[earlier[name] == 0].any(), name
            assert int((value == 0).sum()) == int(sparsity * value.numel() + 0.5)
    last = weights_of(tmp_path / "o")
    assert all(torch.equal(last[name], value) for name, value in seen[-1].items())


@pytest.mark.parametrize("pattern", ["unstructured", "neurons"])
def test_weights_that_recovery_has_spoilt_are_not_written(
    cli: Cli, make_model: ModelMaker, data: Path, tmp_path: Path, pattern: str
) -> None:
    model = make_model("half", "llama", dtype=torch.float16)
    flags = ("--method", "magnitude", "--sparsity", 0.5, "--data", data, "--out", "o", "-q")
    more = ("--pattern", pattern, "--recover-steps", 1, "--recover-learning-rate", 1e6)
    result = cli("prune", model, *flags, *more)
    assert result.code == 3
    assert "is not finite as float16 after training; lower the learning rate" in result.err
    assert len(result.err.splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_recovery_trains_what_stays_and_nothing_else(
    cli: Cli, model: Path, data: Path, tmp_path: Path
) -> None:
    flags = ("--sparsity", 0.8, "--data", data, "--json")
    plain = cli("prune", model, *flags, "--out", "plain").report["summary"]
    more = ("--recover-steps", 20, "--recover-learning-rate", 0.01)
    result = cli("prune", model, *flags, *more, "--out", "o")
    assert result.code == 0, result.err
    recovery = result.report["evaluation"]["recovery"]
    assert recovery["steps"] == 20 and recovery["loss_after"] < recovery["loss_before"]
    assert result.report["summary"]["loss_after"] == recovery["held_out_loss"]
    assert result.report["evaluation"]["steps"][-1]["held_out_loss"] == plain["loss_after"]
    before, after = weights_of(tmp_path / "plain"), weights_of(tmp_path / "o")
    for name, old in before.items():
        assert not torch.equal(after[name], old) or "token_type" in name, name
        if is_pruned(name):
            assert torch.equal(after[name] == 0, old == 0), name


def test_groups_of_four_lose_one_after_another(cli: Cli, model: Path, data: Path) -> None:
    for method, pattern, steps, made in (
        ("magnitude", "1:4", 2, ["2:4", "1:4"]),
        ("obs", "2:4", 16, ["3:4", "2:4"]),
        ("obs", "7:8", 2, ["7:8"]),
    ):
        flags = ("--method", method, "--pattern", pattern, "--steps", steps, "--data", data)
        result = cli("prune", model, *flags, "--out", pattern, "--json")
        assert result.code == 0, result.err
        assert [row["pattern"] for row in result.report["evaluation"]["steps"]] == made
        told = f"--steps {steps}: --pattern {pattern} is reached in {len(made)}: {', '.join(made)}"
        assert (told in result.report["warnings"]) == (len(made) < steps)
        dry = cli("prune", model, *flags, "--out", "dry", "--dry-run", "--json")
        assert (told in dry.report["warnings"]) == (len(made) < steps)


def test_the_saved_mask_is_that_of_the_weights(
    cli: Cli, model: Path, data: Path, tmp_path: Path
) -> None:
    flags = ("--method", "wanda", "--sparsity", 0.3, "--data", data, "--save-mask", "--json")
    result = cli("prune", model, *flags, "--out", "o")
    assert result.code == 0, result.err
    after = weights_of(tmp_path / "o")
    with safe_open(tmp_path / "o" / "pruning_mask.safetensors", "pt") as file:
        shapes = json.loads(file.metadata()["fishertool.mask"])["shapes"]
        assert set(shapes) == set(filter(is_pruned, after)) == set(file.keys())
        for name, shape in shapes.items():
            packed = file.get_tensor(name)
            bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
            mask = bits.flatten()[: after[name].numel()].reshape(shape).bool()
            assert torch.equal(mask, after[name] != 0)
    written = result.report["output"]
    assert written["bytes"] == sum(file["bytes"] for file in written["files"])
    named = [file["file"] for file in written["files"]]
    assert named == ["model.safetensors", "pruning_mask.safetensors"]
    assert cli("prune", tmp_path / "o", "--sparsity", 0.5, "--out", "again", "-q").code == 0
    assert not (tmp_path / "again" / "pruning_mask.safetensors").exists()


def add_mean_gradient(folder: Path, seed: int) -> dict[str, Tensor]:
    """Beside the diagonal, as estimate-fisher --with-mean-gradient would."""
    generator = torch.Generator().manual_seed(seed)
    tensors, header = open_sidecar(folder)
    with tensors:
        shapes = {name: tensors.info(name).shape for name in tensors}
    means = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    write_sidecar(folder, replace(header, kind="mean-gradient"), means, 1 << 40)
    return means


@pytest.mark.parametrize("form", ["paper", "normalized"])
def test_gaprune_from_a_domain_and_a_general_sidecar(
    cli: Cli, model: Path, data: Path, tmp_path: Path, form: str
) -> None:
    write_rows("general.jsonl", [{"text": make_text(n, 9), "label": n % 3} for n in range(50, 60)])
    opened: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    for n, source in enumerate((data, "general.jsonl")):
        assert cli("estimate-fisher", model, "--data", source, "--out", f"f{n}", "-q").code == 0
        folder = tmp_path / f"f{n}"
        opened.append((load_file(folder / "diagonal.safetensors"), add_mean_gradient(folder, n)))
    flags = ("--method", "gaprune", "--fisher", "f0", "--sparsity", 0.5)
    sidecar = ("--general-fisher", tmp_path / "f1")
    result = cli("prune", model, *flags, *sidecar, "--dai-form", form, "--out", "o", "--json")
    assert result.code == 0, result.err
    assert str(tmp_path) not in (tmp_path / "o" / "fishertool_report.json").read_text()
    before, after = weights_of(model), weights_of(tmp_path / "o")
    names = list(filter(is_pruned, before))

    def mean(tensors: Any) -> float:
        if form == "paper":
            return 1.0
        return float(torch.cat([tensors[name].flatten() for name in names]).double().abs().mean())

    size, domain, general = mean(before), mean(opened[0][0]), mean(opened[1][0])
    for name in names:
        w = before[name].double().abs() / size
        gain = opened[0][0][name].double() / domain - opened[1][0][name].double() / general
        a, b = (means[name].double().flatten() for _, means in opened)
        s = float(a @ b / a.norm() / b.norm())
        expected = smallest((gain * w + 0.5 * w.sqrt()) * (1 + 0.2 * s), w.numel() // 2)
        assert int(((after[name] != 0) ^ expected).sum()) <= 2, name  # rounding near the threshold
    assert [file["role"] for file in result.report["inputs"]] == ["model", "fisher", "fisher"]


@pytest.mark.parametrize("transformer", ["", "0_Transformer"])
def test_sentence_transformers_folder_in_and_out(
    cli: Cli, make_model: ModelMaker, tmp_path: Path, transformer: str
) -> None:
    folder = make_sentence_model(make_model, transformer=transformer)
    pairs = [{"query": make_text(n, 2), "positive": make_text(n, 5)} for n in range(12)]
    write_rows("pairs.jsonl", pairs)
    flags = ("--method", "obs", "--sparsity", 0.5, "--data", "pairs.jsonl", "--json")
    result = cli("prune", folder, *flags, "--out", "o")
    assert result.code == 0, result.err
    assert set(files_of(tmp_path / "o")) == set(files_of(folder))
    after = weights_of(tmp_path / "o" / transformer)
    for name in filter(lambda name: ".layer." in name and "dense.weight" in name, after):
        assert int((after[name] == 0).sum()) == after[name].numel() // 2
    reported = cli("estimate-fisher", "o", "--data", "pairs.jsonl", "--out", "f", "--json")
    assert reported.report["summary"]["task"] == "embedding"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_dtypes_stay(
    cli: Cli, make_model: ModelMaker, data: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = make_model("half", dtype=dtype, spread=SPREAD)
    flags = ("--method", "obs", "--sparsity", 0.5, "--data", data, "--compensate", "joint")
    result = cli("prune", model, *flags, "--out", "o", "--json")
    assert result.code == 0, result.err
    after = weights_of(tmp_path / "o")
    assert {value.dtype for value in after.values()} == {dtype}
    for name in filter(is_pruned, after):
        assert int((after[name] == 0).sum()) >= after[name].numel() // 2


def test_threads_and_a_second_run_give_the_same_bytes(
    cli: Cli, model: Path, data: Path, tmp_path: Path
) -> None:
    for out, threads in (("one", 1), ("two", 2), ("again", 1)):
        flags = ("--method", "obs", "--sparsity", 0.7, "--data", data, "--compensate", "joint")
        assert cli("prune", model, *flags, "--threads", threads, "--out", out, "-q").code == 0
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two") == files_of(tmp_path / "again")


class Killed(BaseException):
    """Nothing below the boundary catches it."""


def test_a_killed_run_goes_on_where_it_was(
    cli: Cli, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = (
        "--method",
        "obs",
        "--sparsity",
        0.7,
        "--data",
        data,
        "--steps",
        2,
        "--compensate",
        "joint",
    )
    assert cli("prune", model, *flags, "--out", "whole", "-q").code == 0
    with monkeypatch.context() as patch:
        patch.setattr("fishertool.surgery.prune_moves._predicted", _killing(after=20))
        with pytest.raises(Killed):
            cli("prune", model, *flags, "--resume", "--out", "o")
    left = tmp_path / ".o.resumable" / "work"
    assert (left / "step-1" / "pruned").is_dir() and (left / "step-2" / "mask").is_dir()
    other = cli("prune", model, *flags[:2], "--sparsity", 0.5, *flags[4:], "--resume", "--out", "o")
    assert other.code == 2 and "a killed run with other options" in other.err
    monkeypatch.setattr("fishertool.surgery.prune_statistics.Statistics.inputs", None)  # not again
    monkeypatch.setattr("fishertool.surgery.prune_trial.write_statistics", None)
    result = cli("prune", model, *flags, "--resume", "--out", "o", "--json")
    assert result.code == 0, result.err
    assert files_of(tmp_path / "o") == files_of(tmp_path / "whole")
    assert not left.parent.exists()
    assert result.report["summary"]["updates"] == {"joint": 12}


def interrupted(*arguments: Any, **keywords: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["_write", "rows_of"])
def test_an_interrupted_run_says_how_it_goes_on_and_does(
    cli: Cli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    flags = ("--sparsity", 0.5, "--save-mask", "-q")
    assert cli("prune", model, *flags, "--out", "whole").code == 0
    with monkeypatch.context() as patch:
        patch.setattr(f"fishertool.commands.prune.{where}", interrupted)
        stopped = cli("prune", model, *flags, "--resume", "--out", "o")
        assert stopped.code == 130 and "the same command goes on from what is done" in stopped.err
        for_good = cli("prune", model, *flags, "--out", "p")
        assert for_good.code == 130 and "goes on" not in for_good.err
    assert (tmp_path / ".o.resumable").is_dir()
    result = cli("prune", model, *flags, "--resume", "--out", "o")
    assert result.code == 0, result.err
    assert files_of(tmp_path / "o") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("changed", ["f0", "f1"])
def test_a_run_is_not_resumed_with_another_sidecar(
    cli: Cli, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    write_rows("other.jsonl", [{"text": make_text(n, 9), "label": n % 3} for n in range(6)])
    estimate = ("estimate-fisher", model, "--with-mean-gradient", "-q", "--overwrite")
    for out in ("f0", "f1"):
        assert cli(*estimate, "--data", data, "--out", out).code == 0
    flags = ("--method", "gaprune", "--fisher", "f0", "--general-fisher", "f1", "--sparsity", 0.5)
    command = ("prune", model, *flags, "--resume", "--out", "o", "-q")
    with monkeypatch.context() as patch:
        patch.setattr("fishertool.commands.prune._write", interrupted)
        assert cli(*command).code == 130
    assert cli(*estimate, "--data", "other.jsonl", "--out", changed).code == 0
    refused = cli(*command)
    assert (refused.code, "with other options or sidecars" in refused.err) == (2, True), refused.err
    assert cli(*estimate, "--data", data, "--out", changed).code == 0
    assert cli(*command).code == 0


def _killing(after: int) -> Any:
    calls = iter(range(after))

    def predicted(*arguments: Any) -> float:
        if next(calls, None) is None:
            raise Killed
        return 0.0

    return predicted


def test_a_dry_run_reads_headers_alone(
    cli: Cli, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "read", None)
    flags = ("--method", "obs", "--data", data, "--num-examples", 8, "--sparsity", 0.5)
    result = cli("prune", model, *flags, "--dry-run", "--out", "o", "--json")
    assert result.code == 0, result.err
    summary = result.report["summary"]
    assert (summary["selected"], summary["weights_to_prune"]) == (12, 2048)
    assert not (tmp_path / "o").exists()


def test_include_takes_what_is_left_out_by_default(cli: Cli, model: Path, tmp_path: Path) -> None:
    flags = ("--sparsity", 0.5, "--include", "*word_embeddings*", "--out", "o")
    assert cli("prune", model, *flags, "-q").code == 0
    before, after = weights_of(model), weights_of(tmp_path / "o")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["bert.embeddings.word_embeddings.weight"]


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        ("", 2, "needs --sparsity"),
        ("--sparsity 1", 2, "--sparsity 1: is at least 0 and below 1"),
        ("--sparsity -0.1", 2, "is at least 0 and below 1"),
        ("--sparsity nan", 2, "is at least 0 and below 1"),
        ("--sparsity 0.6 --pattern 2:4", 2, "--pattern 2:4 makes it 0.5"),
        ("--sparsity 0.5 --pattern neurns", 2, "--pattern 'neurns'; did you mean 'neurons'?"),
        ("--sparsity 0.5 --pattern 4:2", 2, "write unstructured, n:m"),
        ("--sparsity 0.5 --pattern 3x16", 3, "does not divide"),
        ("--pattern 3:5", 3, "--pattern 3:5 does not divide bert.encoder.layer.0"),
        ("--sparsity 0.5 --method osb", 2, "did you mean 'obs'?"),
        ("--sparsity 0.5 --method fisher", 2, "needs a Fisher of kind diagonal"),
        ("--sparsity 0.5 --method gaprune --fisher fisher", 2, "--general-fisher"),
        ("--sparsity 0.5 --method gaprune --data data.jsonl", 2, "--general-fisher"),
        ("--sparsity 0.5 --fisher fisher", 2, "method magnitude takes no --fisher"),
        ("--sparsity 0.5 --general-fisher fisher", 2, "takes no --general-fisher"),
        ("--sparsity 0.5 --method obs --fisher other", 3, "has no such tensor"),
        ("--sparsity 0.5 --method obs --fisher wrong", 3, "; give that model's own, or estimate"),
        ("--sparsity 0.5 --method fisher --fisher wrong", 3,
         "wrong: has no Fisher of kind diagonal, but rank-one; estimate it with --kind diagonal"),
        ("--sparsity 0.5 --method obs --fisher model", 3,
         "model: has no Fisher of kind rank-one; estimate it with --kind rank-one"),
        ("--sparsity 0.5 --method obs --fisher fisher --damping 1e-7", 2, "12 gradients is singular"),
        ("--sparsity 0.5 --method obs --data data.jsonl --damping 1e-7", 2, "10 gradients is singular"),
        ("--sparsity 0.5 --method obs --fisher fisher --damping 0", 2, "a number above 0"),
        ("--sparsity 0.5 --method obs --fisher fisher --damping auto", 2, "give --data"),
        ("--pattern 2:4 --method obs --fisher fisher --block 2", 2, "take --block 4 or more"),
        ("--sparsity 0.5 --method obs --fisher fisher --block 0", 2, "a number of weights, or whole"),
        ("--sparsity 0.5 --method obs --fisher fisher --compensate auto", 2, "give --data"),
        ("--sparsity 0.5 --method obs --fisher fisher --steps 2", 2, "give --data"),
        ("--sparsity 0.5 --steps 2", 2, "--steps changes nothing but what is measured after each: "),
        ("--sparsity 0.5 --data data.jsonl --recover-learning-rate 1", 2,
         "--recover-learning-rate: needs --recover-steps"),
        ("--sparsity 0.5 --method gaprune --fisher fisher --general-fisher fisher --steps 2 "
         "--data data.jsonl", 2, "two sidecars"),
        ("--sparsity 0.5 --recover-steps 5", 2, "trains on the data: give --data"),
        ("--sparsity 0.5 --compensate joined", 2, "did you mean 'joint'?"),
        ("--sparsity 0.5 --compensate joint", 2, "needs a Fisher of kind rank-one"),
        ("--sparsity 0.5 --budget all", 2, "--budget 'all'"),
        ("--sparsity 0.5 --normalize mean", 2, "--normalize is for --budget global"),
        ("--pattern 2:4 --budget row", 2, "leaves no budget to share"),
        ("--sparsity 0.5 --block 4", 2, "--block is for obs, mfac"),
        ("--sparsity 0.5 --damping 0.1", 2, "magnitude inverts nothing"),
        ("--sparsity 0.5 --method sparsegpt --budget global --fisher fisher", 2, "matrix by matrix"),
        ("--sparsity 0.5 --method sparsegpt --fisher fisher --damping 1 --set damping=2", 2,
         "say it twice"),
        ("--sparsity 0.5 --method sparsegpt --data data.jsonl --set damping=0", 2, "a number above 0"),
        ("--sparsity 0.5 --method sparsegpt --data data.jsonl --set damping=-1", 2, "above 0"),
        ("--sparsity 0.5 --method sparsegpt --data data.jsonl --set damping=nan", 2, "above 0"),
        ("--sparsity 0.5 --method sparsegpt --data data.jsonl --set damping=inf", 2, "above 0"),
        ("--sparsity 0.5 --method wanda --data data.jsonl --include *", 3,
         "no activations are estimated of bert.embeddings.position_embeddings.weight, "),
        ("--sparsity 0.5 --data data.jsonl --compensate columnwise --include *embed* --dry-run", 3,
         "which look tokens up and multiply no input; leave these out with --exclude"),
        ("--sparsity 0.5 --data data.jsonl --recover-learning-rate -5 --recover-steps 1", 2,
         "--recover-learning-rate -5: a number above 0"),
        ("--sparsity 0.5 --data data.jsonl --recover-learning-rate nan --recover-steps 1", 2,
         "--recover-learning-rate nan"),
        ("--sparsity 0.5 --pattern neurons --data data.jsonl --recover-learning-rate inf "
         "--recover-steps 1", 2, "--recover-learning-rate inf"),
        ("--sparsity 0.5 --labels bogus --held-out 7 --num-examples 3", 2,
         "--held-out, --labels, --num-examples: without --data"),
        ("--sparsity 0.5 --pattern neurons --task zzz --text-column q", 2,
         "--task, --text-column: without --data"),
        ("--sparsity 0.5 --group 4 --recover-learning-rate 1", 2,
         "--recover-learning-rate, --group: without --data"),
        ("--sparsity 0.5 --data data.jsonl --held-out 0", 2, "above 0 and below 1"),
        ("--sparsity 0.5 --data data.jsonl --held-out 0.01", 2, "0 to measure"),
        ("--sparsity 0.5 --data data.jsonl --held-out 7 --dry-run", 2, "above 0 and below 1"),
        ("--sparsity 0.5 --data data.jsonl --labels bogus --dry-run", 2, "--labels 'bogus'"),
        ("--sparsity 0.5 --data data.jsonl --task zz --dry-run", 2, "'zz'"),
        ("--sparsity 0.5 --pattern neurons --data data.jsonl --task zz --dry-run", 2, "'zz'"),
        ("--sparsity 0.5 --data data.jsonl --label-column no", 3, "no column 'no'"),
        ("--sparsity 0.5 --include *LayerNorm*", 2, "matches none"),
        ("--sparsity 0.5 --exclude *", 2, "leave no tensor"),
        ("--sparsity 0.5 --exclude *encoder*", 2, "nothing is selected"),
        ("--sparsity 0.5 --out model", 2, "overlaps the input"),
    ],
)  # fmt: skip
def test_what_is_refused(
    cli: Cli,
    make_model: ModelMaker,
    model: Path,
    data: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    flags: str,
    code: int,
    told: str,
) -> None:
    if "-fisher fisher" in flags:
        request.getfixturevalue("sidecar")
    for name, source in (("wrong", model), ("other", None)):
        if f"--fisher {name}" in flags:
            other = make_model("b", "bert" if source else "gpt2", seed=5)
            more = ("--kind", "rank-one", "--out", name, "-q")
            assert cli("estimate-fisher", other, "--data", data, *more).code == 0
    out = () if "--out" in flags else ("--out", "o")
    result = cli("prune", "model", *flags.split(), *out)
    assert (result.code, result.out) == (code, ""), result.err
    assert told in result.err and result.err.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_a_side_too_wide_for_activations_is_refused_before_any_work(
    cli: Cli, model: Path, data: Path, sidecar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fishertool.surgery.prune_plan.MAX_SIDE", 16)
    flags = ("--method", "wanda", "--sparsity", 0.5, "--out", "o")
    result = cli("prune", model, *flags, "--data", data, "--dry-run")
    assert result.code == 3, result.err
    assert "bert.encoder.layer.0.intermediate.dense.weight" in result.err
    assert "which have a side of more than 16; leave these out with --exclude" in result.err
    assert cli("prune", model, *flags, "--fisher", sidecar, "-q").code == 0  # they are there


def make_experts(folder: Path) -> None:
    """A mixture of so many experts that a few texts do not reach all."""
    torch.manual_seed(0)
    experts = {"num_experts": 16, "num_experts_per_tok": 1, "moe_intermediate_size": 12}
    made: Any = _decoder("Qwen3Moe", head_dim=8, **experts)()
    made.save_pretrained(folder)
    make_tokenizer(template=False).save_pretrained(folder)


@pytest.mark.parametrize(
    "method",
    [("wanda",), ("fisher",), ("fisher", "--budget", "global"), ("obs", "--budget", "global")],
    ids=" ".join,
)
def test_experts_that_no_token_reached_stay_as_they_are(
    cli: Cli, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: tuple[str, ...]
) -> None:
    make_experts(tmp_path / "m")
    before = weights_of(tmp_path / "m")
    command = ("prune", "m", "--method", *method, "--sparsity", 0.5, "--data", data)
    with monkeypatch.context() as patch:
        patch.setattr("fishertool.commands.prune._write", interrupted)
        assert cli(*command, "--resume", "--out", "o").code == 130
    result = cli(*command, "--resume", "--out", "o", "--json")
    assert result.code == 0, result.err
    after = weights_of(tmp_path / "o")
    rows = {row["name"]: row for row in result.report["tensors"]}
    stay = [name for name, row in rows.items() if row.get("why", "").startswith("an expert that")]
    assert stay and all(".experts." in name for name in stay)
    assert all(torch.equal(after[name], before[name]) for name in stay)
    pruned = [name for name, row in rows.items() if row["action"] == "prune"]
    assert any(".experts." in name for name in pruned)
    zeros = [int((after[name] == 0).sum()) for name in pruned]
    halves = [after[name].numel() // 2 for name in pruned]
    assert sum(zeros) == sum(halves) if "global" in method else zeros == halves
    warning = next(one for one in result.report["warnings"] if "no token" in one)
    assert f"no token of the data reached {stay[0]}" in warning


def test_experts_that_a_sidecar_does_not_tell_of_stay_as_they_are(
    cli: Cli, data: Path, tmp_path: Path
) -> None:
    make_experts(tmp_path / "m")
    kinds = ("--kind", "diagonal,activation")
    assert cli("estimate-fisher", "m", "--data", data, *kinds, "--out", "f", "-q").code == 0
    for method in ("wanda", "fisher"):
        flags = ("--method", method, "--fisher", "f", "--sparsity", 0.5, "--out", method, "--json")
        result = cli("prune", "m", *flags)
        assert result.code == 0, result.err
        assert any("no token of the data reached" in one for one in result.report["warnings"])


@pytest.mark.parametrize(
    ("pattern", "group"), [("1x16", 16), ("1x64", 64), ("1x128", 1), ("4:8", 8), ("8:16", 1)]
)
def test_obs_judges_sets_of_so_many(pattern: str, group: int) -> None:
    sparsity = None if ":" in pattern else 0.5
    recipe = resolve_recipe(
        "obs", {}, sparsity=sparsity, pattern=pattern, budget=None, normalize="none",
        compensate=None, block=None, damping=None, steps=1, recover_steps=0,
    )  # fmt: skip
    assert recipe.group == group


def test_a_pattern_in_a_config_file_is_no_time_of_day(
    cli: Cli, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "c.yml").write_text("pattern: 2:4\n")
    result = cli("prune", model, "--config", "c.yml", "--out", "o", "--json")
    assert result.code == 0, result.err
    assert result.report["options"]["pattern"] == "2:4"
    assert result.report["environment"]["device"] == "cpu"


def test_weights_without_any_fisher_go_by_magnitude_after_all_others() -> None:
    saliency = torch.tensor([[0.0, 3.0, 0.0, 1.0], [0.0, 0.0, 2.0, 0.0]])
    weight = torch.tensor([[4.0, 0.1, -8.0, 0.1], [2.0, 0.0, 0.1, 6.0]])
    found = _told_apart(saliency, weight)
    order = [int(place) for place in found.flatten().argsort()]
    assert order == [5, 4, 0, 7, 2, 3, 6, 1]
    signed = saliency - 1  # of which zero is not the least
    assert torch.equal(_told_apart(signed, weight), signed)


def test_recovery_leaves_a_finer_tensor_its_digits(
    cli: Cli, make_model: ModelMaker, data: Path, tmp_path: Path
) -> None:
    model = make_model("m", "llama", dtype=torch.bfloat16)
    tensors = load_file(model / "model.safetensors")
    fine = {name: value.float() + 1e-3 for name, value in tensors.items() if "norm" in name}
    save_file(tensors | fine, model / "model.safetensors", {"format": "pt"})
    for pattern in ("unstructured", "neurons"):
        result = cli(
            "prune", model, "--sparsity", 0.5, "--method", "magnitude", "--pattern", pattern,
            "--data", data, "--recover-steps", 1, "--recover-learning-rate", 1e-12,
            "--out", pattern, "-q",
        )  # fmt: skip
        assert result.code == 0, result.err
        after = weights_of(tmp_path / pattern)
        assert all(torch.equal(after[name], value) for name, value in fine.items())


@pytest.mark.parametrize("method", ["sparsegpt", "magnitude"])
def test_a_damping_too_small_is_told_and_loses(
    cli: Cli, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    factor = columnwise.inverse_factor

    def singular(activations: Tensor, damping: float) -> Tensor:
        if damping < 1e-2:
            torch.linalg.cholesky(-torch.eye(2))
        return factor(activations, damping)

    for place in ("pruning.parts.columnwise", "pruning.sparsegpt"):
        monkeypatch.setattr(f"fishertool.{place}.inverse_factor", singular)
    flags = ("--method", method, "--compensate", "columnwise", "--sparsity", 0.5, "--data", data)
    refused = cli("prune", model, *flags, "--damping", 1e-4, "--out", "o")
    assert refused.code == 3, refused.err
    assert "weight: its statistic is singular with so little damping; take more" in refused.err
    result = cli("prune", model, *flags, "--damping", "auto", "--out", "o", "--json")
    assert result.code == 0, result.err
    tried = [row["held_out_loss"] for row in result.report["evaluation"]["dampings"]]
    assert tried[:3] == [None, None, None] and None not in tried[3:]
    monkeypatch.setattr(prune_run, "DAMPINGS", (1e-4, 1e-3))
    none = cli("prune", model, *flags, "--damping", "auto", "--out", "p")
    assert none.code == 3 and "take more --damping" in none.err


def test_gated_updates_are_what_a_damping_is_chosen_by(cli: Cli, model: Path, data: Path) -> None:
    flags = ("--method", "magnitude", "--sparsity", 0.7, "--data", data, "--damping", "auto")
    result = cli("prune", model, *flags, "--compensate", "auto", "--out", "o", "--json")
    assert result.code == 0, result.err
    tried = [row["held_out_loss"] for row in result.report["evaluation"]["dampings"]]
    assert len(set(tried)) > 1


def test_every_steps_work_is_counted_before_the_first(cli: Cli, model: Path, data: Path) -> None:
    flags = ("--method", "fisher", "--sparsity", 0.7, "--data", data, "--dry-run", "--json")
    one, four = (
        cli("prune", model, *flags, "--steps", steps, "--out", "o").report["summary"]
        for steps in (1, 4)
    )
    assert four["bytes_of_working_files"] == one["bytes_of_working_files"] + 3 * 5 * one["weights"]


def test_zeros_that_were_there_before_are_counted(
    cli: Cli, model: Path, data: Path, tmp_path: Path
) -> None:
    assert cli("prune", model, "--sparsity", 0.5, "--out", "half", "-q").code == 0
    flags = ("--method", "random", "--sparsity", 0.5, "--threads", 2, "--json")
    for out, more in (("o", ()), ("trained", ("--data", data, "--recover-steps", 2))):
        result = cli("prune", "half", *flags, *more, "--out", out)
        assert result.code == 0, result.err
        after = weights_of(tmp_path / out)
        rows = [row for row in result.report["tensors"] if row["action"] == "prune"]
        found = {row["name"]: row["zeros"] * after[row["name"]].numel() for row in rows}
        assert found == {name: float((after[name] == 0).sum()) for name in found}
        assert {row["sparsity"] for row in rows} == {0.5}
        total = sum(after[name].numel() for name in found)
        summary = result.report["summary"]
        assert (summary["sparsity"], summary["zeros"]) == (0.5, sum(found.values()) / total)
        assert more or summary["zeros"] > 0.7


def test_weights_that_are_not_finite_are_named(
    cli: Cli, make_model: ModelMaker, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    model = make_model("m")
    weights = weights_of(model)
    name = "bert.encoder.layer.0.output.dense.weight"
    weights[name][0, 0] = float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    result = cli("prune", model, "--sparsity", 0.5, "--out", "o")
    assert result.code == 3 and name in result.err and "--allow-nonfinite" in result.err
