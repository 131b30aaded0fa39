"""What each step of `fishertool prune --steps` decides, by what the steps before it left."""

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Cli, ModelMaker
from safetensors.torch import load_file, save_file
from test_prune_command import SPREAD
from torch import Tensor

from fishertool.errors import InputError
from fishertool.surgery import prune_moves, prune_run, prune_step


@pytest.fixture
def model(make_model: ModelMaker) -> Path:
    return make_model("model", spread=SPREAD)


class Watched:
    """What every step left, and the bank that it went by."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.left: list[dict[str, Tensor]] = []
        self.banks: list[dict[str, Tensor]] = []
        run_step = prune_step.run_step

        def watched(step: Any, place: Path, advance: Any) -> Path:
            folder = run_step(step, place, advance)
            self.left.append(load_file(folder / "tensors.safetensors"))
            if (bank := place / "fisher" / "rank-one.safetensors").exists():
                self.banks.append(load_file(bank))
            return folder

        monkeypatch.setattr(prune_run, "run_step", watched)


def least(groups: list[list[int]], count: int, rise: Callable[[list[int]], float]) -> list[int]:
    """Of each group the `count` places of least rise together."""
    best = (min(map(list, itertools.combinations(one, count)), key=rise) for one in groups)
    return [place for one in best for place in one]


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize(
    ("flags", "block", "update"),
    [
        ("--method obs --sparsity 0.8 --block 8", 8, "summed"),
        ("--method obs --pattern 1:8 --block 16", 16, "joint"),
        ("--method mfac --sparsity 0.8 --block 16", 16, "none"),
        ("--method mfac --sparsity 0.8", None, "summed"),
    ],
)
def test_a_later_step_finds_the_optimum_among_what_is_left(
    cli: Cli,
    make_model: ModelMaker,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: str,
    block: int | None,
    update: str,
    kind: str,
) -> None:
    """What is gone is held: F is restricted to the rest, in dense float64, and then inverted."""
    model, seen = make_model("m", kind, spread=SPREAD), Watched(monkeypatch)
    glob = "*layer.0.output.dense.weight" if kind == "bert" else "*h.0.attn.c_proj.weight"
    more = ("--steps", 2, "--compensate", update, "--include", glob, "--data", data, "--out", "o")
    result = cli("prune", model, *flags.split(), *more, "-q")
    assert result.code == 0, result.err
    [name] = seen.banks[1]
    turn: Callable[[Tensor], Tensor] = (lambda one: one.mT) if kind == "gpt2" else (lambda one: one)
    weight, found = (turn(one[name]).flatten().double() for one in seen.left)
    gone, new = (~turn(one[f"{name}#mask"]).flatten() for one in seen.left)
    rows = turn(seen.banks[1][name]).flatten(1).double()
    full = rows.T @ rows / len(rows)
    size = len(weight)
    places = torch.arange(size) // (block or size)
    full *= places[:, None] == places
    full += 1e-3 * full.diagonal().mean() * torch.eye(size, dtype=torch.float64)

    left = (~gone).nonzero().flatten()
    w, f = weight[left], full[left][:, left]
    inverse = torch.linalg.inv(f)
    if "1:8" in flags:
        groups = [(left // 8 == group).nonzero().flatten().tolist() for group in range(size // 8)]
        chosen = least(
            groups, 2, lambda q: float(w[q] @ torch.linalg.solve(inverse[q][:, q], w[q]))
        )
    else:
        rises = w.square() / inverse.diagonal()
        chosen = rises.argsort()[: round(0.8 * size) - int(gone.sum())].tolist()
    q = torch.zeros_like(left, dtype=torch.bool)
    q[chosen] = True
    assert torch.equal(new[left], q) and bool(new[gone].all())
    moves = torch.zeros_like(w)
    if update == "summed":
        moves = -inverse[:, q] @ (w / inverse.diagonal())[q]
    elif update == "joint":
        moves[~q] = torch.linalg.solve(f[~q][:, ~q], f[~q][:, q] @ w[q])
    expected = torch.zeros_like(weight)
    expected[left] = torch.where(q, 0.0, w + moves)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["obs", "mfac"])
def test_saliencies_of_a_very_confident_model_do_not_vanish(
    cli: Cli, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Its gradients are of 1e-26, their squares below what float32 holds."""
    weights = load_file(model / "model.safetensors")
    weights["classifier.bias"] = torch.tensor([60.0, 0.0, 0.0])
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    seen, name = Watched(monkeypatch), "bert.encoder.layer.0.output.dense.weight"
    flags = ("--method", method, "--block", 16, "--sparsity", 0.5, "--labels", "sampled")
    result = cli("prune", model, *flags, "--data", data, "--out", "o", "-q")
    assert result.code == 0, result.err
    rows = seen.banks[0][name].double().reshape(-1, 32, 16)
    assert 0 < float(rows.square().mean()) < 1e-46
    full = torch.einsum("mbi,mbj->bij", rows, rows) / len(rows)
    damping = 1e-3 * full.diagonal(dim1=1, dim2=2).mean()
    inverse = torch.linalg.inv(full + damping * torch.eye(16, dtype=torch.float64))
    rises = weights[name].double().flatten().square() / inverse.diagonal(dim1=1, dim2=2).flatten()
    pruned = (~seen.left[0][f"{name}#mask"]).flatten().nonzero().flatten()
    assert set(pruned.tolist()) == set(rises.argsort()[:256].tolist())


@pytest.mark.parametrize(
    "flags",
    [
        "--method obs --compensate joint --sparsity 0.5",
        "--method obs --pattern 1:4 --steps 2",
        "--method mfac --block 16 --sparsity 0.5 --budget global --normalize mean",
        "--method fisher --sparsity 0.5",
        "--method magnitude --compensate auto --sparsity 0.5",
    ],
)
def test_a_matrix_of_which_the_fisher_tells_nothing_goes_by_magnitude(
    cli: Cli, model: Path, data: Path, tmp_path: Path, flags: str
) -> None:
    """Nothing that the first layer of the last feed-forward block puts out is used."""
    weights = load_file(model / "model.safetensors")
    weights["bert.encoder.layer.1.output.dense.weight"].zero_()
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    result = cli("prune", model, *flags.split(), "--data", data, "--out", "o", "--json")
    assert result.code == 0, result.err
    [told] = [one for one in result.report["warnings"] if "zero on these examples" in one]
    assert name in told and "--exclude" in told
    assert ("not moved" if "magnitude" in flags else "pruned by magnitude") in told
    rows = {row["name"]: row for row in result.report["tensors"]}
    assert rows[name]["update"] == "none" and rows[name]["predicted_loss_change"] == 0
    before, after = weights[name], load_file(tmp_path / "o" / "model.safetensors")[name]
    assert torch.equal(after[after != 0], before[after != 0]) and int((after == 0).sum()) > 0
    if "--pattern" in flags:
        groups, kept = before.abs().reshape(-1, 4), (after != 0).reshape(-1, 4)
        assert torch.equal(kept, groups == groups.amax(1, keepdim=True))
    else:
        for one, old in zip(after, before, strict=True) if "fisher" in flags else [(after, before)]:
            assert old[one == 0].abs().max() < old[one != 0].abs().min()


@pytest.mark.parametrize("method", ["obs", "mfac"])
def test_a_bank_of_zeros_is_refused(cli: Cli, model: Path, data: Path, method: str) -> None:
    weights = load_file(model / "model.safetensors")
    weights["classifier.weight"].zero_()
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    result = cli(
        "prune", model, "--method", method, "--sparsity", 0.5, "--data", data, "--out", "o"
    )
    assert result.code == 3 and result.err.count("\n") == 1, result.err
    assert "every gradient of what is pruned is zero; estimate" in result.err


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F16"])
def test_a_move_that_its_dtype_has_no_room_for_is_refused(
    monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Of F8_E4M3, torch would store 448, the largest there is."""
    weight, mask = torch.tensor([[1.0, 448.0]]), torch.ones(1, 2, dtype=torch.bool)
    matrix: Any = SimpleNamespace(key="w", dtype=dtype)
    for moved, fits in ((460.0, True), (1e5, False)):
        new = torch.tensor([[moved, 1.0]])
        monkeypatch.setattr(prune_moves, "_updated", lambda *given, new=new: (new, mask))
        for lenient in (False, True):
            plan = SimpleNamespace(allow_nonfinite=lenient)
            step: Any = SimpleNamespace(plan=plan, recipe=SimpleNamespace(updates=["joint"]))
            if not fits and not lenient:
                with pytest.raises(InputError, match=f"joint moves does not fit {dtype}"):
                    prune_moves._candidates(step, matrix, weight, mask)
                continue
            plain, (_, found, _) = prune_moves._candidates(step, matrix, weight, mask)
            assert torch.equal(plain[1].float(), weight)
            assert bool(found[0, 0].float().isfinite()) == fits
