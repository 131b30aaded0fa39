"""`estimate-fisher --from-optimizer`: Adam's second moments under the names on disk, or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Cli, ModelMaker, make_tokenizer
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES

from fishertool.sidecar import open_sidecar

BETA2, STEPS = 0.9, 3


@pytest.fixture
def model(make_model: ModelMaker) -> Path:
    return make_model("m", "gpt2")


def train(folder: Path, split: bool, named: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """A few steps of AdamW: its state, and the second moments by the definition."""
    module = transformers.AutoModelForCausalLM.from_pretrained(folder)
    parameters = dict(module.named_parameters())
    matrices = [item for item in parameters.items() if item[1].dim() > 1]
    rest = [item for item in parameters.items() if item[1].dim() < 2]
    groups = [matrices, rest] if split else [list(parameters.items())]
    optimizer = torch.optim.AdamW(
        [{"params": g if named else [value for _, value in g]} for g in groups],
        lr=1e-3,
        betas=(0.8, BETA2),
    )
    expected = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for step in range(STEPS):
        optimizer.zero_grad()
        ids = torch.randint(4, 20, (2, 6), generator=torch.Generator().manual_seed(step))
        module(input_ids=ids, labels=ids).loss.backward()
        for name, value in parameters.items():
            assert value.grad is not None
            expected[name] = BETA2 * expected[name] + (1 - BETA2) * value.grad.square()
        optimizer.step()
    corrected = {name: value / (1 - BETA2**STEPS) for name, value in expected.items()}
    return optimizer.state_dict(), corrected


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_moments_are_found_by_order_or_name(
    cli: Cli, model: Path, tmp_path: Path, split: bool, named: bool
) -> None:
    state, expected = train(model, split, named)
    torch.save(state, tmp_path / "optimizer.pt")
    flags = ("--from-optimizer", "optimizer.pt", "--kind", "diagonal,factored", "--json")
    result = cli("estimate-fisher", model, *flags, "--out", "f")
    assert result.code == 0, result.err
    assert result.report["summary"]["estimator"] == "adam"
    found = load_file(tmp_path / "f" / "diagonal.safetensors")
    assert set(found) == set(expected)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-12)
    factored = load_file(tmp_path / "f" / "factored.safetensors")
    name = "transformer.h.0.mlp.c_fc.weight"
    torch.testing.assert_close(factored[f"{name}#rows"], expected[name].sum(1), rtol=1e-4, atol=0)
    tensors, header = open_sidecar(tmp_path / "f")
    tensors.close()
    assert (header.estimator, header.unit, header.statistics[name].standard_error) == (
        "adam", "batch", None,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
@pytest.mark.parametrize("named", [False, True])
def test_moments_of_fused_experts_are_parted_as_on_disk(
    cli: Cli, tmp_path: Path, kind: str, named: bool
) -> None:
    folder = tmp_path / "m"
    torch.manual_seed(0)
    model = ARCHITECTURES[kind]()
    model.save_pretrained(folder)
    make_tokenizer(template=False).save_pretrained(folder)
    state, expected = train(folder, split=False, named=named)
    torch.save(state, tmp_path / "optimizer.pt")
    result = cli("estimate-fisher", folder, "--from-optimizer", "optimizer.pt", "--out", "f", "-q")
    assert result.code == 0, result.err
    found = load_file(tmp_path / "f" / "diagonal.safetensors")
    assert set(found) == set(load_file(folder / "model.safetensors"))
    model.save_pretrained(tmp_path / "e", state_dict=expected)  # parts them as it does weights
    for name, value in load_file(tmp_path / "e" / "model.safetensors").items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-12)


def test_a_moment_of_other_experts_is_refused(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    ARCHITECTURES["qwen3-moe"]().save_pretrained(folder)
    make_tokenizer(template=False).save_pretrained(folder)
    state, _ = train(folder, split=False, named=True)
    names = state["param_groups"][0]["param_names"]
    stack = names.index("model.layers.0.mlp.experts.down_proj")
    state["state"][stack]["exp_avg_sq"] = torch.ones(3, 16, 12)
    torch.save(state, tmp_path / "optimizer.pt")
    result = cli("estimate-fisher", folder, "--from-optimizer", "optimizer.pt", "--out", "f")
    told = "of model.layers.0.mlp.experts.down_proj is [3, 16, 12], the weight [4, 16, 12]"
    assert (result.code, told in result.err) == (3, True), result.err


@pytest.mark.parametrize("key", ["{}", "exp_avg_sq.{}", "{}.exp_avg_sq"])
def test_moments_in_safetensors(cli: Cli, model: Path, tmp_path: Path, key: str) -> None:
    weights = load_file(model / "model.safetensors")
    moments = {name: torch.rand_like(value) for name, value in weights.items()}
    other = {"exp_avg." + name: value for name, value in weights.items()}
    save_file(
        {**{key.format(n): v for n, v in moments.items()}, **other}, tmp_path / "o.safetensors"
    )
    result = cli("estimate-fisher", model, "--from-optimizer", "o.safetensors", "--out", "f")
    assert result.code == 0, result.err
    found = load_file(tmp_path / "f" / "diagonal.safetensors")
    assert all(torch.equal(found[name], value) for name, value in moments.items())


def _less(state: dict[str, Any]) -> None:
    state["param_groups"][0]["params"].pop()


def _negative(state: dict[str, Any]) -> None:
    state["state"][0]["exp_avg_sq"][0, 0] = -1.0


def _absent(state: dict[str, Any]) -> None:
    del state["state"][2]


def _sgd(state: dict[str, Any]) -> None:
    for one in state["state"].values():
        del one["exp_avg_sq"]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_less, "are not the model's"),
        (_negative, "wte.weight is negative or not finite"),
        (_absent, "has no second moment of transformer.h.0.ln_1.weight"),
        (_sgd, "not the saved state of an Adam optimizer"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(
    cli: Cli, model: Path, tmp_path: Path, spoil: Any, told: str
) -> None:
    state, _ = train(model, split=False)
    spoil(state)
    torch.save(state, tmp_path / "optimizer.pt")
    result = cli("estimate-fisher", model, "--from-optimizer", "optimizer.pt", "--out", "f")
    assert (result.code, told in result.err) == (3, True), result.err
    assert not (tmp_path / "f").exists()


class Evil:
    def __reduce__(self) -> Any:
        return print, ("run",)


def test_code_in_a_pickle_is_not_run(
    cli: Cli, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state": Evil(), "param_groups": []}, tmp_path / "optimizer.pt")
    result = cli("estimate-fisher", model, "--from-optimizer", "optimizer.pt", "--out", "f")
    assert (result.code, result.out) == (3, "")
    for flags in ((), ("--dry-run",)):
        result = cli("estimate-fisher", model, "--from-optimizer", "none.pt", "--out", "f", *flags)
        assert (result.code, "none.pt: no such file" in result.err) == (3, True)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--kind", "rank-one"), "gives a diagonal or factored Fisher, not rank-one"),
        (("--labels", "sampled"), "--labels means nothing with --from-optimizer"),
        (("--data", "d.jsonl"), "--data means nothing with --from-optimizer"),
    ],
)
def test_flags_that_mean_nothing_are_refused(
    cli: Cli, model: Path, flags: tuple[str, ...], told: str
) -> None:
    result = cli("estimate-fisher", model, "--from-optimizer", "o.pt", *flags, "--out", "f")
    assert (result.code, told in result.err) == (2, True), result.err


def test_without_data_there_is_nothing_to_estimate_from(cli: Cli, model: Path) -> None:
    result = cli("estimate-fisher", model, "--out", "f")
    assert (result.code, "needs --data, or --from-optimizer" in result.err) == (2, True)


def test_a_loss_of_batches_is_not_predicted_nor_mixed_with_one_of_examples(
    cli: Cli, model: Path, make_model: ModelMaker, tmp_path: Path
) -> None:
    other = make_model("n", "gpt2", seed=1)
    (tmp_path / "texts.txt").write_text("the red cat runs\na big dog eats\n")
    for one, out in ((model, "f"), (other, "g")):
        torch.save(train(one, split=False)[0], tmp_path / "optimizer.pt")
        flags = ("--from-optimizer", "optimizer.pt", "--out", out)
        assert cli("estimate-fisher", one, *flags).code == 0
    assert cli("estimate-fisher", other, "--data", "texts.txt", "--out", "h").code == 0
    merge = ("merge", model, other, "--fisher", "f", "--json", "--out")
    result = cli(*merge, "o", "--fisher", "g", "--weights", "optimal")
    assert result.code == 0, result.err
    assert result.report["summary"]["predicted_loss"] is None
    refused = cli(*merge, "p", "--fisher", "g", "--predict")
    assert refused.code == 2 and "an optimizer's is of batches" in refused.err
    refused = cli(*merge, "p", "--fisher", "h", "--weights", "optimal")
    assert refused.code == 2 and "for each model, of one unit" in refused.err
