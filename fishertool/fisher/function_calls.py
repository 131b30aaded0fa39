"""Watch what modules without a layer rule do with their own parameters, call by call."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fishertool.fisher.functions import Argument, arguments
from fishertool.fisher.gradients import rows_of
from fishertool.fisher.layers import Rule, rule_for
from fishertool.fisher.sums import Sums


@dataclass(frozen=True)
class Use:
    """A call of a function on some rows of a parameter."""

    module: nn.Module
    parameter: nn.Parameter
    first: int
    """The parameter's row at which the function's argument begins."""
    rows: int
    argument: Argument
    example: int | None
    """The only example of the batch that takes part in it; None where all do."""


Listener = Callable[[Use, Tensor], Tensor]
"""Sees a use and the function's output, and gives the output to go on with."""


class FunctionCalls:
    """Inside `with`, tells `listeners` how modules use those parameters that no layer rule serves.

    watched  ids of those parameters
    rules    the layer rules of all modules that have one and a wanted parameter
    tokens   id of a stack of matrices -> how many tokens met each
    mixed    whether a stack was given tokens of several examples that it could not be given apart

    A stack of experts sees the tokens of a whole batch as one list, and picks from it. It is given
    one example's tokens after another's, without padding, so that they stay apart.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]):
        wanted = {id(base_of(value)) for value in parameters.values()}
        self.rules: dict[nn.Module, Rule] = {}
        self.listeners: list[Listener] = []
        self.tokens: dict[int, list[int]] = {}
        self.paused = False
        self.mixed = False
        self._changed: dict[nn.Module, Any] = {}
        """Modules whose forward is another inside `with` -> one set on the instance before."""
        self._parameters: dict[int, nn.Parameter] = {}
        self._counting = False
        self._mode = _Mode(self)
        self._module: nn.Module | None = None
        self._examples = 1
        self._rows = 1
        self._example: int | None = None
        self._masks: dict[int, Tensor | None] = {}
        """Tokens with padding -> where there is no padding, or None for everywhere."""
        for module in model.modules():
            own = [p for p in module.parameters(recurse=False) if id(p) in wanted]
            rule = rule_for(module) if own else None
            if rule is not None:
                self.rules[module] = rule
            elif own:
                self._changed[module] = None
                self._parameters.update((id(parameter), parameter) for parameter in own)
        for module in self.rules:  # what they do with a shared parameter, their rules see to
            if any(id(parameter) in self._parameters for parameter in module.parameters()):
                self._changed[module] = None
        self.watched = self._parameters.keys()

    def __enter__(self) -> Self:
        for module in self._changed:
            self._changed[module] = module.__dict__.get("forward")
            module.forward = self._watching(module, module.forward)
        return self

    def __exit__(self, *raised: object) -> None:
        for module, forward in self._changed.items():
            del module.forward
            if forward is not None:
                module.forward = forward

    def begin(
        self,
        examples: int,
        rows_each: int = 1,
        masks: Sequence[Tensor] = (),
        counting: bool = True,
    ) -> None:
        """Before each forward pass: how many examples, how many rows each, masks [row, time] with
        zeros at padding, and whether tokens count."""
        self._examples, self._rows, self._counting = examples, examples * rows_each, counting
        self._masks = {
            mask.numel(): None if bool(mask.all()) else mask.bool().flatten() for mask in masks
        }

    def add_tokens(self, parameters: Mapping[str, Tensor], totals: Sums) -> None:
        """Add to each tensor that is one matrix of a stack, or part of one, how many tokens met it
        since the last time."""
        for name, tensor in parameters.items():
            stack = base_of(tensor)
            counts = self.tokens.get(id(stack))
            if counts is not None and tensor.numel() <= stack[0].numel():
                zero = torch.zeros((), dtype=torch.float64)
                totals.setdefault(name, zero).add_(counts[offset_in(tensor) // stack[0].numel()])
        self.tokens.clear()

    def _watching(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.paused or not self.listeners:
                return forward(*args, **kwargs)
            if module in self.rules:
                with self._inside(None):
                    return forward(*args, **kwargs)
            with self._inside(module):
                if _is_stack(module):
                    return self._apart(forward, args, kwargs)
                return forward(*args, **kwargs)

        return watched

    @contextmanager
    def _inside(self, module: nn.Module | None) -> Iterator[None]:
        """What functions do is this module's, and nobody's if it is None. The mode is on once."""
        outer, self._module = self._module, module
        try:
            with self._mode if outer is None and module is not None else nullcontext():
                yield
        finally:
            self._module = outer

    def _apart(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run it on one example's rows after another's; where rows are not examples', on all."""
        tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
        rows = {len(one) for one in tensors if one.dim()}
        total = next(iter(rows), 0)
        counted = any(isinstance(one, list) for one in (*args, *kwargs.values()))
        if len(rows) != 1 or total % self._examples or counted:  # as many rows for each matrix, say
            self.mixed |= self._examples > 1
            return forward(*args, **kwargs)
        if self._masks and total not in (self._rows, *self._masks):  # Llama 4 repeats all tokens
            return forward(*args, **kwargs)
        index = torch.arange(total, device=tensors[0].device).reshape(self._examples, -1)
        mask = self._masks.get(total)
        if self._examples == 1 and mask is None:
            return forward(*args, **kwargs)
        chosen = [own if mask is None else own[mask[own]] for own in index]
        outputs = []
        for n, kept in enumerate(chosen):
            self._example = n
            try:
                y = forward(
                    *(_pick(one, kept) for one in args),
                    **{name: _pick(one, kept) for name, one in kwargs.items()},
                )
            finally:
                self._example = None
            if not isinstance(y, Tensor) or len(y) != len(kept):
                self.mixed = True
                return forward(*args, **kwargs)
            outputs.append(y)
        output = torch.cat(outputs)
        return output.new_zeros(total, *y.shape[1:]).index_copy(0, torch.cat(chosen), output)

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the mode does with every function of torch."""
        if self.paused or self._module is None:
            return function(*args, **kwargs)
        uses = [use for one in arguments(function, args, kwargs) if (use := self._use(one))]
        y = function(*args, **kwargs)
        for use in uses:
            if self._counting and use.argument.is_linear and _is_stack(use.module):
                self._count(use)
            for listener in self.listeners:
                y = listener(use, y)
        return y

    def _use(self, argument: Argument) -> Use | None:
        tensor = argument.tensor
        parameter = self._parameters.get(id(base_of(tensor)))
        if parameter is None or not tensor.is_contiguous() or self._module is None:
            return None
        width = rows_of(parameter)[1]
        first = offset_in(tensor)
        if first % width or tensor.numel() % width:
            return None
        rows = tensor.numel() // width
        if argument.is_linear and tensor.shape[-1] != width:
            return None
        return Use(self._module, parameter, first // width, rows, argument, self._example)

    def _count(self, use: Use) -> None:
        parameter, x = use.parameter, use.argument.reads
        counts = self.tokens.setdefault(id(parameter), [0] * len(parameter))
        if x is not None and parameter.dim() == 3 and use.rows == parameter.shape[1]:
            counts[use.first // use.rows] += x.shape[:-1].numel()


class _Mode(TorchFunctionMode):
    def __init__(self, calls: FunctionCalls):
        super().__init__()
        self._calls = calls

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self._calls.call(func, args, kwargs or {})


def base_of(tensor: Tensor) -> Tensor:
    """The parameter a view is of; any other tensor itself."""
    base = tensor._base
    return tensor if base is None else base


def offset_in(tensor: Tensor) -> int:
    """Elements of the parameter that come before a view of it."""
    return int(tensor.storage_offset()) - int(base_of(tensor).storage_offset())


def _is_stack(module: nn.Module) -> bool:
    """Whether it has a stack of matrices, as experts do, and leaves no work to other layers."""
    return any(p.dim() == 3 and len(p) > 1 for p in module.parameters(recurse=False)) and not any(
        True for child in module.children() for _ in child.parameters()
    )


def _pick(value: Any, rows: Tensor) -> Any:
    return value[rows] if isinstance(value, Tensor) and value.dim() else value
