"""Units chosen with what the others make up for in mind, and the Fisher of columns behind that."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MAKERS, Cli, make_text, make_tokenizer, write_rows
from test_fisher_diagonal import randomize
from test_structured import FAMILIES, loaded_from
from torch import Tensor

from fishertool.fisher.column_blocks import ColumnBlocks, column_blocks
from fishertool.fisher.gradients import Gradient, OuterProducts, ScatteredRows, Whole
from fishertool.pruning.parts import elimination
from fishertool.pruning.parts.elimination import left_by_elimination
from fishertool.pruning.parts.units import complement, features_of
from fishertool.surgery.shrink import gather
from fishertool.surgery.shrink_plan import ShrinkRecipe, plan_shrink


def layer(units: int, features: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, moments of inputs that go together, and of outputs."""
    generator = torch.Generator().manual_seed(seed)
    side = units * features

    def moments(side: int) -> Tensor:
        rows = torch.randn(40, side, generator=generator)
        rows = rows @ torch.randn(side, side, generator=generator)
        return (rows.T @ rows / 40).double()

    return torch.randn(6, side, generator=generator), moments(side), moments(6)


def least_loss(weight: Tensor, inputs: Tensor, outputs: Tensor, gone: Tensor) -> float:
    """The minimum of vec(change)^T (outputs kron inputs) vec(change), by least squares."""
    factor = torch.linalg.cholesky(torch.kron(outputs, inputs)).T
    free = torch.ones_like(weight, dtype=torch.bool)
    free[:, gone] = False
    free = free.flatten()
    lost = factor[:, ~free] @ weight.double().flatten()[~free]
    change = torch.linalg.lstsq(factor[:, free], lost.unsqueeze(1)).solution.squeeze(1)
    return float((factor[:, free] @ change - lost).square().sum())


@pytest.mark.parametrize(("units", "features", "count"), [(12, 1, 7), (5, 3, 2), (5, 4, 3)])
@pytest.mark.parametrize("damping", [0.02, 0.5])
def test_again_and_again_the_one_that_costs_least(
    units: int, features: int, count: int, damping: float
) -> None:
    weight, inputs, outputs = given = layer(units, features)
    damped = inputs + damping * inputs.diagonal().mean() * torch.eye(len(inputs)).double()
    left, gone = list(range(units)), list[int]()
    while len(left) > count:
        losses = [
            least_loss(weight, damped, outputs, features_of(torch.tensor([*gone, unit]), features))
            for unit in left
        ]
        gone.append(left.pop(losses.index(min(losses))))
    before = [one.clone() for one in given]
    assert left_by_elimination(*given, count, features, damping).tolist() == left
    assert all(map(torch.equal, given, before))


def test_several_at_a_time_lose_hardly_more(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs, outputs = layer(100, 1)
    inputs += 0.1 * torch.eye(100).double()
    losses = []
    for step in (1, elimination.STEP):
        monkeypatch.setattr(elimination, "STEP", step)
        kept = left_by_elimination(weight, inputs, outputs, 40, 1, damping=1e-6)
        losses.append(least_loss(weight, inputs, outputs, complement(kept, 100)))
    assert losses[1] < 1.2 * losses[0]
    worst = least_loss(weight, inputs, outputs, weight.norm(dim=0).argsort()[:60])
    assert losses[1] < 0.5 * worst


def test_of_two_that_stand_in_for_each_other_one_goes() -> None:
    rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double()
    rows = torch.cat([rows, rows[:, :1]], 1)  # the last unit is the first again
    weight = torch.tensor([[3.0, 1.0, 1.5, 3.0]])
    kept = left_by_elimination(weight, rows.T @ rows, torch.eye(1), 3, 1, damping=1e-3)
    assert kept.tolist() == [1, 2, 3]


@pytest.mark.parametrize("units", [1, 2, 63, 64])
def test_all_stay_where_all_are_asked_for(units: int) -> None:
    assert left_by_elimination(*layer(units, 1), units, 1).tolist() == list(range(units))


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 1), (1, 0)])
def test_moments_of_zeros_are_refused(inputs: int, outputs: int) -> None:
    with pytest.raises(ValueError, match="zero everywhere"):
        left_by_elimination(torch.ones(2, 3), inputs * torch.eye(3), outputs * torch.eye(2), 1, 1)


@pytest.mark.parametrize("turned", [False, True])
def test_column_blocks_of_every_form_of_a_gradient(turned: bool) -> None:
    """And of a layer that was called twice."""
    generator = torch.Generator().manual_seed(0)
    x, delta = (torch.randn(3, 4, n, generator=generator) for n in (6, 5))
    again, other = (torch.randn(3, 1, n, generator=generator) for n in (6, 5))
    whole = torch.randn(3, 5, 6, generator=generator)

    def outer(x: Tensor, delta: Tensor) -> OuterProducts:
        return OuterProducts(x, delta, True) if turned else OuterProducts(delta, x)

    dense = Whole(whole.mT.contiguous() if turned else whole)
    cases: list[tuple[list[Gradient], Tensor]] = [
        ([outer(x, delta)], delta.mT @ x),
        ([outer(x, delta), outer(again, other)], delta.mT @ x + other.mT @ again),
        ([dense], whole),
        ([outer(x, delta), dense], delta.mT @ x + whole),
    ]
    for parts, gradients in cases:
        blocks = ColumnBlocks({"w": dense.values[0]}, turned)
        blocks.add("w", parts)
        blocks.add("w", parts)
        expected = 2 * (gradients.double() @ gradients.double().mT).sum(0)
        torch.testing.assert_close(blocks.sums["w"], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="ScatteredRows is no gradient of a linear layer"):
        column_blocks([ScatteredRows(torch.zeros(1, 1), torch.zeros(1, 1, 1))], False)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    write_rows(path, [{"text": make_text(n, 3 + n % 6), "label": n % 3} for n in range(16)])
    return path


def saved(folder: Path, kind: str) -> Path:
    torch.manual_seed(0)
    model: Any = randomize(FAMILIES[kind]())
    model.save_pretrained(folder)
    make_tokenizer(template=kind == "bert").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "pattern"), [("bert", "neurons"), ("gpt2", "neurons"), ("llama-each", "heads")]
)
def test_column_blocks_are_those_of_autograd(
    tmp_path: Path, texts: Path, kind: str, pattern: str
) -> None:
    folder = saved(tmp_path / kind, kind)
    with ExitStack() as opened:
        recipe = ShrinkRecipe(pattern, 0.5, "obs", "joint")
        plan = plan_shrink(opened, str(folder), recipe, 1 << 40, True)
        loaded = loaded_from(opened, folder, texts, "empirical")
        found = gather(plan, loaded, lambda count: None).outputs
        loaded.module.double()
        count = len(loaded.texts.examples)
        expected: dict[str, Tensor] = {}
        for n in range(count):
            batch = loaded.batch([n])
            log_p = torch.log_softmax(loaded.module(**batch.inputs).logits.double(), -1)
            score = log_p.gather(-1, batch.targets.unsqueeze(-1))[..., 0][batch.scored].sum()
            names = list(found)
            weights = [loaded.parameters[name] for name in names]
            for name, one in zip(names, torch.autograd.grad(score, weights), strict=True):
                gradient = one.T if plan.units.turned else one
                block = gradient @ gradient.T / count
                expected[name] = expected.get(name, 0) + block
    assert len(expected) == len(plan.units.blocks)
    for name, block in expected.items():
        assert float((found[name] - block).norm() / block.norm()) < 1e-5, name


@pytest.mark.parametrize(("kind", "pattern"), [("bert", "neurons"), ("llama-each", "heads")])
def test_the_command(cli: Cli, tmp_path: Path, texts: Path, kind: str, pattern: str) -> None:
    folder = saved(tmp_path / kind, kind)
    flags = ("--pattern", pattern, "--sparsity", "0.5", "--data", str(texts), "--json")
    result = cli("prune", str(folder), *flags, "--method", "obs", "--out", "obs")
    assert result.code == 0, result.err
    summary = result.report["summary"]
    assert summary["method"] == "obs" and summary["compensate"] == "joint"
    assert result.report["evaluation"]["losses"].keys() == {"dense", "none", "joint"}
    assert cli("verify", "obs").code == 0
    found = cli("prune", str(folder), *flags, "--method", "obs", "--set", "rearrange=false",
                "--out", "other")  # fmt: skip
    assert found.code == 2 and "method obs of --pattern" in found.err
    found = cli("prune", str(folder), *flags[:4], "--method", "obs", "--out", "other")
    assert found.code == 2 and "give --data" in found.err


def test_a_model_without_gradients(cli: Cli, tmp_path: Path, texts: Path) -> None:
    torch.manual_seed(0)
    model: Any = randomize(MAKERS["bert"]())
    torch.nn.init.zeros_(model.classifier.weight)
    model.save_pretrained(tmp_path / "flat")
    make_tokenizer(template=True).save_pretrained(tmp_path / "flat")
    flags = ("--pattern", "neurons", "--sparsity", "0.5", "--data", str(texts), "--method", "obs")
    result = cli("prune", str(tmp_path / "flat"), *flags, "--out", "out")
    assert (
        result.code == 3
        and "gradients are zero in every example" in result.err
        and not Path("out").exists()
    )
