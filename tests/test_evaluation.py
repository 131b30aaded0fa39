"""Metrics against values computed by hand and by naive loops."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, make_bert, make_gpt2
from torch import Tensor, nn
from torch.nn import functional

from fishertool.calibration import CalibrationData, Example
from fishertool.errors import InputError
from fishertool.evaluation.agreement import divergence, same_top
from fishertool.evaluation.classification import classification_metrics
from fishertool.evaluation.comparison import Labels, class_order
from fishertool.evaluation.measure import HIGHER_IS_BETTER, measure, prepare
from fishertool.evaluation.perplexity import blocks, perplexity_metrics
from fishertool.models.loading import LoadedModel
from fishertool.models.tasks import TASKS

CLASSIFY, CAUSAL = TASKS["sequence-classification"], TASKS["causal-lm"]
LIMIT = 6


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def _log_p(predicted: Sequence[int], classes: int) -> Tensor:
    logits = torch.randn(len(predicted), classes, generator=_generator())
    logits[torch.arange(len(predicted)), list(predicted)] += 9
    return torch.log_softmax(logits, -1)


def test_classification_by_hand() -> None:
    """Classes 0 to 2: TP 2, 1, 0; FP 0, 1, 1; FN 1, 0, 1. Class 3 occurs nowhere."""
    predicted, targets = [0, 0, 1, 1, 2], [0, 0, 0, 1, 1]
    p = torch.full((5, 4), 0.1)
    p[torch.arange(5), predicted] = 0.7
    metrics = classification_metrics(p.log(), torch.tensor(targets))
    assert metrics["accuracy"] == pytest.approx(3 / 5)
    assert metrics["macro_f1"] == pytest.approx((4 / 5 + 2 / 4 + 0) / 3)
    assert metrics["loss"] == pytest.approx(-(3 * math.log(0.7) + 2 * math.log(0.1)) / 5)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("absent", [None, "from targets", "from both"])
def test_classification_by_a_naive_loop(classes: int, absent: str | None) -> None:
    predicted = torch.randint(classes, (40,), generator=_generator()).tolist()
    targets = torch.randint(classes, (40,), generator=_generator().manual_seed(6)).tolist()
    if absent is not None:
        targets = [0 if target == 1 else target for target in targets]
    if absent == "from both":
        predicted = [0 if one == 1 else one for one in predicted]
    log_p = _log_p(predicted, classes)
    scores = []
    for c in sorted({*predicted, *targets}):
        tp = sum(p == c and t == c for p, t in zip(predicted, targets, strict=True))
        fp = sum(p == c and t != c for p, t in zip(predicted, targets, strict=True))
        fn = sum(p != c and t == c for p, t in zip(predicted, targets, strict=True))
        precision = tp / (tp + fp) if tp else 0.0
        recall = tp / (tp + fn) if tp else 0.0
        scores.append(2 * precision * recall / (precision + recall) if tp else 0.0)
    metrics = classification_metrics(log_p, torch.tensor(targets))
    right = sum(p == t for p, t in zip(predicted, targets, strict=True))
    losses = [-float(log_p[n, target]) for n, target in enumerate(targets)]
    assert metrics["macro_f1"] == pytest.approx(sum(scores) / len(scores))
    assert metrics["accuracy"] == pytest.approx(right / 40)
    assert metrics["loss"] == pytest.approx(sum(losses) / 40, rel=1e-6)


def test_perplexity_and_bits_per_byte_by_hand() -> None:
    metrics = perplexity_metrics(nll=12 * math.log(2), tokens=4, text_bytes=24)
    wanted = {"loss": 3 * math.log(2), "perplexity": 8.0, "bits_per_byte": 0.5}
    assert metrics == pytest.approx(wanted)
    assert perplexity_metrics(1e6, 10, 0)["perplexity"] == math.inf


@pytest.mark.parametrize("length", [1, 2, LIMIT - 1, LIMIT, LIMIT + 1, 2 * LIMIT - 1, 3 * LIMIT])
def test_blocks_score_every_token_but_the_first_once(length: int) -> None:
    text = Example({"input_ids": list(range(length)), "token_type_ids": [7] * length}, 1, 99)
    cut = list(blocks(text, LIMIT))
    scored = [token for block in cut for token in block.inputs["input_ids"][1:]]
    assert scored == list(range(1, length))
    assert all(2 <= block.length <= LIMIT for block in cut)
    assert all(block.length == LIMIT for block in cut[:-1])
    assert all(block.inputs["token_type_ids"] == [7] * block.length for block in cut)
    assert sum(block.text_bytes for block in cut) == (99 if length > 1 else 0)


@pytest.mark.parametrize("shape", [(3,), (4, 7), (2, 3, 5)], ids=str)
def test_divergence_is_kl_of_the_original_from_the_model(shape: tuple[int, ...]) -> None:
    original = torch.log_softmax(3 * torch.randn(shape, generator=_generator()).double(), -1)
    model = torch.log_softmax(torch.randn(shape, generator=_generator()).double(), -1)
    wanted = functional.kl_div(model, original, reduction="none", log_target=True).sum(-1)
    found = divergence(original, model)
    torch.testing.assert_close(found, wanted)
    assert (found > 0).all() and not divergence(model, model).any()
    assert not torch.allclose(found, divergence(model, original))


def test_divergence_with_an_impossible_class() -> None:
    half = torch.tensor([0.5, 0.5, 0.0]).log()
    other = torch.tensor([0.25, 0.5, 0.25]).log()
    torch.testing.assert_close(divergence(half, other), torch.tensor(0.5 * math.log(2)))
    torch.testing.assert_close(divergence(half, half), torch.tensor(0.0))
    assert divergence(other, half) == math.inf


def test_same_top_compares_the_most_probable_class() -> None:
    first, second = _log_p([0, 1, 2, 2], 3), _log_p([0, 2, 2, 1], 3)
    assert same_top(first, second).tolist() == [True, False, True, False]


@pytest.mark.parametrize("where", [0, 1], ids=["original", "model"])
def test_a_nan_is_in_every_metric(where: int) -> None:
    broken, sound = _log_p([0, 1], 3), _log_p([0, 1], 3)
    broken[0, 2] = math.nan
    sound[0, 2] = -math.inf
    pair = (broken, sound) if where == 0 else (sound, broken)
    for values in (divergence(*pair), same_top(*pair)):
        assert values.isnan().tolist() == [True, False]
    classified = classification_metrics(broken, torch.tensor([0, 1]))
    assert classified.keys() == classification_metrics(sound, torch.tensor([0, 1])).keys()
    for value in (*classified.values(), *perplexity_metrics(math.nan, 4, 9).values()):
        assert math.isnan(value)


def _model(kind: str, seed: int = 0, labels: int = 3) -> LoadedModel:
    torch.manual_seed(seed)
    module: nn.Module = make_bert(labels) if kind == "bert" else make_gpt2()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(4)
    names = {f"class{n}": n for n in range(labels)} if kind == "bert" else None
    return LoadedModel(module.eval(), None, 0, names, 32)


def _data(lengths: Sequence[int] = (5, 2, 14, 7, 3, 1, 9)) -> CalibrationData:
    examples = []
    for n, length in enumerate(lengths):
        ids = torch.randint(4, len(VOCABULARY), (length,), generator=_generator().manual_seed(n))
        examples.append(Example({"input_ids": ids.tolist()}, n % 3, 10 * length))
    return CalibrationData(examples, "texts", 0, 0, LIMIT)


def _labels() -> Tensor:
    return torch.tensor([example.label for example in _data().examples])


def _next_tokens() -> list[int]:
    return [token for example in _data().examples for token in example.inputs["input_ids"][1:]]


def _naive(model: LoadedModel) -> list[Tensor]:
    """Log-probabilities of every prediction, a text or a block at a time, without padding."""
    found: list[Tensor] = []
    for example in _data().examples:
        ids = example.inputs["input_ids"]
        for start in [0] if model.labels else range(0, len(ids) - 1, LIMIT - 1):
            block = ids if model.labels else ids[start : start + LIMIT]
            logits = model.module(input_ids=torch.tensor([block])).logits.detach().double()
            found += torch.log_softmax(logits if model.labels else logits[0, :-1], -1)
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_measure_a_language_model(batch_size: int) -> None:
    model, other = _model("gpt2"), _model("gpt2", seed=1)
    steps: list[int] = []
    prepared = prepare(CAUSAL, _data())
    found = measure(
        model, CAUSAL, prepared, against=other, batch_size=batch_size, advance=steps.append
    )
    log_p, log_q, targets = _naive(model), _naive(other), _next_tokens()
    nll = -sum(float(row[target]) for row, target in zip(log_p, targets, strict=True))
    text_bytes = sum(example.text_bytes for example in _data().examples if example.length > 1)
    assert found["loss"] == pytest.approx(nll / len(targets), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nll / len(targets)), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nll / math.log(2) / text_bytes, rel=1e-5)
    _check_against(found, log_p, log_q)
    assert sum(steps) == len(prepared.examples)
    assert found.keys() == {"loss", "perplexity", "bits_per_byte", "kl", "top1_agreement"}


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_measure_a_classifier(batch_size: int) -> None:
    model, other = _model("bert"), _model("bert", seed=1)
    found = measure(model, CLASSIFY, _data(), against=other, batch_size=batch_size)
    log_p, log_q = _naive(model), _naive(other)
    wanted = classification_metrics(torch.stack(log_p), _labels())
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    _check_against(found, log_p, log_q)
    assert found.keys() == {*wanted, "kl", "top1_agreement"}
    assert found.keys() <= HIGHER_IS_BETTER.keys()


def _check_against(found: dict[str, float], log_p: list[Tensor], log_q: list[Tensor]) -> None:
    pairs = list(zip(log_p, log_q, strict=True))
    kl = sum(float((q.exp() * (q - p)).sum()) for p, q in pairs) / len(pairs)
    agreement = sum(int(p.argmax()) == int(q.argmax()) for p, q in pairs) / len(pairs)
    assert kl > 1e-3 and agreement < 1
    assert found["kl"] == pytest.approx(kl, rel=1e-4)
    assert found["top1_agreement"] == pytest.approx(agreement)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_model_against_itself(kind: str) -> None:
    model, task = _model(kind), CLASSIFY if kind == "bert" else CAUSAL
    found = measure(model, task, prepare(task, _data()), against=model, batch_size=3)
    alone = measure(model, task, prepare(task, _data()), batch_size=3)
    assert (found["kl"], found["top1_agreement"]) == (0.0, 1.0)
    assert alone == {name: found[name] for name in alone} and "kl" not in alone


def test_rounding_takes_no_divergence_below_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fishertool.evaluation.measure.divergence", lambda log_p, log_q: log_p[:, 0] * 1e-9
    )
    found = measure(_model("bert"), CLASSIFY, _data(), against=_model("bert"))
    assert found["kl"] == 0.0


def test_models_of_other_classes_are_refused() -> None:
    model, other = _model("bert"), _model("bert", labels=4)
    with pytest.raises(InputError, match="the models have other classes, only one of them class3"):
        measure(model, CLASSIFY, _data(), against=other)
    unnamed = replace(other, labels={f"LABEL_{n}": n for n in range(4)})
    with pytest.raises(InputError, match="predict 3 and 4 classes"):
        measure(model, CLASSIFY, _data(), against=unnamed)


ABC = {"a": 0, "b": 1, "c": 2}
UNNAMED = {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}


@pytest.mark.parametrize(
    ("labels", "others", "order"),
    [
        (ABC, ABC, None),
        (ABC, {"c": 0, "a": 1, "b": 2}, [1, 2, 0]),
        ({"c": 2, "a": 0, "b": 1}, {"C": 0, "A": 1, "B": 2}, [1, 2, 0]),
        (ABC, UNNAMED, None),
        (UNNAMED, ABC, None),
        (UNNAMED, {"LABEL_1": 0, "LABEL_0": 1, "LABEL_2": 2}, [1, 0, 2]),
        (None, None, None),
    ],
)
def test_classes_are_paired_by_name(labels: Labels, others: Labels, order: list[int]) -> None:
    assert class_order(labels, others) == order


@pytest.mark.parametrize("others", [{"a": 0, "b": 1, "d": 2}, {**ABC, "d": 3}, {"a": 0, "b": 1}])
def test_classes_of_other_names(others: Labels) -> None:
    with pytest.raises(InputError, match=r"x and y have other classes, only one of them (c|d)"):
        class_order(ABC, others, "x and y")


def test_two_classes_of_one_name_are_not_paired() -> None:
    with pytest.raises(InputError, match="the models have other classes"):
        class_order({"a": 1, "b": 2}, {"b": 1, "a": 2})  # of three classes, a twice


@pytest.mark.parametrize("fault", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_model_that_is_not_finite(kind: str, fault: float) -> None:
    model, task = _model(kind), CLASSIFY if kind == "bert" else CAUSAL
    broken, data = _model(kind, seed=1), prepare(task, _data())

    def spoil(_: nn.Module, __: object, output: Any) -> None:
        output.logits[..., 1] = fault

    broken.module.register_forward_hook(spoil)
    sound = measure(model, task, data)
    alone = measure(broken, task, data)
    assert alone.keys() == sound.keys() and all(map(math.isnan, alone.values()))
    assert all(map(math.isnan, measure(broken, task, data, against=model).values()))
    compared = measure(model, task, data, against=broken)
    assert {name: compared.pop(name) for name in sound} == sound
    assert compared and all(map(math.isnan, compared.values()))


def test_prepare() -> None:
    data = _data()
    assert prepare(CLASSIFY, data) is data
    prepared = prepare(CAUSAL, data)
    wanted = [block for text in data.examples for block in blocks(text, LIMIT)]
    assert prepared == replace(data, examples=wanted) and len(wanted) > len(data.examples)
    with pytest.raises(InputError, match="texts: no text has two tokens"):
        prepare(CAUSAL, _data([1, 1]))
