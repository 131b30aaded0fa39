"""Recovery fine-tuning: what it trains, what it leaves, and that it can be repeated."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker, make_text, make_tokenizer
from test_sentence import make_sentence_model
from tiny import ARCHITECTURES, make_low_rank
from torch import Tensor, nn

import fishertool
from fishertool import calibration
from fishertool.calibration import CalibrationData, DataOptions, Example
from fishertool.checkpoint.reader import open_checkpoint
from fishertool.errors import InputError
from fishertool.models.loading import LoadedModel, load_model
from fishertool.models.names import parameters_by_disk_name
from fishertool.models.recovery import Recovery, recover
from fishertool.models.tasks import Task, collate, task_of

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
EXAMPLES = [
    Example({"input_ids": [2, *(4 + (7 * n + k) % 19 for k in range(2 + n % 4)), 3]}, n % 3, 0)
    for n in range(10)
]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def data_of(examples: list[Example]) -> CalibrationData:
    return CalibrationData(examples, "data", truncated=0, empty=0, max_length=32)


def load(folder: Path) -> tuple[LoadedModel, Task]:
    with open_checkpoint(folder) as checkpoint:
        task = task_of(checkpoint.config(), checkpoint.folder)
        return load_model(checkpoint, task), task


def weights(model: LoadedModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.module.named_parameters()}


def changed(model: LoadedModel, before: dict[str, Tensor]) -> set[str]:
    return {
        name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])
    }


def run(model: LoadedModel, task: Task, **more: Any) -> Recovery:
    given = {"steps": 12, "learning_rate": 1e-2, "batch_size": 4} | more
    return recover(model, task, data_of(EXAMPLES), **given)


def test_three_steps_are_those_of_a_plain_loop(make_model: ModelMaker) -> None:
    """AdamW by its definition in float64, on the mean loss of each batch."""
    folder = make_model("a", spread=0.1, **STILL)
    model, task = load(folder)
    other, _ = load(folder)
    reference = other.module.double()
    done = run(model, task, steps=3, batch_size=5)

    generator = torch.Generator().manual_seed(0)
    order = [n for _ in range(2) for n in torch.randperm(10, generator=generator).tolist()]
    parameters = dict(reference.named_parameters())
    first = {name: torch.zeros_like(p) for name, p in parameters.items()}
    second = {name: torch.zeros_like(p) for name, p in parameters.items()}

    def loss_of(indices: list[int]) -> Tensor:
        batch = collate(task, EXAMPLES, indices, 0, "cpu")
        log_p = torch.log_softmax(reference(**batch.inputs).logits, -1)
        return -log_p[range(len(indices)), batch.targets].mean()

    with torch.no_grad():
        assert done.loss_before == pytest.approx(float(loss_of(list(range(10)))), rel=1e-5)
    for step in range(3):
        loss = loss_of(order[5 * step : 5 * step + 5])
        gradients = dict(
            zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True)
        )
        norm = sum(float(g.square().sum()) for g in gradients.values()) ** 0.5
        rate = 1e-2 * (3 - step) / 3
        with torch.no_grad():
            for name, g in gradients.items():
                g = g * min(1.0, 1.0 / (norm + 1e-6))
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g.square()
                mean = first[name] / (1 - 0.9 ** (step + 1))
                scale = (second[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                parameters[name].sub_(rate * mean / scale)
    for name, tensor in weights(model).items():
        # where a gradient is rounding error alone (a key's bias), its sign is the step's
        if "key.bias" not in name:
            torch.testing.assert_close(tensor.double(), parameters[name], rtol=1e-3, atol=2e-4)
    with torch.no_grad():
        assert done.loss_after == pytest.approx(float(loss_of(list(range(10)))), rel=1e-3)
    assert (done.steps, done.examples) == (3, 10)
    assert done.parameters == sum(p.numel() for p in parameters.values())


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_the_loss_falls(make_model: ModelMaker, kind: str) -> None:
    model, task = load(make_model("a", kind, spread=0.3))
    done = run(model, task, steps=30)
    assert done.loss_after < 0.8 * done.loss_before
    assert not model.module.training


def test_the_loss_of_an_embedding_model_falls(make_model: ModelMaker) -> None:
    folder = make_sentence_model(make_model)
    ids = [one.inputs for one in EXAMPLES]
    examples = [
        # queries with different numbers of documents do not go into one batch
        replace(one, label=None, candidates=[ids[(n + 3 + k) % 10] for k in range(2 + n % 2)])
        for n, one in enumerate(EXAMPLES)
    ]
    with open_checkpoint(folder) as checkpoint:
        task = task_of(checkpoint.config(), checkpoint.folder)
        model = load_model(checkpoint, task)
    done = recover(model, task, data_of(examples), steps=30, learning_rate=1e-2, batch_size=4)
    assert done.loss_after < 0.8 * done.loss_before


def test_the_loss_of_t5_falls_on_data_as_commands_read_it(make_model: ModelMaker) -> None:
    folder = make_model("a", "t5")
    model, task = load(folder)
    lines = [f'{{"text": "{make_text(n, 6)}", "target": "{make_text(n, 3)}"}}' for n in range(8)]
    Path("data.jsonl").write_text("\n".join(lines))
    options = task.form.resolve(DataOptions("data.jsonl"), task.name)
    data = calibration.load(options, model.tokenizer, model.max_length, None, task.form)
    done = recover(model, task, data, steps=30, learning_rate=1e-2)
    assert done.loss_after < 0.8 * done.loss_before


def test_a_low_rank_model_trains_its_factors(make_model: ModelMaker) -> None:
    make_low_rank(make_model("dense", spread=0.3), Path("low"), rank=3)
    model, task = load(Path("low"))
    before = weights(model)
    done = run(model, task, steps=30)
    assert done.loss_after < 0.8 * done.loss_before
    factors = {name for name in before if ".down." in name or ".up." in name}
    assert changed(model, before) == factors
    assert done.parameters == sum(before[name].numel() for name in factors)
    assert all(one.requires_grad and one.grad is None for one in model.module.parameters())

    model.pretrained.save_pretrained("again")  # type: ignore[operator]
    again = dict(fishertool.load_model("again").named_parameters())
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights(model).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_weights_stay_zero(make_model: ModelMaker, dtype: torch.dtype) -> None:
    folder = make_model("a", dtype=dtype)
    model, task = load(folder)
    generator = torch.Generator().manual_seed(0)
    masks = []
    for name, weight in model.module.named_parameters():
        if weight.dim() == 2:
            masks.append((name, weight, torch.rand(weight.shape, generator=generator) < 0.5))
    before = weights(model)  # of weights that are not zero yet
    steps: list[int] = []

    def look(count: int) -> None:
        steps.append(count)
        for _, weight, kept in masks:
            assert bool((weight[~kept] == 0).all())

    done = run(model, task, steps=20, masks=[pair[1:] for pair in masks], advance=look)
    assert steps == [1] * 20
    assert done.loss_after < done.loss_before
    for name, weight, kept in masks:
        assert bool((weight[~kept] == 0).all())
        if "embeddings" not in name:  # of which some rows occur in no example
            assert float((weight != before[name])[kept].float().mean()) > 0.5


def test_masks_leave_no_trace_in_the_gradients(make_model: ModelMaker) -> None:
    """The same steps as of a model whose masked weights are no parameters at all."""
    folder = make_model("a", spread=0.1, **STILL)
    model, task = load(folder)
    other, _ = load(folder)
    name = "bert.encoder.layer.1.output.dense"
    layer = model.module.get_submodule(name)
    kept = torch.rand(16, 32, generator=torch.Generator().manual_seed(0)) < 0.5
    run(model, task, masks=[(layer.get_parameter("weight"), kept)])

    class Masked(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * kept

    twin = other.module.get_submodule(name)
    nn.utils.parametrize.register_parametrization(twin, "weight", Masked())
    run(other, task)
    torch.testing.assert_close(layer.weight, twin.weight, rtol=1e-5, atol=1e-6)


def test_masks_of_one_expert_of_a_stack() -> None:
    """Names on disk are views of a fused parameter."""
    torch.manual_seed(0)
    ARCHITECTURES["mixtral"]().save_pretrained("a")
    make_tokenizer(template=False).save_pretrained("a")
    with open_checkpoint(Path("a")) as checkpoint:
        task = task_of(checkpoint.config(), checkpoint.folder)
        model = load_model(checkpoint, task, watch_experts=True)
        views, _ = parameters_by_disk_name(model.pretrained, checkpoint)
    chosen = [name for name in views if ".experts.1." in name]
    assert len(chosen) == 6
    masks = [(views[name], torch.rand(views[name].shape) < 0.5) for name in chosen]
    others = {name: view.clone() for name, view in views.items() if ".experts.2." in name}
    run(model, task, masks=masks)
    with torch.no_grad():  # as views of parameters that have changed since are read
        for view, kept in masks:
            assert bool((view[~kept] == 0).all())
            assert not bool((view[kept] == 0).any())
        assert any(not torch.equal(views[name], before) for name, before in others.items())


def test_repeatable_by_the_seed_and_silent_about_it(make_model: ModelMaker) -> None:
    folder = make_model("a", "gpt2")  # with dropout

    def weights_after(seed: int, noise: int) -> tuple[Recovery, dict[str, Tensor]]:
        model, task = load(folder)
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        done = run(model, task, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return done, weights(model)

    (one, first), (two, second), (three, third) = (
        weights_after(seed, noise) for seed, noise in ((0, 1), (0, 2), (1, 1))
    )
    assert one == two != three
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_small_steps_add_up_in_bfloat16(make_model: ModelMaker) -> None:
    """Each is less than half of a weight's last bit, so without wider copies none would count."""
    folder = make_model("a", dtype=torch.bfloat16, **STILL)
    model, task = load(folder)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    with torch.no_grad():
        model.module.get_parameter(name).fill_(1.0)
    before = weights(model)[name]
    run(model, task, steps=40, learning_rate=1e-3)
    after = weights(model)[name]
    assert after.dtype == torch.bfloat16
    assert float((after != before).float().mean()) > 0.5


def test_few_steps_see_few_examples(make_model: ModelMaker) -> None:
    model, task = load(make_model("a"))
    assert run(model, task, steps=1, batch_size=3).examples == 3
    assert run(model, task, steps=2, batch_size=100).examples == 10


def test_refusals(make_model: ModelMaker) -> None:
    model, task = load(make_model("a"))
    with pytest.raises(InputError, match="data: has no labels to train on"):
        unlabelled = replace(data_of(EXAMPLES), labelled=False)
        recover(model, task, unlabelled, steps=1, learning_rate=1e-3)
    with pytest.raises(InputError, match="not finite after step 1; lower the learning rate"):
        run(load(make_model("b"))[0], task, steps=1, learning_rate=1e37)
    with torch.no_grad():
        model.module.get_parameter("classifier.weight").fill_(torch.inf)
    with pytest.raises(InputError, match="not finite at step 1; lower the learning rate"):
        run(model, task)
    assert not model.module.training


def test_nothing_is_printed_or_written(
    make_model: ModelMaker, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, task = load(make_model("a"))
    capfd.readouterr()
    files: Callable[[], list[Path]] = lambda: sorted(tmp_path.rglob("*"))  # noqa: E731
    before = files()
    run(model, task, steps=2)
    assert files() == before
    assert capfd.readouterr() == ("", "")
