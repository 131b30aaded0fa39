"""`fishertool prune` of stacks: all experts of a layer in one tensor, each a matrix of its own."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Cli, Estimate, make_text, make_tokenizer, write_rows
from safetensors import safe_open
from test_factorize_selection import save_stacks
from test_prune_command import add_mean_gradient, interrupted, smallest, weights_of
from tiny import _decoder
from torch import Tensor

from fishertool.checkpoint.reader import open_checkpoint
from fishertool.surgery import prune_run
from fishertool.surgery.prune_statistics import Statistics, open_kind

GATE_UP, DOWN = (f"model.layers.0.mlp.experts.{name}_proj" for name in ("gate_up", "down"))
STACKS = "*.mlp.experts.*_proj"


@pytest.fixture
def stacks(tmp_path: Path) -> Path:
    """A GPT-OSS, whose stacks are [expert, in, out]."""
    return save_stacks(tmp_path / "m")


def save_both(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """One mixture with a tensor for every expert's matrix, and with stacks."""
    torch.manual_seed(seed)
    experts = {"num_experts": 16, "num_experts_per_tok": 1, "moe_intermediate_size": 12}
    made: Any = _decoder("Qwen3Moe", head_dim=8, **experts)()
    for name, apart in (("apart", True), ("stacked", False)):
        made.save_pretrained(folder / name, save_original_format=apart)
        make_tokenizer(template=False).save_pretrained(folder / name)
    assert GATE_UP in weights_of(folder / "stacked")
    return folder / "apart", folder / "stacked"


@pytest.fixture
def both(tmp_path: Path) -> tuple[str, str]:
    save_both(tmp_path)
    return "apart", "stacked"


def loaded(folder: Path) -> dict[str, Tensor]:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    found: dict[str, Tensor] = model.state_dict()
    return found


@pytest.mark.parametrize(
    "flags",
    [
        "--method magnitude --sparsity 0.6 --budget row",
        "--method magnitude --sparsity 0.6 --budget global",
        "--method magnitude --sparsity 0.6 --include *.down_proj*",
        "--method magnitude --pattern 2:4",
        "--method fisher --sparsity 0.5 --data data.jsonl",
        "--method fisher --sparsity 0.5 --budget global --data data.jsonl",
        "--method fisher --pattern 1:4 --data data.jsonl --steps 2",
        "--method obs --sparsity 0.5 --budget tensor --include *.down_proj* --data data.jsonl",
        "--method obs --pattern 2:4 --include *.down_proj* --compensate joint --data data.jsonl",
        "--method mfac --sparsity 0.5 --include *.down_proj* --data data.jsonl --steps 2",
        "--method fisher --sparsity 0.5 --include *.down_proj* --compensate auto --data data.jsonl",
        "--method wanda --sparsity 0.5 --data data.jsonl",
        "--method wanda --pattern 2:4 --data data.jsonl --steps 2",
        "--method sparsegpt --sparsity 0.5 --include *.down_proj* --data data.jsonl --steps 2",
        "--method sparsegpt --pattern 2:4 --data data.jsonl",
    ],
)
def test_stacks_are_pruned_as_the_same_experts_apart(
    cli: Cli, both: tuple[str, str], data: Path, tmp_path: Path, flags: str
) -> None:
    """Where no budget and no block is of gate and up together, which are two matrices apart."""
    pruned, summaries, stay = [], [], []
    for model in both:
        result = cli("prune", model, *flags.split(), "--out", f"{model}-out", "--json")
        assert result.code == 0, result.err
        pruned.append(loaded(tmp_path / f"{model}-out"))
        summaries.append(result.report["summary"])
        rows = result.report["tensors"]
        stay.append([row for row in rows if row.get("why", "").startswith("an expert that no")])
    one, other = pruned
    assert one.keys() == other.keys()
    for name, values in one.items():
        assert torch.equal(other[name] == 0, values == 0), name
        if "auto" not in flags:  # which goes by what was decided on those before, in file order
            torch.testing.assert_close(other[name], values, rtol=1e-5, atol=1e-7)
    assert summaries[0]["weights_pruned"] == summaries[1]["weights_pruned"] > 0
    if "--data" in flags:
        down = [[row for row in rows if "down_proj" in row["name"]] for rows in stay]
        assert len(down[0]) == len(down[1]) > 0
        whole = weights_of(tmp_path / "stacked")
        for row in stay[1]:
            name, expert = row["name"].removesuffix("]").split("[")
            assert torch.equal(other[name][int(expert)], whole[name][int(expert)])


@pytest.mark.parametrize("budget", ["tensor", "row", "global"])
def test_every_expert_has_a_budget_along_its_own_inputs(
    cli: Cli, stacks: Path, tmp_path: Path, budget: str
) -> None:
    flags = ("--sparsity", 0.3, "--budget", budget, "--include", STACKS, "--json")
    result = cli("prune", stacks, *flags, "--out", "o")
    assert result.code == 0, result.err
    before, after = weights_of(stacks), weights_of(tmp_path / "o")
    shapes = {name: before[name].shape for name in (GATE_UP, DOWN)}
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - shapes.keys())
    if budget == "global":
        sizes = torch.cat([before[name].abs().flatten() for name in shapes])
        mask = smallest(sizes, int(0.3 * len(sizes) + 0.5))
        found = torch.cat([after[name].flatten() for name in shapes])
        assert torch.equal(found != 0, mask)
    for name, (experts, width, out) in shapes.items() if budget != "global" else ():
        for expert in range(experts):
            sizes = before[name][expert].T.abs()
            parts = [sizes] if budget == "tensor" else list(sizes)
            count = int(0.3 * (width * out if budget == "tensor" else width) + 0.5)
            mask = torch.stack([smallest(part, count) for part in parts]).reshape(out, width)
            expected = torch.where(mask.T, before[name][expert], 0)
            assert torch.equal(after[name][expert], expected)
    rows = {row["name"]: row for row in result.report["tensors"]}
    assert rows[f"{GATE_UP}[3]"]["shape"] == [16, 24] and rows[f"{GATE_UP}[3]"]["action"] == "prune"
    assert rows[f"{DOWN}[0]"]["kept"] == int((after[DOWN][0] != 0).sum())
    assert GATE_UP not in rows and rows[f"{GATE_UP}_bias"]["why"] == "no linear weight"
    forecast = cli("prune", stacks, *flags, "--out", "p", "--dry-run").report["summary"]
    assert forecast["weights_to_prune"] == result.report["summary"]["weights_pruned"]
    by_kind = result.report["summary"]["sparsity_by_kind"]
    assert f"{DOWN.replace('.0.', '.*.')}[*]" in by_kind


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_fisher_of_a_turned_stack(
    cli: Cli, stacks: Path, estimated: Estimate, tmp_path: Path, pattern: str
) -> None:
    """In float64, expert by expert, output by output."""
    fisher = estimated(stacks, "diagonal")
    sparsity = () if ":" in pattern else ("--sparsity", 0.5)
    flags = ("--method", "fisher", "--fisher", fisher, "--pattern", pattern, *sparsity)
    result = cli("prune", stacks, *flags, "--include", STACKS, "--out", "o", "--json")
    assert result.code == 0, result.err
    with open_checkpoint(fisher, "diagonal") as sidecar:
        values = {name: sidecar[name].double() for name in (GATE_UP, DOWN)}
    before, after = weights_of(stacks), weights_of(tmp_path / "o")
    reached = [e for e in range(4) if float(values[DOWN][e].sum()) > 0]
    assert reached
    for name, whole in values.items():
        for expert in reached:
            weight = before[name][expert].T.double()
            saliency = weight**2 * whole[expert].T
            group = 4 if ":" in pattern else weight.shape[1]
            parts = saliency.reshape(-1, group)
            mask = torch.stack([smallest(part, group // 2) for part in parts])
            expected = torch.where(mask.reshape(weight.shape).T, before[name][expert], 0)
            assert torch.equal(after[name][expert], expected), (name, expert)


def test_obs_of_a_turned_stack(cli: Cli, stacks: Path, estimated: Estimate, tmp_path: Path) -> None:
    """By a dense inverse for every output of every expert."""
    fisher = estimated(stacks, "rank-one")
    flags = ("--method", "obs", "--fisher", fisher, "--sparsity", 0.5, "--budget", "row")
    more = ("--compensate", "none", "--include", DOWN, "--out", "o", "-q")
    assert cli("prune", stacks, *flags, *more).code == 0
    with open_checkpoint(fisher, "rank-one") as sidecar:
        bank = sidecar[DOWN].double()  # [member, expert, in, out]
    before, after = weights_of(stacks)[DOWN], weights_of(tmp_path / "o")[DOWN]
    for expert in range(4):
        rows = bank[:, expert].mT
        damping = 1e-3 * rows.square().mean(0).mean()
        assert damping > 0
        for output in range(rows.shape[1]):
            part = rows[:, output]
            full = part.T @ part / len(part) + damping * torch.eye(part.shape[1]).double()
            weight = before[expert, :, output]
            saliency = weight.double() ** 2 / torch.linalg.inv(full).diagonal()
            mask = smallest(saliency, len(weight) // 2)
            assert torch.equal(after[expert, :, output], torch.where(mask, weight, 0))


def test_gaprune_of_a_stack(cli: Cli, stacks: Path, tmp_path: Path) -> None:
    """The cosine is of one expert's mean gradients."""
    means = []
    for number in range(2):
        path, out = tmp_path / f"{number}.jsonl", f"f{number}"
        write_rows(path, [{"text": make_text(20 * number + n, 8)} for n in range(8)])
        assert cli("estimate-fisher", stacks, "--data", path, "--out", out, "-q").code == 0
        means.append(add_mean_gradient(tmp_path / f"f{number}", number)[DOWN].double())
    flags = ("--method", "gaprune", "--fisher", "f0", "--general-fisher", "f1", "--sparsity", 0.5)
    more = ("--set", "alpha=0.9", "--budget", "global", "--include", DOWN, "--out", "o", "--json")
    result = cli("prune", stacks, *flags, *more)
    assert result.code == 0, result.err
    with open_checkpoint(tmp_path / "f0", "diagonal") as one:
        domain = one[DOWN].double()
    with open_checkpoint(tmp_path / "f1", "diagonal") as one:
        general = one[DOWN].double()
    size = weights_of(stacks)[DOWN].double().abs()
    told = [expert for expert in range(4) if float(domain[expert].sum()) > 0]
    cosines = torch.cosine_similarity(means[0].flatten(1), means[1].flatten(1))
    saliency = (domain - general) * size + 0.5 * size.sqrt()
    saliency = (saliency * (1 + 0.9 * cosines[:, None, None]))[told]
    mask = smallest(saliency, saliency.numel() // 2)
    assert torch.equal(weights_of(tmp_path / "o")[DOWN][told] != 0, mask)


def test_a_resumed_run_knows_the_experts_that_stay(
    cli: Cli, both: tuple[str, str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And trains with the masks of the others, which it saves."""
    flags = ("--method", "fisher", "--sparsity", 0.5, "--data", data, "--include", STACKS)
    command = ("prune", both[1], *flags, "--recover-steps", 2, "--save-mask", "--out", "o")
    with monkeypatch.context() as patch:
        patch.setattr("fishertool.commands.prune._write", interrupted)
        assert cli(*command, "--resume").code == 130
    result = cli(*command, "--resume", "--json")
    assert result.code == 0, result.err
    rows = {row["name"]: row for row in result.report["tensors"]}
    stay = [name for name, row in rows.items() if row.get("why", "").startswith("an expert that")]
    [warning] = [one for one in result.report["warnings"] if "no token of the data" in one]
    assert f"reached {stay[0]}, " in warning and stay[0].endswith("]")
    after = weights_of(tmp_path / "o")
    with safe_open(tmp_path / "o" / "pruning_mask.safetensors", "pt") as file:
        shapes = json.loads(file.metadata()["fishertool.mask"])["shapes"]
        packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, shape in shapes.items():
        assert shape == list(after[name].shape)
        bits = (packed[name][:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        mask = bits.flatten()[: after[name].numel()].reshape(shape).bool()
        assert torch.equal(mask, after[name] != 0)
        for expert in range(16):
            kept = 1.0 if f"{name}[{expert}]" in stay else 0.5
            assert float(mask[expert].double().mean()) == kept
    moved = [
        name for name in shapes if not torch.equal(after[name], weights_of(Path(both[1]))[name])
    ]
    assert moved == list(shapes)
    loaded(tmp_path / "o")


def test_stacks_that_a_factored_fisher_sums_over_stay(
    cli: Cli, stacks: Path, estimated: Estimate
) -> None:
    fisher = estimated(stacks, "factored")
    command = ("prune", stacks, "--method", "fisher", "--sparsity", 0.5, "--fisher", fisher)
    result = cli(*command, "--out", "o", "--json")
    assert result.code == 0, result.err
    [warning] = [one for one in result.report["warnings"] if "stack of experts" in one]
    why = "over which a factored Fisher is summed"
    assert f"{DOWN}, {GATE_UP}, " in warning and f"{why}; a diagonal tells" in warning
    result = cli(*command, "--include", STACKS, "--out", "p")
    assert result.code == 2 and why in result.err


@pytest.mark.parametrize(
    ("method", "kind"), [("fisher", "diagonal"), ("wanda", "activation"), ("obs", "rank-one")]
)
def test_a_stack_that_a_sidecar_has_not_is_refused(
    cli: Cli, stacks: Path, data: Path, method: str, kind: str
) -> None:
    told = ("--data", data, "--kind", kind, "--exclude", DOWN, "--out", "f", "-q")
    assert cli("estimate-fisher", stacks, *told).code == 0
    flags = ("--method", method, "--fisher", "f", "--sparsity", 0.5, "--out", "o")
    result = cli("prune", stacks, *flags)
    assert result.code == 3 and f"has no {kind} statistic of {DOWN}; leave" in result.err


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("kind", [0, 1])
def test_experts_that_a_later_step_does_not_reach_go_by_size(
    cli: Cli,
    both: tuple[str, str],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    kind: int,
) -> None:
    model = both[kind]
    few = ("--kind", "activation", "--num-examples", 1, "--data", data, "--out", "few", "-q")
    assert cli("estimate-fisher", model, *few).code == 0
    estimated, halves = prune_run._estimated, dict[str, Tensor]()

    def later_by_few(opened: ExitStack, trial: Any, recipe: Any, here: Path, track: Any) -> Any:
        if here.name == "step-1":
            return estimated(opened, trial, recipe, here, track)
        with open_checkpoint(here.with_name("step-1") / "pruned", "tensors") as pruned:
            halves.update((name, pruned[name]) for name in pruned)
        few = tmp_path / "few"
        return Statistics({kind: open_kind(opened, few, kind) for kind in recipe.kinds})

    monkeypatch.setattr(prune_run, "_estimated", later_by_few)
    flags = ("--method", method, "--data", data, "--include", "*.down_proj*", "--steps", 2)
    more = ("--budget", "row", "--compensate", "none", "--out", "o", "--json")
    result = cli("prune", model, *flags, "--sparsity", 0.75, *more)
    assert result.code == 0, result.err
    pruned = {row["name"]: row for row in result.report["tensors"] if row["action"] == "prune"}
    after, unseen = weights_of(tmp_path / "o"), 0
    with open_checkpoint(tmp_path / "few", "activation") as tensors:
        for name in pruned:
            tensor, _, expert = name.removesuffix("]").partition("[")
            own = int(expert) if expert else ...
            stored = f"{tensor}#input"
            if stored in tensors and bool(tensors[stored][own].any()):
                continue
            unseen += 1
            mask = torch.stack([smallest(row, 9) for row in halves[name].abs()])
            assert torch.equal(after[tensor][own] != 0, mask), name
    assert 0 < unseen < len(pruned)


def test_a_pattern_that_does_not_divide_a_stack_names_it_once(cli: Cli, stacks: Path) -> None:
    result = cli("prune", stacks, "--pattern", "2:5", "--include", STACKS, "--out", "o")
    assert result.code == 3
    assert f"does not divide {DOWN} [16, 12], {GATE_UP} [24, 16]; leave" in result.err
