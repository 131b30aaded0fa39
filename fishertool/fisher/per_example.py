"""Per-example gradients of a model from one batched backward pass, layer by layer.

The weights require no gradient, so autograd computes activation gradients only; hooks keep each
layer's input and receive its output's gradient, and the layer's rule turns the two into
per-example gradients. They are handed on as soon as they are complete and then forgotten.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from fishertool.errors import FishertoolError
from fishertool.fisher.gradients import Gradient, Whole, rows_of
from fishertool.fisher.layers import Rule, rule_for

Forward = Callable[[int], Tensor]
"""Run the model on one and the same example, repeated so many times; return its logits."""
Consume = Callable[[str, Sequence[Gradient]], None]

AGREEMENT = 0.05


class _Call:
    """One forward call of one module: what its rule needs once the gradient comes."""

    def __init__(self, module: nn.Module, x: Tensor):
        self.module = module
        self.x = x.detach()
        self.version = x._version


class PerExampleGradients:
    """Hooks on a model, active inside `with`, that turn `backward` into per-example gradients.

    parameters   the wanted ones by name, as `model.named_parameters()` gives them
    one_by_one   True where some parameter can only be served with one example in a batch: its
                 layer has no rule, or takes inputs in which examples cannot be told apart
    by_autograd  the parameters no rule serves

    Raises FishertoolError if a layer's input is changed in place, after `check` saw it was not.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]):
        self.model = model
        self.parameters = dict(parameters)
        self.by_autograd: set[str] = set()
        self.one_by_one = False
        self.examples = 1
        self.rows = 1
        """Rows the batch has: its examples, each with as many rows, one after another."""
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._rules: dict[nn.Module, Rule] = {}
        self._calls: dict[str, int] = defaultdict(int)
        self._received: dict[str, list[tuple[int, Gradient]]] = defaultdict(list)
        self._consume: Consume = lambda name, parts: None
        self._handles: list[Any] = []
        self._observe: Callable[[Tensor, Tensor], None] | None = None
        self._paused = False
        self._checking = False
        self._retain = False

    def __enter__(self) -> Self:
        self._required = {p: p.requires_grad for p in self.model.parameters()}
        served: set[str] = set()
        for module in self.model.modules():
            own = self._own(module)
            if own and (rule := rule_for(module)) is not None:
                self._rules[module] = rule
                served.update(own.values())
                self._handles += [
                    module.register_forward_pre_hook(self._before, with_kwargs=True),
                    module.register_forward_hook(self._after, with_kwargs=True),
                ]
        self.model.requires_grad_(False)
        self._leave_to_autograd(set(self.parameters) - served)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        for parameter, required in self._required.items():
            parameter.requires_grad_(required)
            parameter.grad = None

    def check(self, forward: Forward, rows_each: int = 1) -> None:
        """Find out which layers keep examples apart, and hold every rule against plain autograd.

        A rule whose layer's tensors do not have the batch in front (`rows_each` rows an example),
        for a batch of 1 and of 2, serves one example at a time. A parameter whose gradient differs
        from autograd's (its layer is bypassed, or has its input changed in place) is left to it.
        """
        leading: dict[int, set[int]] = {1: set(), 2: set()}
        self._observe = lambda x, y: leading[self.examples].update((x.shape[0], y.shape[0]))
        with torch.no_grad():
            self._forward(forward, 2, rows_each)
        logits = self._forward(forward, 1, rows_each)
        self._observe = None
        self.one_by_one |= any(
            sizes - {examples * rows_each} for examples, sizes in leading.items()
        )
        generator = torch.Generator().manual_seed(0)
        cotangent = torch.randn(logits.shape, generator=generator).to(logits)
        ours: dict[str, Tensor] = {}

        def form(name: str, parts: Sequence[Gradient]) -> None:
            parameter = self.parameters[name]
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            total = parameter.new_zeros(rows_of(parameter))
            for part in parts:
                if isinstance(part, Whole):
                    total = total.to(dtype)
                part.add_rows(total, 0, 0)
            ours[name] = total

        self._checking = True
        self.backward(logits, cotangent, form)
        self._checking = False
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self._paused = True
        logits = self._forward(forward, 1, rows_each)
        theirs: list[Tensor | None] = [None] * len(self.parameters)
        if logits.requires_grad:
            wanted = list(self.parameters.values())
            theirs = list(torch.autograd.grad(logits, wanted, cotangent, allow_unused=True))
        self._paused = False
        self.model.requires_grad_(False)
        rms = _rms([gradient for gradient in theirs if gradient is not None])
        differ = set()
        for (name, parameter), gradient in zip(self.parameters.items(), theirs, strict=True):
            expected = torch.zeros_like(parameter) if gradient is None else gradient
            found = ours.get(name, torch.zeros_like(parameter)).reshape(parameter.shape)
            slack = AGREEMENT * (_rms([expected]) + 1e-3 * rms)
            if not _rms([found - expected]) <= slack:
                differ.add(name)
        self._leave_to_autograd(self.by_autograd | differ)

    def backward(
        self, logits: Tensor, cotangent: Tensor, consume: Consume, retain_graph: bool = False
    ) -> None:
        """Run autograd from the logits; `consume` gets each parameter's name and gradient parts.

        A parameter used several times (a module called twice, tied weights) comes once, with all
        its parts, which are to be summed before squaring. One with no gradient does not come.
        """
        self._consume = consume
        self._retain = retain_graph
        self._received.clear()
        if not logits.requires_grad:  # no wanted parameter takes part in it
            return
        logits.backward(cotangent.to(logits.dtype), retain_graph=retain_graph)  # type: ignore[no-untyped-call]
        for name in list(self._received):
            self._hand_on(name)
        for name in self.by_autograd:
            parameter = self.parameters[name]
            if parameter.grad is not None:
                consume(name, [Whole(parameter.grad.reshape(1, *rows_of(parameter)))])
                parameter.grad = None

    def begin(self, examples: Sequence[int], rows_each: int = 1) -> Sequence[int]:
        """Before each forward pass: which examples the batch has, with how many rows each; an
        example is a unit of its own."""
        if self.one_by_one and len(examples) != 1:
            raise ValueError("this model's examples can only be told apart one at a time")
        self.examples, self.rows = len(examples), len(examples) * rows_each
        self._calls.clear()
        return examples

    def _forward(self, forward: Forward, examples: int, rows_each: int) -> Tensor:
        self.examples, self.rows = examples, examples * rows_each
        self._calls.clear()
        return forward(examples)

    def _leave_to_autograd(self, names: set[str]) -> None:
        self.by_autograd = names
        self.one_by_one = self.one_by_one or bool(names)
        for name in names:
            self.parameters[name].requires_grad_(True)

    def _own(self, module: nn.Module) -> dict[str, str]:
        """The wanted parameters that are a module's own: their names there -> in the model."""
        return {
            own: self._names[id(parameter)]
            for own, parameter in module.named_parameters(recurse=False)
            if id(parameter) in self._names
        }

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Ids that all rows share, as position ids, are repeated so that rows stay apart."""
        if isinstance(module, nn.Embedding) and args and self.rows > 1:
            ids = args[0]
            if ids.dim() > 1 and ids.shape[0] == 1:
                return (ids.expand(self.rows, *ids.shape[1:]), *args[1:]), kwargs
        return None

    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        if self._paused:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        if self._observe is not None:
            self._observe(x, output)
        if not torch.is_grad_enabled():
            return None
        first = not output.requires_grad
        if first:  # the graph begins here; the sum keeps later in-place changes legal
            output = output + output.new_zeros(()).requires_grad_()
        served = [name for name in self._own(module).values() if name not in self.by_autograd]
        call, number = _Call(module, x), self._calls[served[0]] if served else 0
        for name in served:
            self._calls[name] += 1
        if served:
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda delta: self._receive(call, number, delta)
            )
        return output if first else None

    def _receive(self, call: _Call, number: int, delta: Tensor) -> None:
        if call.x._version != call.version:
            if self._checking:
                return  # the missing gradient sends its parameters to autograd
            raise FishertoolError(
                f"{type(call.module).__name__} had its input changed in place after reading it; "
                "its Fisher cannot be computed from the layer's input"
            )
        self._paused = True
        try:
            gradients = self._rules[call.module](call.module, call.x, delta.detach(), self.examples)
        finally:
            self._paused = False
        if not self._retain:
            call.x = call.x.new_empty(0)  # as autograd frees what it saved, layer by layer
        for own, name in self._own(call.module).items():
            if name not in self.by_autograd:
                self._received[name].append((number, gradients[own]))
                if len(self._received[name]) == self._calls[name]:
                    self._hand_on(name)

    def _hand_on(self, name: str) -> None:
        """In call order, so that rounding does not depend on the order autograd takes."""
        parts = sorted(self._received.pop(name), key=lambda part: part[0])
        self._consume(name, [part for _, part in parts])


def _rms(tensors: Sequence[Tensor]) -> float:
    count = sum(tensor.numel() for tensor in tensors)
    norms = (torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors)
    return math.sqrt(sum(float(norm) ** 2 for norm in norms) / max(count, 1))
