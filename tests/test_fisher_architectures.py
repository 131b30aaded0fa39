"""Every kind of Fisher on every architecture, by the names on disk, against float64 autograd."""

import copy
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import VOCABULARY
from safetensors.torch import load_file
from test_fisher_diagonal import assert_same, estimate_diagonal, randomize, relative_error
from tiny import ARCHITECTURES, LABELS
from torch import Tensor
from torch.nn import functional
from transformers.core_model_loading import revert_weight_conversion

from fishertool.calibration import Example
from fishertool.checkpoint.reader import open_checkpoint
from fishertool.fisher.batches import Batch, micro_batches
from fishertool.fisher.estimate import Pass, estimate
from fishertool.fisher.factored import marginals
from fishertool.fisher.function_calls import base_of, offset_in
from fishertool.fisher.gradient_bank import GradientBank
from fishertool.fisher.kinds import Gathering, Stored
from fishertool.models.names import parameters_by_disk_name
from fishertool.models.tasks import LABELS as ANSWER
from fishertool.models.tasks import TASKS, collate

LENGTHS = (5, 2, 9, 4, 1, 7, 7, 3)
BOUND = 1e-5
EXPERTS = ("mixtral", "qwen3-moe")


class Tiny(NamedTuple):
    model: Any
    views: dict[str, Tensor]
    stored: dict[str, Tensor]


class Reference(NamedTuple):
    gradients: dict[str, Tensor]
    """[example, ...] by name on disk."""
    inputs: dict[tuple[str, int], Tensor]
    """All inputs [token, in] of a matrix, by its parameter and first row there."""
    outputs: dict[tuple[str, int], Tensor]
    """The gradients [token, out] of its outputs."""


@functools.cache
def _tiny(kind: str) -> Tiny:
    torch.manual_seed(0)
    model: Any = randomize(ARCHITECTURES[kind]()).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with open_checkpoint(Path(folder)) as checkpoint:
            views, rest = parameters_by_disk_name(model, checkpoint)
        stored = load_file(Path(folder) / "model.safetensors")
    assert rest == []
    return Tiny(model, views, stored)


def _batch(kind: str, indices: Sequence[int]) -> Batch:
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(4, len(VOCABULARY), (n,), generator=generator) for n in LENGTHS]
    if kind == "vit":
        pixels = torch.randn(len(LENGTHS), 3, 8, 8, generator=generator)[list(indices)]
        pixels = pixels.to(torch.get_default_dtype())
        classes = torch.tensor(indices) % LABELS
        return Batch({"pixel_values": pixels}, classes, torch.ones_like(classes).bool(), indices)
    both = "ForConditionalGeneration" in type(_tiny(kind).model).__name__
    examples = [
        Example(
            {"input_ids": ids.tolist()} | ({ANSWER: texts[-1 - n].tolist()} if both else {}),
            n % LABELS,
            0,
        )
        for n, ids in enumerate(texts)
    ]
    if both:
        return collate(TASKS["sequence-to-sequence"], examples, indices, 0, "cpu")
    classifies = "ForSequenceClassification" in type(_tiny(kind).model).__name__
    task = TASKS["sequence-classification" if classifies else "causal-lm"]
    return collate(task, examples, indices, 0, "cpu")


@functools.cache
def _reference(kind: str) -> Reference:
    """One backward pass an example, in float64; matrix products are seen by replacing `linear`."""
    model = copy.deepcopy(_tiny(kind).model).double().requires_grad_(True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    inputs: dict[tuple[str, int], list[Tensor]] = {}
    outputs: dict[tuple[str, int], list[Tensor]] = {}
    plain = functional.linear

    def seen(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = plain(x, weight, bias)
        key = names[id(base_of(weight))], offset_in(weight) // weight.shape[1]
        inputs.setdefault(key, []).append(x.detach().flatten(0, -2))
        keep = outputs.setdefault(key, []).append
        y.register_hook(lambda delta: keep(delta.flatten(0, -2)))  # type: ignore[no-untyped-call]
        return y

    gradients: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for n in range(len(LENGTHS)):
        batch = _batch(kind, [n])
        model.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(functional, "linear", seen)
            floats = {
                k: v.double() if v.is_floating_point() else v for k, v in batch.inputs.items()
            }
            log_p = torch.log_softmax(model(**floats).logits, -1)
        picked = log_p.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)
        picked[batch.scored].sum().backward()  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters():
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients[name].append(found.clone())
    on_disk = [
        revert_weight_conversion(model, {name: found[n] for name, found in gradients.items()})
        for n in range(len(LENGTHS))
    ]
    return Reference(
        {name: torch.stack([one[name] for one in on_disk]) for name in on_disk[0]},
        {key: torch.cat(rows) for key, rows in inputs.items()},
        {key: torch.cat(rows) for key, rows in outputs.items()},
    )


@functools.cache
def _gather(kind: str, size: int) -> tuple[Pass, dict[str, Stored], dict[str, dict[int, Tensor]]]:
    """All kinds in one pass, and the members of the bank."""
    model, views, _ = _tiny(kind)
    members: dict[str, dict[int, Tensor]] = {name: {} for name in views}

    def write(name: str, member: int, gradient: Tensor) -> None:
        assert member not in members[name]
        members[name][member] = gradient.reshape(views[name].shape).clone()

    bank = GradientBank(views, write, torch.float32)
    kinds = ["diagonal", "factored", "kronecker", "activation", "mean-gradient", "rank-one"]
    gathering = Gathering(kinds, views, bank)
    done = estimate(
        model,
        views,
        lambda indices: _batch(kind, indices),
        [micro_batches(LENGTHS, size=size)],
        gathering.statistics,
        probe=LENGTHS.index(2),
        inputs=gathering.inputs,
    )
    return done, gathering.stored(done.examples), members


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_names_and_shapes_are_those_on_disk(kind: str) -> None:
    _, views, stored = _tiny(kind)
    assert set(views) == set(stored)
    assert all(torch.equal(view, stored[name]) for name, view in views.items())


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_is_exact(kind: str, size: int) -> None:
    done, stored, members = _gather(kind, size)
    exact = {name: _reference(kind).gradients[name] for name in _tiny(kind).views}
    diagonal = {name: gradients.square().mean(0) for name, gradients in exact.items()}
    assert (done.by_autograd, done.one_by_one) == (set(), False)
    assert_same(dict(stored["diagonal"].tensors), diagonal, BOUND)
    factored = stored["factored"].tensors
    for name, value in diagonal.items():
        if float(value.max()) < 1e-12:  # without influence but for rounding
            continue
        rows, columns = marginals(value)
        if columns is None:
            assert relative_error(factored[name], rows) < BOUND, name
        else:
            assert relative_error(factored[f"{name}#rows"], rows) < BOUND, name
            assert relative_error(factored[f"{name}#columns"], columns) < BOUND, name
        bank = torch.stack([members[name][n] for n in range(len(LENGTHS))])
        assert relative_error(bank, exact[name]) < BOUND, name
        mean = exact[name].mean(0)
        error = (stored["mean-gradient"].tensors[name] - mean).norm()
        assert float(error) < BOUND * float(exact[name].norm()), name


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind != "gpt2"])
def test_kronecker_factors_are_second_moments(kind: str, size: int) -> None:
    """Of GPT-2, whose layers are no `linear`, test_fisher_kinds sees to."""
    model, views, _ = _tiny(kind)
    reference, stored = _reference(kind), _gather(kind, size)[1]["kronecker"]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = set()
    for name in stored.statistics:
        view = views[name]
        parameter = base_of(view)
        first = offset_in(view) // view.shape[1]
        key = max(k for k in reference.inputs if k <= (names[id(parameter)], first))
        seen.add(key)
        x, delta = reference.inputs[key], reference.outputs[key]
        delta = delta[:, first - key[1] :][:, : len(view)]
        a, b = stored.tensors[f"{stored.leaders[name]}#input"], stored.tensors[f"{name}#output"]
        assert relative_error(a, x.T @ x / len(x)) < BOUND, name
        if float(delta.abs().max()) > 1e-7:
            assert relative_error(b, delta.T @ delta / len(x)) < BOUND, name
    assert seen == set(reference.inputs)


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_count_their_tokens(kind: str, size: int) -> None:
    done, _, _ = _gather(kind, size)
    inputs = _reference(kind).inputs
    experts = {name for name in _tiny(kind).views if ".experts." in name}
    assert set(done.tokens) == experts and sum(done.tokens.values()) > 0
    layers, products, top_k = 2, 3, 2
    assert sum(done.tokens.values()) == layers * products * top_k * sum(LENGTHS)
    counts = sorted(len(x) for (name, _), x in inputs.items() if "gate_up_proj" in name)
    first = "w1" if kind == "mixtral" else "gate_proj"
    ours = [count for name, count in done.tokens.items() if f".{first}." in name and count]
    assert sorted(ours) == counts


@pytest.mark.parametrize("longest", [1, 2, 3])
def test_relative_biases_of_as_many_positions_as_examples_or_one(longest: int) -> None:
    """Their ids are [query, key], which may look like [example, time] or [1, time]."""
    model = copy.deepcopy(_tiny("t5").model)
    examples = [
        Example({"input_ids": [4 + n, 9, 5][:time], ANSWER: [6 + n, 8, 7][:time]}, None, 0)
        for n, time in enumerate((longest, longest, 1))
    ]
    task = TASKS["sequence-to-sequence"]
    alone, together = (
        estimate_diagonal(
            model,
            dict(model.named_parameters()),
            lambda indices: collate(task, examples, indices, 0, "cpu"),
            range(3),
            size,
        )
        for size in (1, 3)
    )
    assert not together.one_by_one
    assert_same(together.diagonal, {n: one.double() for n, one in alone.diagonal.items()}, BOUND)
