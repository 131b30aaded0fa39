"""Per-example gradients of a model from one batched backward pass, layer by layer.

The weights require no gradient, so autograd computes activation gradients only; hooks keep each
layer's input and receive its output's gradient, and the layer's rule turns the two into
per-example gradients. They are handed on as soon as they are complete and then forgotten.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn

from fishertool.errors import FishertoolError, InputError
from fishertool.fisher.agreement import Agreement, equal_but_for_rounding, exact_gradients
from fishertool.fisher.apart import FirstDimensions, picks, with_calls
from fishertool.fisher.function_calls import FunctionCalls, Use
from fishertool.fisher.gradients import Gradient, Whole, rows_of
from fishertool.fisher.outputs import Expected, Form, made
from fishertool.fisher.shared import Lookup, Shared
from fishertool.fisher.views import Part, gradients_of, joined, views_by_parameter

Forward = Callable[[int], Tensor]
"""Run the model on one and the same example, repeated so many times; return its logits."""
Consume = Callable[[str, Sequence[Gradient]], None]

SECOND = -3.0
"""In `check` the second example's cotangent is the first's times this."""


class PerExampleGradients:
    """Hooks on a model, active inside `with`, that turn `backward` into per-example gradients.

    parameters   the wanted ones by name: parameters of the model, or views of part of one
    one_by_one   True where some parameter can only be served with one example in a batch: no rule
                 fits it, or its layer mixes examples in its input; and where padding changes outputs
    by_autograd  the names no rule serves

    Raises FishertoolError if a layer's input is changed in place, after `check` saw it was not.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor], calls: FunctionCalls):
        self.model = model
        self.by_autograd: set[str] = set()
        self.one_by_one = False
        self.calls = calls
        self.examples = 1
        self.rows = 1
        """Rows the batch has: its examples, each with as many rows, one after another."""
        self._views = views_by_parameter(parameters)
        self._left: set[int] = set()
        """Parameters left to autograd."""
        self._numbers: dict[int, int] = defaultdict(int)
        self._received: dict[int, list[tuple[int, Part]]] = defaultdict(list)
        self._consume: Consume = lambda name, parts: None
        self._checking = False
        self._dimensions = FirstDimensions()
        self._retain = False
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        self._required = {p: p.requires_grad for p in self.model.parameters()}
        self.calls.listeners.append(self._on_use)
        self._exit.callback(self.calls.listeners.remove, self._on_use)
        for module in self.calls.rules:
            handle = module.register_forward_hook(self._after, with_kwargs=True)
            self._exit.callback(handle.remove)
        self.model.requires_grad_(False)
        return self

    def __exit__(self, *raised: object) -> None:
        self._exit.close()
        for parameter, required in self._required.items():
            parameter.requires_grad_(required)
            parameter.grad = None

    def check(
        self, forward: Forward, rows_each: int = 1, padded: Callable[[], Tensor] | None = None
    ) -> None:
        """Hold every rule against plain autograd, on two examples together, of `rows_each` rows.

        They are the same but for their cotangents, so a layer in which they cannot be told apart
        gives gradients that differ, or reads no more than of one; then examples go one by one. A
        parameter whose gradient differs even so (its layer is bypassed or has its input changed)
        is left to autograd. They go one by one, too, where the example's logits among padding,
        `padded`, are others.
        """
        for views in self._views.values():
            views[0].parameter.requires_grad_(True)
        self.calls.paused = True
        logits, called = with_calls(lambda: forward(1))
        with torch.no_grad():
            self.one_by_one = padded is not None and not equal_but_for_rounding(logits, padded())
        generator = torch.Generator().manual_seed(0)
        cotangent = torch.randn(logits.shape, generator=generator).to(logits)
        exact = exact_gradients(logits, cotangent, self._views)
        self.calls.paused = False
        self.model.requires_grad_(False)
        del logits
        self._checking = True
        self._run(forward, 1, rows_each)  # for the dimensions of what is read
        differing = self._differing(forward, 2, rows_each, cotangent, exact)
        mixed = picks(self.model, self.calls.rules, called, rows_each)
        if self.one_by_one or differing or mixed or not self._dimensions.told_apart:
            self.one_by_one = True
            differing = self._differing(forward, 1, rows_each, cotangent, exact)
            self._leave_to_autograd(differing)
        self._checking = False

    def _differing(
        self,
        forward: Forward,
        examples: int,
        rows_each: int,
        cotangent: Tensor,
        exact: Mapping[str, Tensor],
    ) -> set[str]:
        """The names whose gradients are not those of autograd, `exact`, and those that need a
        function's rule and were in no call of one."""
        named = {view.name: view.tensor for views in self._views.values() for view in views}
        factors = [1.0, SECOND][:examples]
        agreement = Agreement(exact, named, factors)
        try:
            logits = self._run(forward, examples, rows_each)
        except (RuntimeError, FishertoolError):  # examples have no dimension of their own
            if examples == 1:
                raise
            return set(named)
        self.backward(
            logits, torch.cat([factor * cotangent for factor in factors]), agreement.consume
        )
        unseen = self.calls.watched & (self._views.keys() - self._numbers.keys())
        return agreement.differing | {view.name for key in unseen for view in self._views[key]}

    def _run(self, forward: Forward, examples: int, rows_each: int) -> Tensor:
        self._begin(examples, rows_each)
        self.calls.begin(examples, rows_each, counting=False)
        return forward(examples)

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
        for key in list(self._received):
            self._hand_on(key)
        for key in self._left:
            parameter = self._views[key][0].parameter
            if parameter.grad is not None:
                shape = rows_of(parameter)
                part = Part(Whole(parameter.grad.reshape(1, *shape)), 0, shape[0])
                parameter.grad = None
                self._give(key, [part])

    def begin(self, examples: Sequence[int], rows_each: int = 1) -> Sequence[int]:
        """Before each forward pass: which examples the batch has, with how many rows each; an
        example is a unit of its own."""
        if self.one_by_one and len(examples) != 1:
            raise ValueError("this model's examples can only be told apart one at a time")
        self._begin(len(examples), rows_each)
        return examples

    def _begin(self, examples: int, rows_each: int) -> None:
        self.examples, self.rows = examples, examples * rows_each
        self._numbers.clear()

    def _leave_to_autograd(self, names: set[str]) -> None:
        for key, views in self._views.items():
            if any(view.name in names for view in views):
                self._left.add(key)
                self.by_autograd.update(view.name for view in views)
                views[0].parameter.requires_grad_(True)

    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        if self.calls.paused or not torch.is_grad_enabled():
            return None
        given = args[0] if args else next(iter(kwargs.values()))
        x = given.detach().to(output.device)
        if isinstance(given, Shared):
            x = x.expand(len(output), *x.shape[1:])
        own = {name: id(p) for name, p in module.named_parameters(recurse=False)}
        own = {name: key for name, key in own.items() if key in self._views}
        rule = self.calls.rules[module]

        def form(delta: Tensor, examples: int) -> dict[int, Part]:
            gradients = rule(module, x, delta, examples)
            return {
                key: Part(gradients[name], 0, rows_of(self._views[key][0].parameter)[0])
                for name, key in own.items()
            }

        return self._expect(type(module).__name__, x, list(own.values()), form, output)

    def _on_use(self, use: Use, output: Tensor) -> Tensor:
        key = id(use.parameter)
        if key not in self._views or not torch.is_grad_enabled():
            return output

        def form(delta: Tensor, examples: int) -> dict[int, Part]:
            examples = examples if use.example is None else 1
            gradient = use.argument.form(delta, examples)
            if isinstance(gradient, Whole):
                width = rows_of(use.parameter)[1]
                gradient = Whole(gradient.values.reshape(examples, use.rows, width))
            return {key: Part(gradient, use.first, use.rows, use.example)}

        what, reads = type(use.module).__name__, use.argument.reads
        return self._expect(what, reads, [key], form, output, apart=use.example is not None)

    def _expect(
        self,
        what: str,
        reads: Tensor | None,
        keys: Sequence[int],
        form: Form,
        output: Tensor,
        apart: bool = False,
    ) -> Tensor:
        """Wait for the gradient of a layer's output; what the model is to go on with."""

        def listen(copies: Tensor, form: Form) -> Tensor:
            return self._expect(what, reads, keys, form, copies, apart=True)

        if self._checking and not apart:
            self._dimensions.see(self.examples, keys, reads, output)
        keys = [key for key in keys if key not in self._left]
        if keys and not apart and self.examples > 1 and self._dimensions.shared.get(keys[0]):
            lookup = Lookup(output.detach().requires_grad_(), form, self.rows, listen)
            return Shared.of(lookup.output, lookup)
        if not output.requires_grad:  # the graph begins here; the sum keeps in-place changes legal
            output = output + output.new_zeros(()).requires_grad_()
        if keys:
            call = Expected(what, reads, {key: self._numbers[key] for key in keys}, form)
            for key in keys:
                self._numbers[key] += 1
            shape = output.shape
            made(output).register_hook(lambda delta: self._receive(call, delta.reshape(shape)))  # type: ignore[no-untyped-call]
        return output

    def _receive(self, call: Expected, delta: Tensor) -> None:
        if call.is_stale:
            if self._checking:
                return  # the missing gradient sends its parameters to autograd
            raise FishertoolError(
                f"{call.what} had its input changed in place after reading it; "
                "its Fisher cannot be computed from the layer's input"
            )
        assert call.form is not None
        self.calls.paused = True
        try:
            parts = call.form(delta.detach(), self.examples)
        except (RuntimeError, ValueError) as error:
            if self._checking:
                return  # examples are not in front: likewise
            if self.examples == 1 or isinstance(error, torch.OutOfMemoryError):
                raise
            raise InputError(
                f"{call.what}: its input has no row of its own for each example of a batch; "
                "--batch-size 1 takes them one at a time"
            ) from error
        finally:
            self.calls.paused = False
        if not self._retain:
            call.reads = call.form = None  # as autograd frees what it saved, layer by layer
        for key, part in parts.items():
            if key in call.numbers:
                self._received[key].append((call.numbers[key], part))
                if len(self._received[key]) == self._numbers[key]:
                    self._hand_on(key)

    def _hand_on(self, key: int) -> None:
        """In call order, so that rounding does not depend on the order autograd takes."""
        parts = sorted(self._received.pop(key), key=lambda part: part[0])
        self._give(key, joined([part for _, part in parts], self.examples))

    def _give(self, key: int, parts: Sequence[Part]) -> None:
        for view in self._views[key]:
            if gradients := gradients_of(view, parts):
                self._consume(view.name, gradients)
