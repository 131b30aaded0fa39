"""Heads and neurons: the mask's Fisher, which stay, what they make up for, and what is written."""

import itertools
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import MAKERS, VOCABULARY, Cli, ModelMaker, make_text, make_tokenizer, write_rows
from safetensors.torch import load_file, save_file
from test_fisher_diagonal import randomize
from test_sentence import make_sentence_model
from torch import Tensor, nn

from fishertool.calibration import DataOptions
from fishertool.checkpoint.reader import open_checkpoint
from fishertool.errors import InputError, UsageError
from fishertool.estimation.settings import Settings
from fishertool.estimation.subject import LoadedSubject, Source, find_subject, load_subject
from fishertool.estimation.workers import joined
from fishertool.fisher.estimate import estimate
from fishertool.fisher.gradients import OuterProducts, ScatteredRows, Whole
from fishertool.fisher.kronecker import mirrored
from fishertool.fisher.labels import log_probabilities
from fishertool.fisher.mask import Masked, MaskMoments, mask_gradients
from fishertool.models.loading import load_model
from fishertool.models.tasks import TASKS, task_of
from fishertool.models.units import check_loads, count_kept, units_of
from fishertool.pruning.parts.reconstruction import DAMPING, mask_scales, refitted
from fishertool.pruning.parts.units import (
    complement,
    features_of,
    most_salient,
    predicted_loss,
    rearranged,
    weight_norms,
)
from fishertool.surgery.shrink import Outcome, gather, run_shrink
from fishertool.surgery.shrink_plan import ShrinkPlan, ShrinkRecipe, plan_shrink
from fishertool.surgery.shrink_write import write_shrunk

SMALL = {  # a word more, which the tokenizer of Qwen adds
    "vocab_size": len(VOCABULARY) + 1, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "max_position_embeddings": 32, "bos_token_id": 2, "eos_token_id": 3,
    "pad_token_id": 0,
}  # fmt: skip


def _decoder(family: str, heads: int = 4, groups: int = 2, **more: Any) -> Callable[[], Any]:
    def make() -> Any:
        config = getattr(transformers, f"{family}Config")(
            **SMALL, num_attention_heads=heads, num_key_value_heads=groups, **more
        )
        return getattr(transformers, f"{family}ForCausalLM")(config)

    return make


def _distilbert() -> Any:
    return transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(
            vocab_size=len(VOCABULARY), dim=16, hidden_dim=24, n_layers=2, n_heads=2,
            max_position_embeddings=32, num_labels=3,
        )
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], Any]] = {
    "bert": MAKERS["bert"],
    "gpt2": MAKERS["gpt2"],
    "distilbert": _distilbert,
    "llama": _decoder("Llama"),
    "llama-each": _decoder("Llama", 4, 4),
    "qwen2": _decoder("Qwen2", 6, 3, head_dim=4),
    "qwen3": _decoder("Qwen3", 4, 4, head_dim=8),
    "mistral": _decoder("Mistral", 6, 3, head_dim=4),
}
NEURONS = [(kind, "neurons") for kind in FAMILIES]
HEADS = [(kind, "heads") for kind in ("llama", "llama-each", "qwen2", "qwen3", "mistral")]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    def of(kind: str) -> Path:
        torch.manual_seed(0)
        folder = tmp_path / kind
        model: Any = randomize(FAMILIES[kind]())
        model.save_pretrained(folder)
        make_tokenizer(template="bert" in kind).save_pretrained(folder)
        return folder

    yield of


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    write_rows(path, [{"text": make_text(n, 3 + n % 6), "label": n % 3} for n in range(16)])
    return path


def loaded_from(opened: ExitStack, folder: Path, texts: Path, labels: str) -> LoadedSubject:
    workers = opened.enter_context(joined(None, "cpu"))
    subject = find_subject(opened, Source(str(folder)), DataOptions(str(texts)))
    return load_subject(subject, Settings(labels=labels), workers, None, True)


def loss_of(loaded: LoadedSubject) -> float:
    order = [[n] for n in range(len(loaded.texts.examples))]
    return estimate(loaded.module, {}, loaded.batch, [order], [], probe=loaded.probe).loss


def masked_by(plan: ShrinkPlan, module: nn.Module, masks: dict[str, Tensor]) -> ExitStack:
    """Multiply the inputs of joining layers by masks, [unit], in a model whose names end alike."""
    hooks = ExitStack()
    for block in plan.units.blocks:
        name = block.join.name.removesuffix(".weight")
        owner = next(m for n, m in module.named_modules() if n and f".{name}".endswith(f".{n}"))
        factor = masks[block.join.name].repeat_interleave(block.join.features)
        handle = owner.register_forward_pre_hook(
            lambda module, args, factor=factor: (args[0] * factor.to(args[0].dtype),)
        )
        hooks.callback(handle.remove)
    return hooks


@pytest.mark.parametrize("labels", ["empirical", "expected"])
@pytest.mark.parametrize(
    ("kind", "pattern"), [("bert", "neurons"), ("gpt2", "neurons"), *HEADS[:2]]
)
def test_mask_moments_are_those_of_autograd(
    make: Callable[[str], Path], texts: Path, kind: str, pattern: str, labels: str
) -> None:
    if labels == "expected" and kind != "bert":
        labels = "empirical"
    folder = make(kind)
    with ExitStack() as opened:
        plan = plan_shrink(opened, str(folder), ShrinkRecipe(pattern, 0.5), 1 << 40, True)
        loaded = loaded_from(opened, folder, texts, labels)
        found = gather(plan, loaded, lambda count: None).masks
        module = loaded.module.double()
        masks = {
            block.join.name: torch.ones(plan.units.number, dtype=torch.float64, requires_grad=True)
            for block in plan.units.blocks
        }
        expected = {
            name: torch.zeros(len(mask), len(mask)).double() for name, mask in masks.items()
        }
        count = len(loaded.texts.examples)
        with masked_by(plan, module, masks):
            for n in range(count):
                batch = loaded.batch([n])
                log_p = torch.log_softmax(module(**batch.inputs).logits.double(), -1)
                picked = [log_p.gather(-1, batch.targets.unsqueeze(-1))[..., 0][batch.scored].sum()]
                weights = [1.0]
                if labels == "expected":
                    picked, weights = list(log_p[0]), log_p[0].exp().tolist()
                for one, weight in zip(picked, weights, strict=True):
                    gradients = torch.autograd.grad(one, list(masks.values()), retain_graph=True)
                    for name, gradient in zip(masks, gradients, strict=True):
                        expected[name] += weight * torch.outer(gradient, gradient) / count
        for name, value in expected.items():
            error = float((found[name] - value).norm() / value.norm())
            assert error < 1e-5, name


def test_every_form_of_a_gradient_gives_the_masks() -> None:
    generator = torch.Generator().manual_seed(0)
    x, delta = (torch.randn(3, 5, n, generator=generator) for n in (6, 4))
    weight = torch.randn(4, 6, generator=generator)
    gradients = delta.mT @ x
    expected = (gradients * weight).sum(1).reshape(3, 3, 2).sum(2)
    plain, turned = Masked(weight, 2), Masked(weight.T.contiguous(), 2, turned=True)
    assert plain.units == turned.units == 3
    for layer, part in (
        (plain, OuterProducts(delta, x)),
        (turned, OuterProducts(x, delta, transposed=True)),
        (plain, Whole(gradients)),
        (turned, Whole(gradients.mT.contiguous())),
    ):
        torch.testing.assert_close(mask_gradients(layer, part), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="ScatteredRows is no gradient of a linear layer"):
        mask_gradients(plain, ScatteredRows(torch.zeros(1, 1), torch.zeros(1, 1, 1)))
    both, diagonal = MaskMoments({"w": plain}), MaskMoments({"w": plain}, cross=False)
    for moments in (both, diagonal):
        moments.add(
            "w", [OuterProducts(delta[:, :2], x[:, :2]), OuterProducts(delta[:, 2:], x[:, 2:])]
        )
        moments.add("other", [])
    exact = expected.T @ expected
    torch.testing.assert_close(mirrored(both.sums["w"], 1), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(diagonal.sums["w"].float(), exact.diagonal(), rtol=1e-4, atol=1e-4)


def fisher_of(units: int, examples: int, seed: int) -> Tensor:
    gradients = torch.randn(examples, units, generator=torch.Generator().manual_seed(seed))
    return (gradients.T @ gradients / examples).double()


def test_predicted_loss_is_the_quadratic_form() -> None:
    fisher = fisher_of(6, 9, 0)
    z = torch.tensor([1.0, 0, 1, 0, 0, 1], dtype=torch.float64)
    kept = torch.tensor([1, 3, 4])
    assert predicted_loss(fisher, kept) == pytest.approx(float(z @ fisher @ z) / 2)
    assert complement(kept, 6).tolist() == [0, 2, 5]


@pytest.mark.parametrize("seed", range(8))
def test_rearrangement_ends_where_no_swap_helps(seed: int) -> None:
    fisher = fisher_of(9, 5, seed)
    start = most_salient(fisher.diagonal(), 4)
    before = fisher.clone()
    found = rearranged(fisher, start)
    assert torch.equal(fisher, before)
    assert found.tolist() == sorted(set(found.tolist())) and len(found) == 4
    loss = predicted_loss(fisher, found)
    assert loss <= predicted_loss(fisher, start) + 1e-12
    for out, other in itertools.product(found.tolist(), complement(found, 9).tolist()):
        swapped = torch.tensor(sorted({*found.tolist(), other} - {out}))
        assert predicted_loss(fisher, swapped) >= loss - 1e-9


def test_rearrangement_sees_units_that_make_up_for_each_other() -> None:
    """Two small ones add up, and one of them cancels with a larger one, which goes in its place."""
    gradients = torch.tensor([[10.0, 0, 0, 0], [0, -1.1, 1.0, 1.0]], dtype=torch.float64)
    fisher = gradients.T @ gradients / 2
    start = most_salient(fisher.diagonal(), 2)
    assert start.tolist() == [0, 1]
    assert predicted_loss(fisher, start) == pytest.approx(2**2 / 4)
    found = rearranged(fisher, start)
    assert found.tolist() == [0, 2]
    assert predicted_loss(fisher, found) == pytest.approx(0.1**2 / 4)
    assert rearranged(fisher, torch.arange(4)).tolist() == [0, 1, 2, 3]


def test_magnitude_is_the_norm_of_all_that_a_unit_has() -> None:
    generator = torch.Generator().manual_seed(0)
    up, bias, down = (torch.randn(*s, generator=generator) for s in ((6, 4), (6,), (5, 6)))
    found = weight_norms([down.T, up, bias], 3)
    for unit in range(3):
        mine = slice(2 * unit, 2 * unit + 2)
        squares = sum(float(part.square().sum()) for part in (down[:, mine], up[mine], bias[mine]))
        assert float(found[unit]) == pytest.approx(squares**0.5, rel=1e-6)
    assert most_salient(torch.tensor([1.0, 3.0, 3.0, 2.0]), 1).tolist() == [1]


@pytest.mark.parametrize("features", [1, 3])
@pytest.mark.parametrize("damping", [DAMPING, 0.3])
def test_reconstruction_is_least_squares(features: int, damping: float) -> None:
    """With the ridge as rows of its own, against a general solver on the tokens themselves."""
    generator = torch.Generator().manual_seed(features)
    units, out, tokens = 5, 4, 40
    x = torch.randn(tokens, units * features, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(units * features, units * features, generator=generator).double()
    weight = torch.randn(out, units * features, generator=generator).double()
    moments, y = x.T @ x / tokens, x @ weight.T
    kept = torch.tensor([0, 2, 4])
    stay = features_of(kept, features)

    ridge = (damping * moments[stay][:, stay].diagonal().mean()).sqrt()
    eye = torch.eye(len(stay), dtype=torch.float64)
    system = torch.cat([x[:, stay] / tokens**0.5, ridge * eye])
    right = torch.cat([y / tokens**0.5, ridge * weight[:, stay].T])
    expected = torch.linalg.lstsq(system, right).solution.T
    refit = refitted(weight, moments, kept, features, damping)
    torch.testing.assert_close(refit, expected, rtol=1e-8, atol=1e-8)

    def error(new: Tensor) -> float:
        return float((x[:, stay] @ new.T - y).square().sum())

    assert error(refit) < error(weight[:, stay])


@pytest.mark.parametrize("damping", [1e-4, 0.3])
def test_mask_tuning_is_the_minimum_of_the_predicted_loss(damping: float) -> None:
    """By least squares over examples, 1/2 mean (u z)^2, with a row for each unit's ridge."""
    gradients = torch.randn(30, 7, generator=torch.Generator().manual_seed(1)).double()
    kept, dropped = torch.tensor([0, 2, 3, 6]), torch.tensor([1, 4, 5])
    moments = gradients.T @ gradients / 30
    ridge = (damping * moments.diagonal()[kept].mean()).sqrt()
    system = torch.cat([gradients[:, kept] / 30**0.5, ridge * torch.eye(4).double()])
    right = torch.cat([gradients[:, dropped].sum(1) / 30**0.5, torch.zeros(4).double()])
    expected = 1 + torch.linalg.lstsq(system, right.unsqueeze(1)).solution.squeeze(1)
    found = mask_scales(moments, kept, damping)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    def loss(scales: Tensor) -> float:
        z = torch.full((7,), -1.0).double()
        z[kept] = scales - 1
        return float(z @ moments @ z) / 2

    assert (
        loss(found) < loss(torch.ones(4).double()) == pytest.approx(predicted_loss(moments, kept))
    )


def test_the_refit_is_of_the_relative_error(make: Callable[[str], Path], texts: Path) -> None:
    """Of tokens as hooks see them, one in five ten times as large; solved by least squares."""
    folder = make("bert")
    with ExitStack() as opened:
        recipe = ShrinkRecipe("neurons", 0.5, "magnitude", "joint")
        plan = plan_shrink(opened, str(folder), recipe, 1 << 40, True)
        loaded = loaded_from(opened, folder, texts, "empirical")
        block = plan.units.blocks[0]
        modules = dict(loaded.model.pretrained.named_modules())
        layer = modules[block.join.name.removesuffix(".weight")]
        seen: list[tuple[Tensor, Tensor]] = []

        def massive(module: Any, args: Any) -> Any:
            factor = torch.where(torch.arange(args[0].shape[1]) % 5 == 1, 10.0, 1.0)
            return (args[0] * factor.view(1, -1, 1), *args[1:])

        def see(module: Any, args: Any, y: Tensor) -> None:
            seen.append((args[0].double(), y.double()))

        handles = [layer.register_forward_pre_hook(massive)]
        gathered = gather(plan, loaded, lambda count: None)
        handles.append(layer.register_forward_hook(see))
        for n, example in enumerate(loaded.texts.examples):
            with torch.no_grad():
                loaded.module(**loaded.batch([n]).inputs)
            assert seen[n][0].shape[1] == example.length  # one at a time, there is no padding
        for handle in handles:
            handle.remove()
        outcome = run_shrink(plan, loaded, None, seed=0)
    x = torch.cat([one.flatten(0, 1) for one, _ in seen])
    y = torch.cat([one.flatten(0, 1) for _, one in seen])
    weight, kept = layer.weight.detach().double(), outcome.kept[block.join.name]
    rows = x / y.norm(dim=1, keepdim=True)
    ridge = (DAMPING * rows[:, kept].square().sum(0).mean() / len(rows)).sqrt()
    system = torch.cat([rows[:, kept] / len(rows) ** 0.5, ridge * torch.eye(len(kept)).double()])
    right = torch.cat([rows @ weight.T / len(rows) ** 0.5, ridge * weight[:, kept].T])
    expected = torch.linalg.lstsq(system, right).solution.T
    found = refitted(weight, gathered.inputs[block.join.name], kept, 1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert float((expected - weight[:, kept]).abs().max()) > 1e-2


def test_nothing_left_out_or_no_input_changes_nothing() -> None:
    weight, moments = torch.randn(3, 4).double(), fisher_of(4, 9, 0)
    everything = torch.arange(4)
    torch.testing.assert_close(mask_scales(moments, everything), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(refitted(weight, moments, everything, 1), weight)
    some = torch.tensor([1, 2])
    nothing = torch.zeros(4, 4)
    assert mask_scales(nothing, some).tolist() == [1, 1]
    assert torch.equal(refitted(weight, nothing, some, 1), weight[:, some])


RECIPES = [
    ("fisher", "none"),
    ("fisher", "mask"),
    ("obs", "joint"),
    ("magnitude", "joint"),
    ("random", "auto"),
]


def shrunk(
    folder: Path, texts: Path, recipe: ShrinkRecipe, out: Path
) -> tuple[ShrinkPlan, Outcome, LoadedSubject]:
    with ExitStack() as opened:
        plan = plan_shrink(opened, str(folder), recipe, 1 << 40, True)
        loaded = loaded_from(opened, folder, texts, "empirical")
        before = {name: value.clone() for name, value in loaded.module.state_dict().items()}
        outcome = run_shrink(plan, loaded, lambda: loss_of(loaded), seed=0)
        for name, value in loaded.module.state_dict().items():
            assert torch.equal(value, before[name]), name  # whole again
        out.mkdir()
        write_shrunk(plan, outcome, {}, out)
        return plan, outcome, loaded


@pytest.mark.parametrize(("method", "compensate"), RECIPES)
@pytest.mark.parametrize(("kind", "pattern"), [*NEURONS, *HEADS])
def test_the_reloaded_model_is_the_masked_one(
    make: Callable[[str], Path], texts: Path, tmp_path: Path, kind: str, pattern: str, method: str,
    compensate: str,
) -> None:  # fmt: skip
    folder = make(kind)
    sparsity = 0.34 if kind in ("qwen2", "mistral") and pattern == "heads" else 0.5
    recipe = ShrinkRecipe(pattern, sparsity, method, compensate)
    plan, outcome, loaded = shrunk(folder, texts, recipe, tmp_path / "out")
    assert all(len(kept) == plan.kept < plan.units.number for kept in outcome.kept.values())
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.config() == load_config(folder) | plan.units.changes(plan.kept)
        small = load_model(checkpoint, loaded.subject.task)
        stored = {name: checkpoint.info(name).shape for name in checkpoint}
    with open_checkpoint(folder) as dense:
        shapes = plan.units.shapes(dense, plan.kept)
    assert {name: stored[name] for name in shapes} == shapes
    for block in plan.units.blocks:  # the dense model with the new joining weights, wide again
        name, kept = block.join.name, outcome.kept[block.join.name]
        wide = torch.zeros_like(loaded.parameters[name])
        place = [slice(None), slice(None)]
        place[block.join.dimension] = features_of(kept, block.join.features)  # type: ignore[call-overload]
        new = outcome.joining[name].float()
        wide[tuple(place)] = new.T if plan.units.turned else new
        with torch.no_grad():
            loaded.parameters[name].copy_(wide)
    for n in range(4):
        batch = loaded.batch([n])
        with torch.no_grad():
            expected = loaded.module(**batch.inputs).logits
            found = small.module(**batch.inputs).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert outcome.losses[outcome.compensate] == pytest.approx(loss_of(loaded), rel=1e-5)


def load_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@pytest.mark.parametrize(
    ("kind", "pattern"), [("bert", "neurons"), ("gpt2", "neurons"), ("llama-each", "heads")]
)
def test_masks_of_ones_and_zeros(
    make: Callable[[str], Path], texts: Path, tmp_path: Path, kind: str, pattern: str
) -> None:
    """What is written is the dense model with hooks that silence the units left out."""
    folder = make(kind)
    recipe = ShrinkRecipe(pattern, 0.5, "magnitude")
    plan, outcome, loaded = shrunk(folder, texts, recipe, tmp_path / "out")
    masks = {}
    for name, kept in outcome.kept.items():
        masks[name] = torch.zeros(plan.units.number)
        masks[name][kept] = 1
    with open_checkpoint(tmp_path / "out") as checkpoint:
        small = load_model(checkpoint, loaded.subject.task)
    batch = loaded.batch([0, 5])
    with torch.no_grad(), masked_by(plan, loaded.module, masks):
        expected = log_probabilities(loaded.module(**batch.inputs).logits)[batch.scored]
    with torch.no_grad():
        found = log_probabilities(small.module(**batch.inputs).logits)[batch.scored]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_auto_does_what_loses_least(
    make: Callable[[str], Path], texts: Path, tmp_path: Path
) -> None:
    recipe = ShrinkRecipe("neurons", 0.5, "fisher", "auto")
    _, outcome, _ = shrunk(make("gpt2"), texts, recipe, tmp_path / "out")
    tried = {way: outcome.losses[way] for way in ("none", "mask", "joint")}
    assert outcome.losses[outcome.compensate] == min(tried.values())
    assert set(outcome.losses) == {"dense", *tried}


def test_rearranging_lowers_the_predicted_loss(
    make: Callable[[str], Path], texts: Path, tmp_path: Path
) -> None:
    folder = make("bert")
    by_block, alone = (
        shrunk(folder, texts, ShrinkRecipe("neurons", 0.5, rearrange=flag), tmp_path / str(flag))
        for flag in (True, False)
    )
    assert by_block[1].kept.keys() == alone[1].kept.keys()
    assert any(not torch.equal(by_block[1].kept[n], alone[1].kept[n]) for n in alone[1].kept)
    assert all("predicted_loss_change" not in figures for figures in alone[1].figures.values())
    with ExitStack() as opened:
        plan = plan_shrink(opened, str(folder), ShrinkRecipe("neurons", 0.5), 1 << 40, True)
        moments = gather(plan, by_block[2], lambda count: None).masks
    for name, figures in by_block[1].figures.items():
        most = predicted_loss(moments[name], alone[1].kept[name])
        assert figures["predicted_loss_change"] <= most + 1e-9
        assert 0 <= figures["overlap_with_magnitude"] <= 1


@pytest.mark.parametrize("transformer", ["", "0_Transformer"])
def test_sentence_transformers_in_and_out(
    make_model: ModelMaker, tmp_path: Path, transformer: str
) -> None:
    top = make_sentence_model(make_model, transformer=transformer)
    write_rows(
        tmp_path / "q.jsonl",
        [{"query": make_text(n, 2), "positive": make_text(9 + n, 3)} for n in range(6)],
    )
    with ExitStack() as opened:
        recipe = ShrinkRecipe("neurons", 0.25, compensate="mask")
        plan = plan_shrink(opened, str(top), recipe, 1 << 40, True)
        loaded = loaded_from(opened, top, tmp_path / "q.jsonl", "auto")
        outcome = run_shrink(plan, loaded, None, 0)
        (out := tmp_path / "out").mkdir()
        write_shrunk(plan, outcome, {}, out)
    assert outcome.losses == {}
    files = {path.relative_to(out).as_posix() for path in out.rglob("*.json")}
    assert files >= {
        "modules.json",
        "1_Pooling/config.json",
        f"{transformer}/tokenizer.json".lstrip("/"),
    }
    with open_checkpoint(out / transformer) as checkpoint:
        assert task_of(checkpoint.config(), checkpoint.folder).name == "embedding"
        assert checkpoint.config()["intermediate_size"] == 24
        load_model(checkpoint, TASKS["embedding"])


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    model = MAKERS["llama"](tied=True)
    folder = tmp_path / "tied"
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with ExitStack() as opened:
        recipe = ShrinkRecipe("neurons", 0.5, "magnitude")
        plan = plan_shrink(opened, str(folder), recipe, 1 << 40, False)
        (out := tmp_path / "out").mkdir()
        write_shrunk(plan, run_shrink(plan, None, None, 0), {}, out)
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    transformers.AutoModelForCausalLM.from_pretrained(out)


NO_SIZE = "cannot be left out: its config.json has no field for their size"


@pytest.mark.parametrize(
    ("kind", "pattern", "sparsity", "error", "told"),
    [
        ("bert", "heads", 0.5, InputError, f"heads of BertForSequenceClassification {NO_SIZE}"),
        ("distilbert", "heads", 0.5, InputError, NO_SIZE),
        ("gpt2", "heads", 0.5, InputError, f"heads of GPT2LMHeadModel {NO_SIZE}"),
        (
            "llama-each",
            "heads",
            0.25,
            InputError,
            "makes no LlamaForCausalLM of 3 groups of heads: .*not a multiple of the number of "
            r"attention heads \(3\).*; of 4 groups it takes 1, 2$",
        ),
        (
            "llama",
            "heads",
            0.1,
            UsageError,
            "leaves 2 of the 2 groups of heads of a block; one is 0.5",
        ),
        ("bert", "neurons", 0.999, UsageError, "leaves 0 of the 32 neurons"),
        ("bert", "neurons", 1.0, UsageError, "--sparsity 1.0: is above 0 and below 1"),
        ("bert", "neuron", 0.5, UsageError, "--pattern 'neuron'; did you mean 'neurons'"),
    ],
)
def test_what_cannot_shrink(
    make: Callable[[str], Path], kind: str, pattern: str, sparsity: float, error: type, told: str
) -> None:
    with ExitStack() as opened, pytest.raises(error, match=told):
        plan_shrink(opened, str(make(kind)), ShrinkRecipe(pattern, sparsity), 1 << 40, True)


@pytest.mark.parametrize(
    ("family", "more", "pattern", "told"),
    [
        ("Olmo2", {}, "heads", r"layers.0.self_attn.k_norm.weight stays \[8\], and its model has \[4\]"),
        ("Cohere", {"use_qk_norm": True}, "heads", r"k_norm.weight stays \[2, 4\]"),
        ("GptOss", {"num_local_experts": 2, "head_dim": 4}, "heads", r"sinks stays \[4\]"),
        ("BitNet", {}, "neurons", r"ffn_sub_norm.weight stays \[24\], and its model has \[12\]"),
        ("BitNet", {}, "heads", "it does not run: .*of 2 groups it takes no fewer$"),
    ],
)  # fmt: skip
def test_what_would_not_load_or_not_run(
    cli: Cli, tmp_path: Path, family: str, more: dict[str, Any], pattern: str, told: str
) -> None:
    _decoder(family, **more)().save_pretrained(tmp_path / "m")
    flags = ("--pattern", pattern, "--sparsity", 0.5, "--out", "o")
    for dry in ((), ("--dry-run",)):
        result = cli("prune", "m", *flags, *dry)
        assert result.code == 3, result.err
        assert f"transformers makes no {family}ForCausalLM of " in result.err
        assert re.search(told, result.err), result.err
    assert not (tmp_path / "o").exists()


def test_what_is_not_known_by_name(make_model: ModelMaker) -> None:
    with (
        ExitStack() as opened,
        pytest.raises(InputError, match="no neurons are known by name in T5ForConditionalGener"),
    ):
        recipe = ShrinkRecipe("neurons", 0.5)
        plan_shrink(opened, str(make_model("t", "t5")), recipe, 1 << 40, True)


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        (
            ShrinkRecipe("neurons", 0.5, "wanda"),
            "--method 'wanda'; known: fisher, obs, magnitude, random",
        ),
        (ShrinkRecipe("neurons", 0.5, "fisher"), "looks at examples: give --data"),
        (ShrinkRecipe("neurons", 0.5, "magnitude", "joint"), "looks at examples: give --data"),
        (ShrinkRecipe("heads", 0.5, "magnitude", "summed"), "--compensate 'summed'"),
    ],
)
def test_recipes_that_are_refused(tmp_path: Path, recipe: ShrinkRecipe, told: str) -> None:
    with ExitStack() as opened, pytest.raises(UsageError, match=told):
        plan_shrink(opened, str(tmp_path), recipe, 1 << 40, False)


def test_blocks_must_be_alike(make: Callable[[str], Path]) -> None:
    folder = make("bert")
    tensors = load_file(folder / "model.safetensors")
    layer = "bert.encoder.layer.1."
    for name, dimension in (
        ("intermediate.dense.weight", 0),
        ("intermediate.dense.bias", 0),
        ("output.dense.weight", 1),
    ):
        tensors[layer + name] = tensors[layer + name].narrow(dimension, 0, 20).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with (
        open_checkpoint(folder) as checkpoint,
        pytest.raises(InputError, match="blocks have different neurons"),
    ):
        units_of(checkpoint, "neurons")


def test_counts(make: Callable[[str], Path]) -> None:
    with open_checkpoint(make("llama-each")) as checkpoint:
        heads, neurons = units_of(checkpoint, "heads"), units_of(checkpoint, "neurons")
        assert (heads.number, neurons.number) == (4, 24)
        assert heads.changes(2) == {
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4,
        }  # fmt: skip
        assert count_kept(neurons, 0.5) == 12 and count_kept(neurons, 1 / 24) == 23
        check_loads(checkpoint, heads, 2)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "gpt2", "llama", "qwen2"])
def test_through_the_command_line(
    cli: Cli, make: Callable[[str], Path], texts: Path, tmp_path: Path, kind: str
) -> None:
    folder = make(kind)
    flags = ("--pattern", "neurons", "--method", "fisher", "--sparsity", 0.5, "--data", texts)
    result = cli("prune", folder, *flags, "--compensate", "auto", "--out", "o", "--json")
    assert result.code == 0, result.err
    summary = result.report["summary"]
    assert (summary["kept"], summary["blocks"]) == (summary["units"] // 2, 2)
    for what in ("parameters", "bytes", "multiplications_per_token"):
        assert 0 < summary[f"{what}_after"] < summary[f"{what}_before"]
    losses = result.report["evaluation"]["losses"]
    assert summary["loss_after"] == pytest.approx(losses[summary["compensate"]], rel=1e-4)
    assert summary["loss_change"] == pytest.approx(summary["loss_after"] - losses["dense"])
    stored = load_file(tmp_path / "o" / "model.safetensors")
    assert summary["parameters_after"] == sum(value.numel() for value in stored.values())
    rows = {row["name"]: row for row in result.report["tensors"]}
    assert rows.keys() == stored.keys()
    dense = load_file(folder / "model.safetensors")
    for name, row in rows.items():
        assert row["shape"] == list(stored[name].shape)
        if row["action"] == "prune":
            assert row["shape_before"] == list(dense[name].shape) != row["shape"]
        else:
            assert torch.equal(stored[name], dense[name])
    changed = {name for name, row in rows.items() if row["action"] == "prune"}
    assert len(changed) in (4, 6)  # gate, up and down, or two matrices and a bias, twice
    reloaded = cli("evaluate", "o", "--data", texts, "--json")
    assert reloaded.code == 0, reloaded.err


def test_multiplications_are_counted(cli: Cli, make: Callable[[str], Path]) -> None:
    flags = ("--pattern", "neurons", "--sparsity", 0.25, "--out", "o", "--json")
    summary = cli("prune", make("bert"), *flags, "--dry-run").report["summary"]
    attention, neurons = 4 * 16 * 16, 2 * 16
    assert summary["multiplications_per_token_before"] == 2 * (attention + 32 * neurons)
    assert summary["multiplications_per_token_after"] == 2 * (attention + 24 * neurons)
    assert summary["config"] == {"intermediate_size": 24}
    assert not Path("o").exists()


def test_heads_and_recovery_through_the_command_line(
    cli: Cli, make: Callable[[str], Path], texts: Path, tmp_path: Path
) -> None:
    flags = ("--pattern", "heads", "--method", "fisher", "--sparsity", 0.5, "--data", texts)
    recover = ("--recover-steps", 30, "--recover-learning-rate", 1e-2, "--compensate", "mask")
    result = cli("prune", make("llama"), *flags, *recover, "--out", "o", "--json")
    assert result.code == 0, result.err
    recovery = result.report["evaluation"]["recovery"]
    assert recovery["loss_after"] < recovery["loss_before"]
    summary = result.report["summary"]
    assert summary["loss_after"] == pytest.approx(recovery["held_out_loss"], rel=1e-4)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 4)
    assert model.model.layers[0].self_attn.o_proj.weight.shape == (16, 8)


def test_magnitude_needs_no_data(cli: Cli, make: Callable[[str], Path]) -> None:
    folder = make("gpt2")
    flags = ("--pattern", "neurons", "--sparsity", 0.5, "--json")
    one = cli("prune", folder, *flags, "--out", "o")
    assert one.code == 0, one.err
    assert "nothing was measured" in one.report["warnings"][0]
    assert all(row.get("overlap_with_magnitude", 1) == 1 for row in one.report["tensors"])
    assert transformers.AutoModelForCausalLM.from_pretrained("o").config.n_inner == 32
    for seed in (0, 1):
        done = cli("prune", folder, *flags, "--method", "random", "--seed", seed, "--out", seed)
        assert done.code == 0
    files = [Path(f"{seed}/model.safetensors").read_bytes() for seed in (0, 1)]
    assert files[0] != files[1]


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (("--pattern", "heads"), 3, NO_SIZE),
        (("--fisher", "f"), 2, "--fisher means nothing for --pattern neurons"),
        (("--include", "*"), 2, "--include means nothing for --pattern neurons"),
        (("--steps", 2), 2, "--steps means nothing"),
        (("--recover-steps", 2), 2, "--recover-steps trains on the data"),
        (("--set", "rearange=true", "--method", "fisher"), 2, "did you mean 'rearrange'"),
        (("--set", "rearrange=maybe", "--method", "fisher"), 2, "'maybe' is not a bool"),
        (("--set", "rearrange=true"), 2, "method magnitude of --pattern neurons has no setting"),
        (("--method", "wanda"), 2, "--method 'wanda'"),
        (("--compensate", "summed"), 2, "--compensate 'summed'"),
        (("--method", "fisher"), 2, "looks at examples: give --data"),
    ],
)
def test_bad_flags(
    cli: Cli, make: Callable[[str], Path], flags: tuple[Any, ...], code: int, told: str
) -> None:
    base = () if "--pattern" in flags else ("--pattern", "neurons")
    result = cli("prune", make("bert"), *base, "--sparsity", 0.5, *flags, "--out", "o")
    assert (result.code, told in result.err) == (code, True), result.err
    assert cli("prune", make("bert"), "--pattern", "neurons", "--out", "o").code == 2


def test_selected_examples(cli: Cli, make: Callable[[str], Path], texts: Path) -> None:
    flags = ("--pattern", "neurons", "--method", "fisher", "--sparsity", 0.5, "--data", texts)
    chosen = ("--num-examples", 8, "--select", "kmeans", "--held-out", 0.25)
    result = cli("prune", make("bert"), *flags, *chosen, "--out", "o", "--json")
    assert result.code == 0, result.err
    assert result.report["calibration"]["selection"]["pool"] == 16
    assert result.report["evaluation"]["held_out_examples"] == 2
