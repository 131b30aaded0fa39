"""Per-example gradients of small modules that are awkward in one way each."""

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from test_fisher_diagonal import (
    Estimate,
    assert_same,
    estimate_diagonal,
    randomize,
    reference,
)
from torch import Tensor, nn
from torch.nn import functional

from fishertool.errors import FishertoolError
from fishertool.fisher.agreement import Agreement
from fishertool.fisher.batches import Batch, micro_batches
from fishertool.fisher.estimate import estimate
from fishertool.fisher.function_calls import FunctionCalls
from fishertool.fisher.gradients import Gradient, Whole, rows_of
from fishertool.fisher.kinds import Gathering
from fishertool.fisher.per_example import PerExampleGradients

WORDS, WIDTH, CLASSES, COUNT, TIME = 7, 6, 3, 8, 5
PADDING = 2

Body = Callable[["Toy", Tensor], Tensor]
"""[example, time, WIDTH] -> the same"""


class Toy(nn.Module):
    """ids -> embed -> body -> mean over time -> head -> .logits."""

    def __init__(self, body: Body, **own: nn.Module | nn.Parameter):
        super().__init__()
        self.embed: nn.Module = nn.Embedding(WORDS, WIDTH)
        for name, value in own.items():
            setattr(self, name, value)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.body = body

    def forward(self, ids: Tensor) -> types.SimpleNamespace:
        hidden = self.body(self, mixed(self.embed(ids)))
        return types.SimpleNamespace(logits=self.head(hidden.mean(1)))

    def use(self, name: str, x: Tensor) -> Tensor:
        y: Tensor = self.get_submodule(name)(x)
        return y


class RMSNorm(nn.Module):
    """As Llama's; with `offset` 1 as Gemma's, whose weight is the scale less one."""

    def __init__(self, offset: float):
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.ones(WIDTH)), offset

    def forward(self, x: Tensor) -> Tensor:
        return (self.offset + self.weight) * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class LayerNorm(nn.Module):
    """As DeBERTa's, which writes it out; with `scaled` False as MobileBERT's, which does not norm."""

    def __init__(self, scaled: bool):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))
        self.scaled = scaled

    def forward(self, x: Tensor) -> Tensor:
        if self.scaled:
            x = x - x.mean(-1, keepdim=True)
            x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return self.weight * x + self.bias


class CopyingLinear(nn.Module):
    """A linear layer whose own backward survives an in-place change of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x.clone(), self.weight)


class ScaledEmbedding(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return 3 * super().forward(ids)


class Experts(nn.Module):
    """Two of three matrices and biases for every token of a flat list, as transformers does it."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor] = functional.linear):
        super().__init__()
        self.product = product
        self.stack = nn.Parameter(torch.zeros(3, WIDTH, WIDTH))
        self.bias = nn.Parameter(torch.zeros(3, WIDTH))

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for number in range(len(self.stack)):
            tokens = torch.where((chosen == number).any(1))[0]
            y = y.index_add(
                0, tokens, self.product(x[tokens], self.stack[number]) + self.bias[number]
            )
        return y


class Offset(nn.Embedding):
    """As OPT's positions: it makes the ids itself."""

    def forward(self, mask: Tensor) -> Tensor:
        return super().forward((mask.cumsum(1) % 3) + 1)


class Parameters(nn.Module):
    """As ViT's embeddings: a token in front of all others, a position added."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.zeros(1, TIME + 1, WIDTH))
        self.patches = nn.Conv2d(1, WIDTH, (1, WIDTH), stride=(1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.patches(x.unsqueeze(1)).flatten(2).transpose(1, 2)
        return torch.cat((self.front.expand(len(x), -1, -1), x), dim=1) + self.positions


def mixed(x: Tensor) -> Tensor:
    """Make positions depend on each other, so that cross terms over time matter."""
    return torch.tanh(x + 0.5 * x.cumsum(1))


def through_a(toy: Toy, x: Tensor) -> Tensor:
    return toy.use("a", x)


def twice(toy: Toy, x: Tensor) -> Tensor:
    return toy.use("a", mixed(toy.use("a", x)))


def a_then_b(toy: Toy, x: Tensor) -> Tensor:
    return toy.use("b", mixed(toy.use("a", x)))


def shared_ids(toy: Toy, x: Tensor) -> Tensor:
    """Ids of shape [1, time], the same for all examples, one of them repeated."""
    return mixed(x + toy.use("a", torch.arange(x.shape[1])[None].clamp(max=3)))


def relative_biases(toy: Toy, x: Tensor) -> Tensor:
    """As T5's and MPNet's: [query, key] ids, used in two layers, once in place."""
    positions = torch.arange(TIME)
    bias = toy.use("a", (positions[None] - positions[:, None]).clamp(-2, 2) + 2)
    bias = bias.permute(2, 0, 1).unsqueeze(0)
    scores = torch.einsum("bqd,bkd->bqk", x, x).unsqueeze(1)
    y = (scores + bias).softmax(-1).mean(1) @ x
    scores = scores.repeat(1, 2, 1, 1)
    scores += bias.expand(len(x), -1, TIME, TIME).contiguous()
    return mixed(y) + scores.softmax(-1).mean(1) @ x


def two_tables(toy: Toy, x: Tensor) -> Tensor:
    """Added up before they meet the examples."""
    positions = torch.arange(TIME)
    return mixed(x + (toy.use("a", positions[None]) + 2 * toy.use("b", positions[None] % 2)))


def rotated(toy: Toy, x: Tensor) -> Tensor:
    """As RoFormer's: one half of a table's columns and the other, each for pairs of features."""
    table = toy.use("a", torch.arange(TIME))[None]
    sine, cosine = (torch.stack([half, half], -1).reshape_as(table) for half in table.chunk(2, -1))
    return mixed(x * torch.cos(sine) + x.flip(-1) * cosine)


def time_first_positions(toy: Toy, x: Tensor) -> Tensor:
    """Examples are second where the positions meet them."""
    return mixed((x.transpose(0, 1) + toy.use("a", torch.arange(TIME))[:, None]).transpose(0, 1))


def one_table_for_both(toy: Toy, x: Tensor) -> Tensor:
    """Of ids of the examples, and of positions."""
    return mixed(x + toy.use("a", (x[..., 0] > 0).long()) + toy.use("a", torch.arange(TIME)))


def projected_positions(toy: Toy, x: Tensor) -> Tensor:
    return mixed(x + toy.use("b", toy.use("a", torch.arange(TIME)[None])))


def picked(toy: Toy, x: Tensor) -> Tensor:
    """Each token by one layer of a list, however many of an example that are."""
    flat, layers = x.flatten(0, 1), list(toy.get_submodule("a").children())
    chosen, y = flat.abs().argmax(1) % len(layers), torch.zeros_like(flat)
    for number in sorted(set(chosen.tolist())):
        tokens = torch.where(chosen == number)[0]
        y = y.index_add(0, tokens, toy.use(f"a.{number}", flat[tokens]))
    return mixed(x + y.reshape(x.shape))


def in_turn(toy: Toy, x: Tensor) -> Tensor:
    return toy.use("a.1", mixed(toy.use("a.0", x)))


def activated_in_place(toy: Toy, x: Tensor) -> Tensor:
    return toy.use("b", torch.relu_(toy.use("a", x)))


def changed_afterwards(toy: Toy, x: Tensor) -> Tensor:
    hidden = toy.use("a", x)
    y = toy.use("b", hidden)
    hidden += 1
    return y * hidden.square()


def bypassed(toy: Toy, x: Tensor) -> Tensor:
    return functional.linear(x, toy.get_parameter("a.weight"), toy.get_parameter("a.bias"))


def faintly_bypassed(toy: Toy, x: Tensor) -> Tensor:
    return x + 1e-5 * functional.linear(x, toy.get_parameter("a.weight"))


def half_bypassed(toy: Toy, x: Tensor) -> Tensor:
    return functional.linear(mixed(toy.use("a", x)), toy.get_parameter("a.weight"))


def bare(toy: Toy, x: Tensor) -> Tensor:
    return torch.tanh(x @ toy.get_parameter("a")) @ toy.get_parameter("a").T


def second_dimension_last(toy: Toy, x: Tensor) -> Tensor:
    return toy.use("a", x.transpose(1, 2)).transpose(1, 2)


def time_first(toy: Toy, x: Tensor) -> Tensor:
    return toy.use("a", x.transpose(0, 1)).transpose(0, 1)


def flattened(toy: Toy, x: Tensor) -> Tensor:
    return toy.use("a", x.flatten(0, 1)).reshape(x.shape)


def through_mean(toy: Toy, x: Tensor) -> Tensor:
    return x + toy.use("a", x.mean(1)).unsqueeze(1)


def split_heads(toy: Toy, x: Tensor) -> Tensor:
    """The layer sees [example, head, time, in]."""
    split = x.reshape(*x.shape[:2], 2, 3).transpose(1, 2)
    return toy.use("a", split).transpose(1, 2).flatten(2)


def output_ignored(toy: Toy, x: Tensor) -> Tensor:
    y = toy.use("a", x)
    toy.use("a", 2 * y)
    return y


def routed(toy: Toy, x: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    chosen = flat[:, :3].topk(2, dim=1).indices
    y: Tensor = toy.get_submodule("a")(flat, chosen)
    return x + mixed(y.reshape(x.shape))


def positioned(toy: Toy, x: Tensor) -> Tensor:
    return mixed(x + toy.use("a", torch.ones(x.shape[:2]).long()))


def linear(bias: bool = True) -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH, bias=bias)


def shared_weight() -> Toy:
    toy = Toy(a_then_b, a=linear(), b=linear())
    toy.get_submodule("b").weight = toy.get_parameter("a.weight")
    return toy


def with_embedding(embedding: nn.Embedding, tied: bool = False) -> Toy:
    """Tied to the head, the weight's gradient is a sum of outer products and scattered rows."""
    toy = Toy(lambda toy, x: x)
    toy.embed = embedding
    if tied:
        toy.head = nn.Linear(WIDTH, WORDS, bias=False)
        toy.head.weight = embedding.weight
    return toy


BOTH = ["a.bias", "a.weight"]
TOYS: dict[str, tuple[Callable[[], Toy], list[str], bool]] = {
    # how it is built, which parameters autograd serves, whether examples go one by one
    "linear": (lambda: Toy(through_a, a=linear()), [], False),
    "called twice": (lambda: Toy(twice, a=linear()), [], False),
    "shared weight": (shared_weight, [], False),
    "tied": (lambda: with_embedding(nn.Embedding(WORDS, WIDTH), tied=True), [], False),
    "padding": (lambda: with_embedding(nn.Embedding(WORDS, WIDTH, PADDING)), [], False),
    "tied padding": (lambda: with_embedding(nn.Embedding(WORDS, WIDTH, PADDING), True), [], False),
    "scaled": (lambda: with_embedding(ScaledEmbedding(WORDS, WIDTH)), [], False),
    "positions": (lambda: Toy(shared_ids, a=nn.Embedding(TIME, WIDTH)), [], False),
    "positions alone": (
        lambda: Toy(
            lambda toy, x: mixed(x + toy.use("a", torch.arange(TIME))),
            a=nn.Embedding(TIME, WIDTH, PADDING),
        ),
        [],
        False,
    ),
    "relative biases": (lambda: Toy(relative_biases, a=nn.Embedding(5, 2)), [], False),
    "two tables": (
        lambda: Toy(two_tables, a=nn.Embedding(TIME, WIDTH), b=nn.Embedding(2, WIDTH)),
        [],
        False,
    ),
    "rotated": (lambda: Toy(rotated, a=nn.Embedding(TIME, WIDTH)), [], False),
    "positions, time first": (
        lambda: Toy(time_first_positions, a=nn.Embedding(TIME, WIDTH)),
        [],
        True,
    ),
    "one table": (lambda: Toy(one_table_for_both, a=nn.Embedding(TIME, WIDTH)), [], True),
    "positions projected": (
        lambda: Toy(projected_positions, a=nn.Embedding(TIME, WIDTH), b=linear()),
        [],
        False,
    ),
    "picked": (lambda: Toy(picked, a=nn.ModuleList([linear() for _ in range(3)])), [], True),
    "all picked": (lambda: Toy(picked, a=nn.ModuleList([linear(), linear()])), [], True),
    "layers": (lambda: Toy(in_turn, a=nn.ModuleList([linear(), linear()])), [], False),
    "in place": (lambda: Toy(activated_in_place, a=linear(bias=False), b=linear()), [], False),
    "in place, bias": (lambda: Toy(activated_in_place, a=linear(), b=linear()), [], False),
    "input changed": (
        lambda: Toy(changed_afterwards, a=linear(bias=False), b=CopyingLinear()),
        ["b.weight"],
        True,
    ),
    "bypassed": (lambda: Toy(bypassed, a=linear()), BOTH, True),
    "faintly bypassed": (
        lambda: Toy(faintly_bypassed, a=linear(bias=False)),
        ["a.weight"],
        True,
    ),
    "half bypassed": (lambda: Toy(half_bypassed, a=linear()), ["a.weight"], True),
    "bare": (lambda: Toy(bare, a=nn.Parameter(torch.ones(WIDTH, 2))), ["a"], True),
    "conv": (lambda: Toy(second_dimension_last, a=nn.Conv1d(WIDTH, WIDTH, 1)), [], False),
    "grouped conv": (
        lambda: Toy(
            second_dimension_last, a=nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2, bias=False)
        ),
        [],
        False,
    ),
    "over time": (lambda: Toy(second_dimension_last, a=nn.Linear(TIME, TIME)), [], False),
    "time first": (lambda: Toy(time_first, a=linear()), [], True),
    "flattened": (lambda: Toy(flattened, a=linear()), [], False),
    "pooled": (lambda: Toy(through_mean, a=linear()), [], False),
    "heads": (lambda: Toy(split_heads, a=nn.Linear(3, 3)), [], False),
    "unused": (lambda: Toy(lambda toy, x: x, a=linear()), [], False),
    "output ignored": (lambda: Toy(output_ignored, a=linear()), [], False),
    "llama norm": (lambda: Toy(through_a, a=RMSNorm(0)), [], False),
    "gemma norm": (lambda: Toy(through_a, a=RMSNorm(1)), [], False),
    "torch's rms norm": (lambda: Toy(through_a, a=nn.RMSNorm(WIDTH)), [], False),
    "layer norm": (lambda: Toy(through_a, a=nn.LayerNorm(WIDTH)), [], False),
    "layer norm, no bias": (lambda: Toy(through_a, a=nn.LayerNorm(WIDTH, bias=False)), [], False),
    "written-out norm": (lambda: Toy(through_a, a=LayerNorm(True)), [], False),
    "no norm": (lambda: Toy(through_a, a=LayerNorm(False)), [], False),
    "batch norm": (lambda: Toy(second_dimension_last, a=nn.BatchNorm1d(WIDTH)), BOTH, True),
    "norm over time": (lambda: Toy(through_a, a=nn.LayerNorm([TIME, WIDTH])), BOTH, True),
    "experts": (lambda: Toy(routed, a=Experts()), [], False),
    "transposed experts": (lambda: Toy(routed, a=Experts(torch.matmul)), [], False),
    "experts otherwise": (
        lambda: Toy(routed, a=Experts(lambda x, w: torch.einsum("ti,oi->to", x, w))),
        ["a.stack"],
        True,
    ),
    "own ids": (lambda: Toy(positioned, a=Offset(TIME, WIDTH)), [], False),
    "image": (lambda: Toy(through_a, a=Parameters()), [], False),
    "one slope": (lambda: Toy(through_a, a=nn.PReLU()), ["a.weight"], True),
}


def _toy(name: str) -> Toy:
    torch.manual_seed(0)
    toy = TOYS[name][0]()
    randomize(toy, 0.4)
    return toy


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(WORDS, (COUNT, TIME), generator=generator)
    ids[:, 0] = PADDING
    return ids, torch.arange(COUNT) % CLASSES


def _estimate(toy: Toy, batch_size: int, only: str | None = None) -> Estimate:
    ids, targets = _data()

    def batch(indices: Sequence[int]) -> Batch:
        chosen = list(indices)
        scored = torch.ones(len(chosen), dtype=torch.bool)
        return Batch({"ids": ids[chosen]}, targets[chosen], scored, chosen)

    parameters = {n: p for n, p in toy.named_parameters() if only in (None, n)}
    return estimate_diagonal(toy, parameters, batch, range(COUNT), batch_size)


def _expected(toy: Toy) -> dict[str, Tensor]:
    ids, targets = _data()
    return reference(toy, [({"ids": ids[[n]]}, targets[[n]]) for n in range(COUNT)], "empirical")


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("name", TOYS)
def test_is_exact(name: str, batch_size: int) -> None:
    toy = _toy(name)
    estimate = _estimate(toy, batch_size)
    assert_same(estimate.diagonal, _expected(toy))
    assert (sorted(estimate.by_autograd), estimate.one_by_one) == TOYS[name][1:]


@pytest.mark.parametrize("name", TOYS)
def test_each_parameter_alone_is_exact(name: str) -> None:
    """Without the others, the graph begins at another layer, or does not exist."""
    toy = _toy(name)
    for only, expected in _expected(toy).items():
        assert_same(_estimate(toy, 3, only).diagonal, {only: expected})


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_views_of_a_stack_are_exact(batch_size: int) -> None:
    """One expert's rows, and a transposed stack, of which no expert is a run of rows."""
    toy = _toy("experts")
    stack, exact = toy.get_parameter("a.stack"), _expected(toy)["a.stack"]
    with torch.no_grad():
        views = {
            "one": stack[1],
            "rows": stack[2, 1:4],
            "turned": stack.mT,
            "column": stack[0, :, 2],
        }
    wanted = {"one": exact[1], "rows": exact[2, 1:4], "turned": exact.mT, "column": exact[0, :, 2]}
    ids, targets = _data()

    def batch(indices: Sequence[int]) -> Batch:
        chosen = list(indices)
        scored = torch.ones(len(chosen), dtype=torch.bool)
        return Batch({"ids": ids[chosen]}, targets[chosen], scored, chosen)

    estimate = estimate_diagonal(toy, views, batch, range(COUNT), batch_size)
    assert_same(estimate.diagonal, wanted)
    assert (estimate.by_autograd, estimate.one_by_one) == (set(), False)


def test_the_padding_id_gets_nothing_from_the_embedding() -> None:
    rows = _estimate(_toy("padding"), 3).diagonal["embed.weight"]
    assert not rows[PADDING].any() and rows.any(1).sum() == WORDS - 1


@contextmanager
def _entered(toy: nn.Module) -> Iterator[PerExampleGradients]:
    parameters = dict(toy.named_parameters())
    calls = FunctionCalls(toy, parameters)
    with calls, PerExampleGradients(toy, parameters, calls) as gradients:
        yield gradients


@pytest.mark.parametrize("name", ["linear", "called twice", "tied", "heads", "gemma norm"])
def test_backward_gives_every_example_its_own_gradient(name: str) -> None:
    toy, (ids, _) = _toy(name), _data()
    parameters = dict(toy.named_parameters())
    found: dict[str, Tensor] = {}

    def keep(one: str, parts: Sequence[Gradient]) -> None:
        found[one] = torch.zeros(COUNT, *rows_of(parameters[one]))
        for n, gradient in enumerate(found[one]):
            for part in parts:
                part.add_rows(gradient, n, 0)

    with _entered(toy) as gradients:
        gradients.check(lambda copies: toy(ids[:1].expand(copies, -1)).logits)
        gradients.begin(range(COUNT))
        gradients.calls.begin(COUNT)
        logits: Tensor = toy(ids).logits
        cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
        for retain in (True, False):  # a graph serves several passes
            found.clear()
            gradients.backward(logits, cotangent, keep, retain_graph=retain)
            assert found.keys() == parameters.keys()
    for n in range(COUNT):
        exact = torch.autograd.grad(toy(ids[[n]]).logits, list(parameters.values()), cotangent[[n]])
        for own, wanted in zip(parameters, exact, strict=True):
            mine = found[own][n].reshape(wanted.shape)
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6)


def test_examples_that_cannot_be_told_apart_are_refused_together() -> None:
    toy = _toy("bare")
    ids, _ = _data()
    with _entered(toy) as gradients:
        gradients.check(lambda copies: toy(ids[:1].expand(copies, -1)).logits)
        with pytest.raises(ValueError, match="one at a time"):
            gradients.begin([0, 1])


def test_an_input_changed_in_place_unseen_by_check_is_refused() -> None:
    toy, (ids, _) = _toy("input changed"), _data()
    with _entered(toy) as gradients:
        gradients.begin(range(COUNT))
        gradients.calls.begin(COUNT)
        logits: Tensor = toy(ids).logits
        with pytest.raises(FishertoolError, match="CopyingLinear had its input changed in place"):
            gradients.backward(logits, torch.ones_like(logits), lambda name, parts: None)


@pytest.mark.parametrize("name", ["linear", "positions projected"])
def test_moments_are_those_of_examples_one_at_a_time(name: str) -> None:
    """Also of a layer that reads one row for all examples."""
    ids, targets = _data()

    def batch(chosen: Sequence[int]) -> Batch:
        scored, inputs = torch.ones(len(chosen)).bool(), {"ids": ids[list(chosen)]}
        return Batch(inputs, targets[list(chosen)], scored, chosen)

    found = []
    for size in (1, 3):
        toy = _toy(name)
        parameters = dict(toy.named_parameters())
        gathering = Gathering(["kronecker"], parameters)
        units = [micro_batches([TIME] * COUNT, size=size)]
        kept = gathering.inputs
        estimate(toy, parameters, batch, units, gathering.statistics, probe=0, inputs=kept)
        found.append(gathering.stored(COUNT)["kronecker"].tensors)
    assert found[0].keys() == found[1].keys()
    for key, moment in found[0].items():
        torch.testing.assert_close(found[1][key], moment, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("dtype", "told"), [(torch.float32, {"key"}), (torch.bfloat16, set())])
def test_what_has_no_gradient_but_rounding_agrees(dtype: torch.dtype, told: set[str]) -> None:
    """A key's bias, whose gradient is zero: in bfloat16 each way to form it has noise of its own."""
    exact = {"weight": torch.ones(9, 9, dtype=dtype), "key": torch.full((9,), 2e-3, dtype=dtype)}
    agreement = Agreement(exact, exact, [1.0, -3.0])
    factors = torch.tensor([1.0, -3.0]).reshape(2, 1, 1)
    agreement.consume("weight", [Whole((factors * exact["weight"]).to(dtype))])
    agreement.consume("key", [Whole(torch.zeros(2, 9, 1, dtype=dtype))])
    assert agreement.differing == told
