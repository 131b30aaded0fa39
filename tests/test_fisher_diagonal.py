"""The diagonal on real architectures, against one float64 backward pass an example and label."""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
import transformers
from conftest import VOCABULARY, make_bert, make_gpt2, make_llama
from torch import Tensor, nn

from fishertool.calibration import Example
from fishertool.errors import InputError
from fishertool.fisher.batches import Batch
from fishertool.fisher.diagonal import Diagonal, add_squares
from fishertool.fisher.estimate import Pass, estimate
from fishertool.fisher.gradients import Gradient, OuterProducts, ScatteredRows, Whole
from fishertool.fisher.labels import Labels
from fishertool.fisher.layers import linear, transposed_linear
from fishertool.models.tasks import TASKS, collate

CLASSES = 3
COUNT = 8
PAD = 0
MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": make_bert,
    "gpt2": make_gpt2,
    "llama": make_llama,
    "llama-tied": lambda: make_llama(tied=True),
    "gpt2-classifier": lambda: _classifier("GPT2", make_gpt2),
    "llama-classifier": lambda: _classifier("Llama", make_llama),
}
CASES: list[tuple[str, Labels]] = [
    ("bert", "empirical"),
    ("bert", "expected"),
    ("gpt2", "empirical"),
    ("llama", "empirical"),
    ("llama-tied", "empirical"),
    ("gpt2-classifier", "empirical"),
    ("gpt2-classifier", "expected"),
    ("llama-classifier", "expected"),
]


def randomize(model: nn.Module, spread: float = 0.15) -> nn.Module:
    """Move every weight off its initial value: no bias is zero, no norm is one. The seed is fixed."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return model


def reference(
    model: nn.Module,
    examples: Sequence[tuple[dict[str, Tensor], Tensor]],
    labels: Literal["empirical", "expected"],
) -> dict[str, Tensor]:
    """The definition: F_j = 1/N sum_n sum_y q_n(y) (d log p(y | x_n) / d w_j)^2, one example at a time.

    Each example is its inputs, with one row, and its targets: [1] a class, or [1, time] the next
    tokens of all positions but the last, whose log-probabilities are added up.
    """
    exact = copy.deepcopy(model).double().eval().requires_grad_(True)
    parameters = dict(exact.named_parameters())
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for inputs, targets in examples:
        log_p = torch.log_softmax(exact(**inputs).logits.double(), -1)[0]
        weighted = []
        if labels == "expected":
            weighted = [(float(value.exp().detach()), value) for value in log_p]
        elif targets.dim() == 1:
            weighted = [(1.0, log_p[int(targets)])]
        elif targets.numel():
            tokens = enumerate(targets[0].tolist())
            weighted = [(1.0, torch.stack([log_p[time, token] for time, token in tokens]).sum())]
        for weight, score in weighted:
            gradients = torch.autograd.grad(
                score, list(parameters.values()), retain_graph=True, allow_unused=True
            )
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    total += weight * gradient**2
    return {name: total / len(examples) for name, total in sums.items()}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    distance = torch.linalg.vector_norm(actual.double() - expected.double())
    return float(distance / torch.linalg.vector_norm(expected.double()).clamp(min=1e-300))


def assert_same(
    actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-5
) -> None:
    """Tensor by tensor; one that should be zero must be zero, but for rounding: a key's bias has no
    influence at all (softmax), yet a gradient of 1e-9."""
    assert actual.keys() == expected.keys()
    largest = max(float(value.max()) for value in expected.values())
    for name, value in expected.items():
        assert actual[name].shape == value.shape
        if float(value.max()) < 1e-12 * largest:
            assert float(actual[name].max()) < 1e-12 * largest, name
        else:
            assert relative_error(actual[name], value) < bound, name


def _classifier(family: str, maker: Callable[..., Any]) -> nn.Module:
    config = maker(num_labels=CLASSES).config
    config.pad_token_id = PAD
    model: nn.Module = getattr(transformers, f"{family}ForSequenceClassification")(config)
    return model


def _model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return randomize(MODELS[kind]())


def _examples() -> list[Example]:
    """Texts of 1 to 9 tokens, out of order, with repeated tokens; no padding token among them."""
    generator = torch.Generator().manual_seed(1)
    lengths = (5, 2, 9, 4, 1, 7, 7, 3)
    texts = [torch.randint(4, len(VOCABULARY), (n,), generator=generator) for n in lengths]
    return [Example({"input_ids": ids.tolist()}, n % CLASSES, 0) for n, ids in enumerate(texts)]


def _unpadded(kind: str) -> list[tuple[dict[str, Tensor], Tensor]]:
    ids = [torch.tensor([example.inputs["input_ids"]]) for example in _examples()]
    if kind in ("gpt2", "llama", "llama-tied"):
        return [({"input_ids": one}, one[:, 1:]) for one in ids]
    return [({"input_ids": one}, torch.tensor([n % CLASSES])) for n, one in enumerate(ids)]


@functools.cache
def _expected(kind: str, labels: Literal["empirical", "expected"]) -> dict[str, Tensor]:
    return reference(_model(kind), _unpadded(kind), labels)


def _collate(kind: str) -> Callable[[Sequence[int]], Batch]:
    causal = kind in ("gpt2", "llama", "llama-tied")
    task, examples = TASKS["causal-lm" if causal else "sequence-classification"], _examples()
    return lambda indices: collate(task, examples, indices, PAD, "cpu")


@dataclass
class Estimate(Pass):
    diagonal: dict[str, Tensor] = field(default_factory=dict)


def estimate_diagonal(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    collate: Callable[[Sequence[int]], Batch],
    order: Sequence[int],
    batch_size: int,
    **options: Any,
) -> Estimate:
    """Of the examples in this order; `options` are those of `estimate`."""
    diagonal = Diagonal({name: parameter.detach() for name, parameter in parameters.items()})
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    done = estimate(model, parameters, collate, [batches], [diagonal], probe=order[-1], **options)
    return Estimate(**vars(done), diagonal=dict(diagonal.mean(done.examples)))


def _estimate(
    kind: str, labels: Labels, batch_size: int, model: nn.Module | None = None, **more: Any
) -> Estimate:
    model = model or _model(kind)
    parameters = more.pop("parameters", dict(model.named_parameters()))
    return estimate_diagonal(
        model, parameters, _collate(kind), range(COUNT), batch_size, labels=labels, **more
    )


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize(("kind", "labels"), CASES)
def test_is_the_mean_of_each_examples_squared_gradient(
    kind: str, labels: Literal["empirical", "expected"], batch_size: int
) -> None:
    estimate = _estimate(kind, labels, batch_size)
    assert (estimate.examples, estimate.one_by_one, estimate.by_autograd) == (COUNT, False, set())
    assert_same(estimate.diagonal, _expected(kind, labels))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama-tied"])
def test_the_squared_batch_gradient_is_something_else(kind: str) -> None:
    """The shortcut of much public code, at either scale, is far off; so the tests above can tell."""
    model, batch = _model(kind).eval(), _collate(kind)(range(COUNT))
    log_p = torch.log_softmax(model(**batch.inputs).logits, -1)
    picked = log_p.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)[batch.scored]
    gradients = torch.autograd.grad(picked.sum(), list(model.parameters()))
    exact = torch.cat([value.flatten() for value in _expected(kind, "empirical").values()])
    summed = torch.cat([gradient.flatten() for gradient in gradients])
    for shortcut in (summed.square() / COUNT, summed.square() / COUNT**2):
        assert relative_error(shortcut, exact) > 0.3
    ours = torch.cat([v.flatten() for v in _estimate(kind, "empirical", COUNT).diagonal.values()])
    assert relative_error(ours, exact) < 1e-5


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_sampled_labels_do_not_depend_on_the_batch_size(kind: str) -> None:
    one = _estimate(kind, "sampled", 1, draws=2, seed=5).diagonal
    for batch_size in (3, 8):
        assert_same(_estimate(kind, "sampled", batch_size, draws=2, seed=5).diagonal, one)
    other = _estimate(kind, "sampled", 8, draws=2, seed=6).diagonal
    assert max(relative_error(other[name], one[name]) for name in one) > 0.05


def test_reports_loss_predictions_and_progress() -> None:
    steps: list[int] = []
    estimate = _estimate("gpt2", "empirical", 3, advance=steps.append)
    model = _model("gpt2").double().eval().requires_grad_(False)
    losses: list[float] = []
    for inputs, targets in _unpadded("gpt2"):
        log_p = torch.log_softmax(model(**inputs).logits[0], -1)
        losses += [-float(log_p[time, token]) for time, token in enumerate(targets[0].tolist())]
    assert estimate.scored == len(losses) and steps == [3, 3, 2]
    assert estimate.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_bfloat16_is_within_a_few_per_cent(kind: str) -> None:
    model = _model(kind).bfloat16()
    exact = _estimate(kind, "empirical", 3, copy.deepcopy(model).float()).diagonal
    rounded = _estimate(kind, "empirical", 3, model).diagonal
    errors = [
        ((rounded[name] - value).abs() / value)[value > 1e-3 * value.mean()]
        for name, value in exact.items()
        if not name.endswith("key.bias")
    ]
    assert all(value.dtype == torch.float32 for value in rounded.values())
    assert float(torch.cat(errors).median()) < 0.05


def test_some_parameters_alone_get_the_same_numbers() -> None:
    model, whole = _model("llama-tied"), _estimate("llama-tied", "empirical", 3).diagonal
    some = {
        name: parameter
        for name, parameter in model.named_parameters()
        if "layers.1.mlp" in name or "layers.0.self_attn" in name or name.endswith("norm.weight")
    }
    alone = _estimate("llama-tied", "empirical", 3, model, parameters=some).diagonal
    assert 0 < len(alone) < len(whole)
    assert_same(alone, {name: whole[name] for name in some}, 1e-6)


def test_model_is_left_in_eval_mode_and_otherwise_as_it_was() -> None:
    model = _model("bert").train()  # with dropout
    names = dict(model.named_parameters())
    for number, parameter in enumerate(names.values()):
        parameter.requires_grad_(number % 2 == 0)
    before = {name: parameter.detach().clone() for name, parameter in names.items()}
    estimate = _estimate("bert", "empirical", 3, model)
    assert_same(estimate.diagonal, _expected("bert", "empirical"))
    assert not model.training and not any(module.training for module in model.modules())
    for number, (name, parameter) in enumerate(names.items()):
        assert torch.equal(parameter, before[name]) and parameter.grad is None
        assert parameter.requires_grad == (number % 2 == 0)
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def _broken_gpt2() -> tuple[nn.Module, list[int]]:
    """One whose loss is NaN wherever a certain token is predicted from, and those examples."""
    model = _model("gpt2")
    token = _examples()[2].inputs["input_ids"][-1]
    texts = [e.inputs["input_ids"] for e in _examples()]
    with torch.no_grad():
        model.get_parameter("transformer.wte.weight")[token] = float("nan")
        model.lm_head = nn.Linear(16, len(VOCABULARY), bias=False)  # or the NaN is in every logit
    return model, [n for n, ids in enumerate(texts) if token in ids and len(ids) > 1]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_example_without_a_finite_loss_is_named(batch_size: int) -> None:
    model, broken = _broken_gpt2()
    with pytest.raises(
        InputError, match=f"example {broken[0]}: .* not finite; estimate-fisher --skip-nonfinite"
    ):
        _estimate("gpt2", "empirical", batch_size, model)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_examples_without_a_finite_loss_can_be_skipped(batch_size: int) -> None:
    model, broken = _broken_gpt2()
    found = _estimate("gpt2", "empirical", batch_size, model, skip_nonfinite=True)
    assert 0 < len(broken) < COUNT
    assert (found.skipped, found.examples) == (len(broken), COUNT - len(broken))
    rest = [n for n in range(COUNT) if n not in broken]
    assert found.tokens_read == sum(_examples()[n].tokens for n in rest)
    expected = estimate_diagonal(
        model, dict(model.named_parameters()), _collate("gpt2"), rest, batch_size
    )
    assert_same(found.diagonal, expected.diagonal)
    assert found.loss == pytest.approx(expected.loss)


def test_data_in_which_nothing_is_predicted_scores_nothing() -> None:
    examples = [Example({"input_ids": [5]}, None, 0)] * 2
    model = _model("gpt2")
    estimate = estimate_diagonal(
        model,
        dict(model.named_parameters()),
        lambda indices: collate(TASKS["causal-lm"], examples, indices, PAD, "cpu"),
        range(2),
        2,
    )
    assert estimate.scored == 0
    assert not any(bool(value.any()) for value in estimate.diagonal.values())


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (1500, 900)], ids=str)
@pytest.mark.parametrize("time", [1, 4])
def test_add_squares_of_every_form(shape: tuple[int, int], time: int) -> None:
    """Alone and summed, in one tile and in several, added to what is there already."""
    rows, width = shape
    generator = torch.Generator().manual_seed(2)
    left = torch.randn(3, time, rows, generator=generator)
    right = torch.randn(3, time, width, generator=generator)
    ids = torch.randint(rows, (3, time), generator=generator)
    ids[:, -1] = ids[:, 0]
    values = torch.randn(3, time, width, generator=generator)
    whole = torch.randn(3, rows, width, generator=generator)
    forms: dict[str, tuple[Gradient, Tensor]] = {
        "outer": (OuterProducts(left, right), torch.einsum("ntr,ntw->nrw", left, right).double()),
        "rows": (ScatteredRows(ids, values), torch.zeros(3, rows, width, dtype=torch.float64)),
        "whole": (Whole(whole), whole.double()),
    }
    for n in range(3):
        for t in range(time):
            forms["rows"][1][n, ids[n, t]] += values[n, t]
    for names in (["outer"], ["rows"], ["whole"], ["outer", "rows"], ["rows", "whole", "outer"]):
        total = torch.ones(rows, width, dtype=torch.float64)
        norms = torch.ones(3, dtype=torch.float64)
        add_squares(total, [forms[name][0] for name in names], norms)
        dense = sum((forms[name][1] for name in names), torch.zeros(()))
        torch.testing.assert_close(total, 1 + dense.square().sum(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norms, 1 + dense.square().sum((1, 2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", [linear, transposed_linear])
@pytest.mark.parametrize("read", [[], [0], [1, 3], [0, 1, 2, 3]], ids=str)
def test_a_linear_layer_of_which_some_tokens_are_read(rule: Any, read: list[int]) -> None:
    """What is left out is zero in every example and every feature."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 4, 5, generator=generator)
    delta = torch.zeros(3, 4, 6)
    delta[:, read] = torch.randn(3, len(read), 6, generator=generator)
    delta[0] = 0
    delta[:, read[-1:], 0] = 0
    module = nn.Linear(5, 6)
    found = rule(module, x.flatten(0, 1), delta.flatten(0, 1), 3)
    weight = found["weight"]
    assert weight.left.shape[1] == weight.right.shape[1] == len(read)
    exact = torch.einsum("nto,nti->noi" if rule is linear else "nto,nti->nio", delta, x)
    total, norms = torch.zeros(exact.shape[1:]).double(), torch.zeros(3).double()
    add_squares(total, [weight], norms)
    torch.testing.assert_close(total, exact.double().square().sum(0))
    torch.testing.assert_close(norms, exact.double().square().sum((1, 2)))
    torch.testing.assert_close(found["bias"].values, delta.sum(1)[..., None])
