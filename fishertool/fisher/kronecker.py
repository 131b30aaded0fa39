"""Kronecker factors of linear layers: second moments of their inputs and of their outputs' gradients."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fishertool.errors import FishertoolError
from fishertool.fisher.diagonal import wide
from fishertool.fisher.function_calls import FunctionCalls, Use
from fishertool.fisher.gradients import Gradient, OuterProducts, rows_of
from fishertool.fisher.layers import linear, transposed_linear
from fishertool.fisher.sums import Groups, Sums
from fishertool.fisher.views import View, views_by_parameter

MAX_SIDE = 16_384
"""A factor of a wider side (a language model's output layer) would not be kept: 2 GB in float64."""
BLOCKS = 8
"""A symmetric product by blocks of columns costs (1 + 1 / BLOCKS) / 2 of the whole."""


class InputMoments:
    """A = sum over tokens of x x^T for the input x of every linear layer.

    sums    weight name -> [in, in], float64; of layers that are given one and the same input
            (query, key and value; gate and up) only the first has an entry
            with `stacks` also of a stack of experts' matrices, [expert, in, in]
    leader  weight name -> the name whose entry is its own
    tokens  name with an entry -> tokens seen, of a stack [expert]

    With `relative`, each token counts by 1 / |y|^2, y the layer's output, bias and all: the sum of
    x x^T / |y|^2, in which W' x - W x is an error relative to y. A few tokens can have outputs many
    times as long as the others', of which the norm after them leaves no more than of the others.
    Every layer then has an entry of its own.

    Forward passes count only while `watching`, after `begin`; padding never. Source: Martens and
    Grosse 2015, arXiv 1503.05671; the uncentred covariance of SparseGPT, RegMean and SVD-LLM.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        relative: bool = False,
        stacks: bool = False,
    ):
        self.relative = relative
        self.stacks = stacks
        self.sums: Sums = {}
        self.tokens: Sums = {}
        self.groups: Groups = {"inputs": self.sums, "tokens": self.tokens}
        self.leader: dict[str, str] = {}
        self.transposed: set[str] = set()
        """Weights that are [in, out]."""
        self._views: Mapping[int, Sequence[View]] = {}
        self._parameters = parameters
        self._kept: dict[int, Tensor | None] = {}
        """Tokens with padding -> the rows that are none, or None for all of them."""
        self._active = False
        self._last: tuple[str, Tensor, int] | None = None
        self._called: set[str] = set()
        """Weights whose layers the forward pass has met."""
        self._repeated: set[str] = set()
        """Of layers that a pass met more than once."""

    @contextmanager
    def watching(self, calls: FunctionCalls) -> Iterator[None]:
        """See the layers of a model whose `calls` are entered."""
        self._views = views_by_parameter(self._parameters)
        with ExitStack() as hooks:
            for module, rule in calls.rules.items():
                if rule in (linear, transposed_linear):
                    hook = functools.partial(self._after, rule is transposed_linear)
                    handle = module.register_forward_hook(hook, with_kwargs=True)
                    hooks.callback(handle.remove)
            calls.listeners.append(self._on_use)
            hooks.callback(calls.listeners.remove, self._on_use)
            yield

    def begin(self, masks: Sequence[Tensor]) -> None:
        """Before each forward pass that counts: masks [..., time], zero at padding. An encoder and
        a decoder have one each, of different sizes, which is how their layers are told apart."""
        self._kept = {mask.numel(): kept_rows(mask) for mask in masks}
        self._active, self._last = True, None
        self._called.clear()

    def end(self) -> None:
        self._active, self._last = False, None

    def _after(
        self,
        transposed: bool,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        y: Any,
    ) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        for view in self._views.get(id(module.weight), ()):
            self._see(view, x, y, True, transposed)

    def _on_use(self, use: Use, y: Tensor) -> Tensor:
        x, transposed = use.argument.reads, use.argument.transposed
        if use.argument.is_linear and x is not None:
            padded = use.example is None  # one that is run alone has no padding
            for view in self._views.get(id(use.parameter), ()):
                start, stop = view.start - use.first, view.stop - use.first
                if 0 <= start < stop <= use.rows:
                    part = x[..., start:stop] if transposed else x
                    self._see(view, part, y, padded, transposed)
                elif self.stacks and _is_whole_stack(view) and use.rows == use.parameter.shape[1]:
                    self._see_expert(view, use.first // use.rows, x, y, padded, transposed)
        return y

    def _see(self, view: View, x: Tensor, y: Tensor, padded: bool, transposed: bool) -> None:
        if not self._active or max(rows_of(view.tensor)) > MAX_SIDE:
            return
        x, name = x.detach(), view.name
        if transposed:
            self.transposed.add(name)
        if name in self._called:
            self._leave_alone(name)
        self._called.add(name)
        leader = self._leader(name, x)
        self._follow(name, leader)
        if leader != name:
            return
        self._last = name, x, x._version  # kept alive, or its memory might be the next input's
        rows = self._rows(x, y, padded)
        self._begin(name, (), rows)
        add_gram(self.sums[name], rows)
        self.tokens[name] += len(rows)

    def _see_expert(
        self, view: View, expert: int, x: Tensor, y: Tensor, padded: bool, transposed: bool
    ) -> None:
        """Every expert has tokens of its own, and no layer beside it the same."""
        if not self._active or max(view.tensor.shape[1:]) > MAX_SIDE:
            return
        name, mirrored_on_disk = view.name, not view.tensor.is_contiguous()
        if transposed != mirrored_on_disk:
            self.transposed.add(name)
        self._follow(name, name)
        rows = self._rows(x.detach(), y, padded)
        self._begin(name, (len(view.tensor),), rows)
        add_gram(self.sums[name][expert], rows)
        self.tokens[name][expert] += len(rows)

    def _rows(self, x: Tensor, y: Tensor, padded: bool) -> Tensor:
        """[token, in], as they count."""
        x = x.expand(*y.shape[:-1], -1)  # positions alone have one row for all
        rows = wide(x).reshape(-1, x.shape[-1])
        if self.relative:
            sizes = wide(y).detach().reshape(len(rows), -1).norm(dim=1, keepdim=True)
            rows = torch.where(sizes > 0, rows / sizes, 0.0)
        if padded and (kept := self._kept.get(len(rows))) is not None:
            rows = rows[kept.to(rows.device)]
        return rows

    def _begin(self, name: str, stack: tuple[int, ...], rows: Tensor) -> None:
        if name not in self.sums:
            side = rows.shape[1]
            self.sums[name] = rows.new_zeros(*stack, side, side, dtype=torch.float64)
            self.tokens[name] = torch.zeros(stack, dtype=torch.float64)

    def _leader(self, name: str, x: Tensor) -> str:
        """Who had this input just before, if the two may share an entry; else the weight itself."""
        if self.relative or self._last is None or self.leader.get(name) == name:
            return name
        leader, last, version = self._last
        same = x.data_ptr() == last.data_ptr() and x.shape == last.shape and x._version == version
        return leader if same and leader not in self._repeated else name

    def _leave_alone(self, name: str) -> None:
        """Have nobody follow a layer that a pass meets again: its next input may be its own, as of
        DeBERTa's queries, which are projected from relative positions too."""
        self._repeated.add(name)
        for other, leader in self.leader.items():
            if leader == name != other:
                self.leader[other] = other
                self.sums[other] = self.sums[name].clone()
                self.tokens[other] = self.tokens[name].clone()

    def _follow(self, name: str, leader: str) -> None:
        if self.leader.setdefault(name, leader) != leader:
            raise FishertoolError(
                f"{name} and {leader} share an input in one forward pass and not in another; "
                "--exclude one of them"
            )


class OutputMoments:
    """B = sum over tokens of delta delta^T, delta the gradient at a linear layer's output.

    sums  weight name -> [out, out], float64. A token's delta is the gradient of its example's log
          p, so F is about A kron B times the tokens an example has (B and A being means).
    """

    def __init__(self) -> None:
        self.sums: Sums = {}
        self.groups: Groups = {"outputs": self.sums}

    def begin(self, examples: Sequence[int]) -> None:
        """Nothing is kept from batch to batch."""

    def add(self, name: str, gradients: Sequence[Gradient]) -> None:
        for part in gradients:
            if not isinstance(part, OuterProducts):
                continue
            sides = part.left.shape[2], part.right.shape[2]
            if max(sides) > MAX_SIDE:
                continue
            delta = wide(part.right if part.transposed else part.left).flatten(0, 1)
            if name not in self.sums:
                side = delta.shape[1]
                self.sums[name] = delta.new_zeros(side, side, dtype=torch.float64)
            add_gram(self.sums[name], delta)


def add_gram(total: Tensor, rows: Tensor) -> None:
    """total += rows^T rows on and above the diagonal blocks; `mirrored` fills in the rest.

    Shapes: total [side, side] float64, rows [token, side]. The products are in float32.
    """
    step = -(-total.shape[0] // BLOCKS)
    for start in range(0, total.shape[0], step):
        stop = start + step
        total[start:stop, start:] += rows[:, start:stop].T @ rows[:, start:]


def mirrored(total: Tensor, count: Tensor | float) -> Tensor:
    """The mean [..., side, side], float32, symmetric, of sums whose lower halves are not kept; of
    `count` tokens each, [...]."""
    count = torch.as_tensor(count).clamp(min=1)[..., None, None]
    upper = (total / count.to(total.device)).float().triu_()
    return upper + upper.triu(1).mT


def _is_whole_stack(view: View) -> bool:
    shape = view.tensor.shape
    return len(shape) == 3 and shape.numel() == view.parameter.numel() > 0


def kept_rows(mask: Tensor) -> Tensor | None:
    """Where a mask is not zero, flat; None where that is everywhere."""
    kept = mask.flatten().nonzero().squeeze(1)
    return None if len(kept) == mask.numel() else kept
