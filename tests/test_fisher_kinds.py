"""Factored, Kronecker, activation, rank-one: against float64 autograd, one example at a time."""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from conftest import VOCABULARY, make_bert, make_gpt2, make_llama
from test_fisher_diagonal import randomize, relative_error
from torch import Tensor, nn

from fishertool.calibration import Example
from fishertool.fisher.batches import Batch, micro_batches
from fishertool.fisher.estimate import Pass, estimate
from fishertool.fisher.factored import Factored, add_marginals, expand, marginals
from fishertool.fisher.function_calls import FunctionCalls
from fishertool.fisher.gradient_bank import BLOCK_ELEMENTS, GradientBank
from fishertool.fisher.gradients import OuterProducts, Whole
from fishertool.fisher.header import PIECE_ELEMENTS, statistics_of
from fishertool.fisher.kinds import Gathering, Stored
from fishertool.fisher.kronecker import InputMoments, OutputMoments, add_gram, mirrored
from fishertool.fisher.layers import linear, rule_for, transposed_linear
from fishertool.models.tasks import TASKS, collate

MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": make_bert,
    "gpt2": make_gpt2,
    "llama": make_llama,
    "llama-tied": functools.partial(make_llama, tied=True),
}
LENGTHS = (5, 2, 9, 4, 1, 7, 7, 3)
BOUND = 1e-5


class Reference(NamedTuple):
    gradients: dict[str, Tensor]
    """[example, ...]"""
    inputs: dict[str, Tensor]
    """Linear layer's weight -> sum over tokens of x x^T."""
    outputs: dict[str, Tensor]


def _examples() -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(4, len(VOCABULARY), (n,), generator=generator) for n in LENGTHS]
    return [Example({"input_ids": ids.tolist()}, n % 3, 0) for n, ids in enumerate(texts)]


def _model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return randomize(MODELS[kind]())


def _batch(kind: str, indices: Sequence[int]) -> Batch:
    task = TASKS["sequence-classification" if kind == "bert" else "causal-lm"]
    return collate(task, _examples(), indices, 0, "cpu")


@functools.cache
def _reference(kind: str) -> Reference:
    """One float64 backward pass an example; plain hooks see inputs and outputs of linear layers."""
    model = copy.deepcopy(_model(kind)).double().eval()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def add(sums: dict[str, Tensor], name: str, rows: Tensor) -> None:
        rows = rows.detach().reshape(-1, rows.shape[-1])
        sums[name] = sums.get(name, 0) + rows.T @ rows

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        name = names[id(module.weight)]
        add(inputs, name, args[0])
        output.register_hook(lambda delta: add(outputs, name, delta))  # type: ignore[no-untyped-call]

    for module in model.modules():
        if rule_for(module) in (linear, transposed_linear):
            module.register_forward_hook(hook)
    gradients: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for n in range(len(LENGTHS)):
        model.zero_grad()
        batch = _batch(kind, [n])
        log_p = torch.log_softmax(model(**batch.inputs).logits, -1)
        picked = log_p.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)
        picked[batch.scored].sum().backward()  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters():
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients[name].append(found.clone())
    stacked = {name: torch.stack(found) for name, found in gradients.items()}
    return Reference(stacked, inputs, outputs)


def _gather(
    kind: str,
    kinds: Sequence[str],
    batches: Sequence[Sequence[int]],
    bank: GradientBank | None = None,
) -> tuple[Pass, dict[str, Stored]]:
    model = _model(kind)
    gathering = Gathering(kinds, dict(model.named_parameters()), bank)
    done = estimate(
        model,
        dict(model.named_parameters()),
        lambda indices: _batch(kind, indices),
        [batches],
        gathering.statistics,
        probe=batches[-1][-1],
        inputs=gathering.inputs,
    )
    return done, gathering.stored(done.examples)


BATCHES = [micro_batches(LENGTHS, size=size) for size in (1, 3, 8)]


@pytest.mark.parametrize("batches", BATCHES, ids=lambda batches: f"size{len(batches[0])}")
@pytest.mark.parametrize("kind", MODELS)
def test_factored_has_the_diagonals_row_and_column_sums(
    kind: str, batches: list[list[int]]
) -> None:
    _, alone = _gather(kind, ["factored"], batches)
    _, beside = _gather(kind, ["diagonal", "factored"], batches)
    for name, gradients in _reference(kind).gradients.items():
        diagonal = gradients.square().mean(0)
        if float(diagonal.max()) < 1e-15:  # a key's bias has no influence but by rounding
            continue
        for found in (alone["factored"], beside["factored"]):
            if diagonal.dim() < 2:
                assert relative_error(found.tensors[name], diagonal) < BOUND
                continue
            assert relative_error(found.tensors[f"{name}#rows"], diagonal.sum(1)) < BOUND, name
            assert relative_error(found.tensors[f"{name}#columns"], diagonal.sum(0)) < BOUND, name
            statistic = found.statistics[name]
            full = expand(diagonal.sum(1), diagonal.sum(0))
            assert statistic.total == pytest.approx(float(diagonal.sum()), rel=1e-4)
            assert statistic.squares == pytest.approx(float(full.square().sum()), rel=1e-4)


@pytest.mark.parametrize("shape", [(1, 3), (3, 1), (7, 5), (40, 30)], ids=str)
@pytest.mark.parametrize("time", [1, 2, 9])
def test_marginals_without_forming_the_gradient(shape: tuple[int, int], time: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(4, time, shape[0], generator=generator)
    right = torch.randn(4, time, shape[1], generator=generator)
    squares = (left.double().mT @ right.double()).square()
    rows, columns = (torch.ones(side, dtype=torch.float64) for side in shape)
    norms = torch.ones(4, dtype=torch.float64)
    add_marginals(rows, columns, OuterProducts(left, right), norms)
    assert relative_error(rows - 1, squares.sum((0, 2))) < BOUND
    assert relative_error(columns - 1, squares.sum((0, 1))) < BOUND
    assert relative_error(norms - 1, squares.sum((1, 2))) < BOUND


def test_factored_takes_the_way_that_costs_less() -> None:
    """Long texts through narrow layers form the gradient; both ways agree."""
    parameter = torch.zeros(6, 4)
    generator = torch.Generator().manual_seed(0)
    for time in (1, 50):
        left, right = (torch.randn(2, time, n, generator=generator) for n in (6, 4))
        part = OuterProducts(left, right)
        factored = Factored({"w": parameter})
        factored.begin([0, 1])
        factored.add("w", [part])
        squares = (part.left.double().mT @ part.right.double()).square().sum(0)
        rows, columns = factored.mean(1)["w"]
        assert columns is not None
        assert relative_error(rows, squares.sum(1)) < BOUND
        assert relative_error(columns, squares.sum(0)) < BOUND


def test_expansion_keeps_the_marginals_and_zeros() -> None:
    diagonal = torch.rand(5, 3, generator=torch.Generator().manual_seed(0))
    rows, columns = marginals(diagonal)
    assert columns is not None
    torch.testing.assert_close(marginals(expand(rows, columns)), (rows, columns))
    assert not expand(torch.zeros(5), torch.zeros(3)).any()


@pytest.mark.parametrize("batches", BATCHES, ids=lambda batches: f"size{len(batches[0])}")
@pytest.mark.parametrize("kind", MODELS)
def test_kronecker_factors_are_second_moments_over_tokens(
    kind: str, batches: list[list[int]]
) -> None:
    _, stored = _gather(kind, ["kronecker", "activation"], batches)
    _, forward_only = _gather(kind, ["activation"], batches)
    reference, found = _reference(kind), stored["kronecker"]
    assert set(found.statistics) == set(reference.inputs) == set(reference.outputs)
    for name, total in reference.inputs.items():
        pooled = name.startswith(("bert.pooler", "classifier"))
        tokens = len(LENGTHS) if pooled else sum(LENGTHS)
        a = total / tokens
        b = reference.outputs[name] / tokens
        assert relative_error(found.tensors[f"{name}#output"], b) < BOUND, name
        for one in (found, stored["activation"], forward_only["activation"]):
            assert relative_error(one.tensors[f"{one.leaders[name]}#input"], a) < BOUND, name
        diagonal = torch.outer(b.diagonal(), a.diagonal()) * tokens / len(LENGTHS)
        assert found.statistics[name].total == pytest.approx(float(diagonal.sum()), rel=1e-4)
        assert found.statistics[name].squares == pytest.approx(float(diagonal.square().sum()), 1e-4)


def test_layers_with_one_input_share_its_moment() -> None:
    _, stored = _gather("llama", ["activation"], BATCHES[1])
    layer = "model.layers.0."
    attention = {stored["activation"].leaders[f"{layer}self_attn.{x}_proj.weight"] for x in "qkv"}
    mlp = {stored["activation"].leaders[f"{layer}mlp.{x}_proj.weight"] for x in ("gate", "up")}
    assert attention == {f"{layer}self_attn.q_proj.weight"}
    assert mlp == {f"{layer}mlp.gate_proj.weight"}
    assert len(stored["activation"].tensors) == 4 * 2 + 1  # and the output layer


def test_equal_inputs_in_other_memory_do_not_share() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    parameters = dict(model.named_parameters())
    moments = InputMoments(parameters)
    with FunctionCalls(model, parameters) as calls, moments.watching(calls):
        moments.begin(())
        x = torch.randn(3, 4)
        model[0](x)
        model[1](x.clone())
        moments.end()
        model[0](x)  # not counted: no forward pass was begun
    assert moments.leader == {"0.weight": "0.weight", "1.weight": "1.weight"}
    assert moments.tokens == {"0.weight": 3, "1.weight": 3}


def test_relative_moments_count_a_token_by_the_size_of_its_output() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 5, bias=False)])
    x = torch.randn(2, 3, 4) * torch.tensor([1.0, 50.0, 1.0]).view(1, 3, 1)  # the second is massive
    x[1, 0] = 0  # of which the second layer makes nothing at all
    parameters = dict(layers.named_parameters())
    moments = InputMoments(parameters, relative=True)
    with FunctionCalls(layers, parameters) as calls, moments.watching(calls):
        moments.begin([torch.tensor([[1, 1, 1], [1, 1, 0]])])
        for layer in layers:
            layer(x)
        moments.end()
    assert moments.leader == {"0.weight": "0.weight", "1.weight": "1.weight"}  # one x, two y
    for name, layer in zip(("0.weight", "1.weight"), layers, strict=True):
        expected = torch.zeros(4, 4, dtype=torch.float64)
        for token in [*x[0], *x[1, :2]]:
            one, size = token.double(), float(layer(token).detach().double().norm())
            expected += torch.outer(one, one) / size**2 if size else 0
        assert moments.tokens[name] == 5
        assert relative_error(mirrored(moments.sums[name], 1), expected) < BOUND


@pytest.mark.parametrize("side", [1, 2, 5, 7, 64])
def test_a_symmetric_product_is_summed_by_its_upper_half(side: int) -> None:
    rows = torch.randn(10, side, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(side, side, dtype=torch.float64)
    for _ in range(2):
        add_gram(total, rows)
    expected = 2 * rows.double().T @ rows.double() / 5
    assert relative_error(mirrored(total, 5), expected) < BOUND


def test_a_side_too_wide_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fishertool.fisher.kronecker.MAX_SIDE", 20)
    _, stored = _gather("llama", ["kronecker"], BATCHES[2])
    assert not any("mlp" in name or "lm_head" in name for name in stored["kronecker"].statistics)
    assert any("self_attn" in name for name in stored["kronecker"].statistics)
    assert OutputMoments().sums == {}


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("batches", [1, 2, 8])
@pytest.mark.parametrize("kind", MODELS)
def test_bank_holds_each_members_gradient(kind: str, batches: int, group: int) -> None:
    members: dict[str, dict[int, Tensor]] = {}

    def write(name: str, member: int, gradient: Tensor) -> None:
        assert member not in members.setdefault(name, {})
        members[name][member] = gradient.clone()

    values = {name: value.detach() for name, value in _model(kind).named_parameters()}
    bank = GradientBank(values, write, torch.float32, group)
    starts = range(0, len(LENGTHS), group) if group > 1 else [0]
    chunks = [range(s, min(s + group, len(LENGTHS)) if group > 1 else len(LENGTHS)) for s in starts]
    runs = [batch for chunk in chunks for batch in micro_batches(LENGTHS, chunk, size=batches)]
    _gather(kind, ["rank-one"], runs, bank)
    for name, gradients in _reference(kind).gradients.items():
        expected = torch.stack([one.mean(0) for one in torch.split(gradients, group)])
        assert sorted(members[name]) == list(range(len(expected)))
        found = torch.stack([members[name][n] for n in range(len(expected))])
        if float(expected.abs().max()) < 1e-7:
            continue
        assert relative_error(found.reshape(expected.shape), expected) < BOUND, name
        assert float(bank.traces[name]) == pytest.approx(float(expected.square().sum()), rel=1e-4)
    assert not any(map(bool, bank.rounding.values()))


@pytest.mark.parametrize("block", [7, BLOCK_ELEMENTS])
def test_bank_measures_what_rounding_costs(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fishertool.fisher.gradient_bank.BLOCK_ELEMENTS", block)
    written: list[Tensor] = []
    values = {name: value.detach() for name, value in _model("bert").named_parameters()}
    bank = GradientBank(values, lambda *member: written.append(member[2].clone()), torch.bfloat16)
    _gather("bert", ["rank-one"], BATCHES[1], bank)
    assert {gradient.dtype for gradient in written} == {torch.bfloat16}
    name = "bert.encoder.layer.0.output.dense.weight"
    exact = _reference("bert").gradients[name]
    error = (exact.float() - exact.float().bfloat16().float()).square().sum()
    assert float(bank.rounding[name]) == pytest.approx(float(error), rel=0.05)
    assert float(bank.traces[name]) == pytest.approx(float(exact.square().sum()), rel=1e-4)


def test_bank_rounds_a_gradient_whatever_its_strides() -> None:
    found: list[Tensor] = []
    gradients = torch.randn(2, 3, 400, generator=torch.Generator().manual_seed(0)).mT
    values = {"weight": torch.zeros(400, 3)}
    bank = GradientBank(values, lambda *member: found.append(member[2]), torch.bfloat16)
    bank.begin([0, 1])
    bank.add("weight", [Whole(gradients)])
    assert torch.equal(torch.stack(found), gradients.bfloat16())


def test_groups_may_not_mix() -> None:
    bank = GradientBank({}, lambda name, member, gradient: None, torch.float32, group=2)
    with pytest.raises(ValueError, match="several groups"):
        bank.begin([1, 2])


def test_standard_error_is_that_of_the_traces() -> None:
    done, stored = _gather("bert", ["diagonal"], BATCHES[1])
    for name, gradients in _reference("bert").gradients.items():
        traces = gradients.flatten(1).square().sum(1)
        error = float(traces.std() / done.examples**0.5)
        if float(traces.max()) > 1e-15:
            assert stored["diagonal"].statistics[name].standard_error == pytest.approx(error, 1e-3)


@pytest.mark.parametrize(
    ("lengths", "options", "expected"),
    [
        ([], {}, []),
        ([5], {"tokens": 1}, [[0]]),
        ([1, 1, 1], {"size": 2}, [[0, 1], [2]]),
        ([0, 0], {"tokens": 10}, [[0, 1]]),
        ([3, 9, 5, 4], {"tokens": 10}, [[1], [2, 3], [0]]),
        ([8, 2, 2, 2, 2], {"tokens": 8}, [[0], [1, 2, 3, 4]]),
    ],
)
def test_micro_batches(lengths: list[int], options: dict[str, Any], expected: list[Any]) -> None:
    assert micro_batches(lengths, **options) == expected


@pytest.mark.parametrize("elements", [1, PIECE_ELEMENTS, 3 * PIECE_ELEMENTS + 1])
def test_sums_of_a_header(elements: int) -> None:
    """Of tensors of several pieces too, and not otherwise with other threads."""
    values = torch.rand(elements, generator=torch.Generator().manual_seed(0)) ** 8
    exact, threads = values.double(), torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(statistics_of(values, 0.5))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]
    assert (found[0].elements, found[0].standard_error) == (elements, 0.5)
    assert found[0].total == pytest.approx(float(exact.sum()), rel=1e-13)
    assert found[0].squares == pytest.approx(float(exact.square().sum()), rel=1e-13)
