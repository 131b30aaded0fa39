"""Methods by name: a method is the function in the file of its own name, its signature the schema.

`fishertool/merging/fisher.py` holds `fisher(models, weights, fishers, base=None, *, power=1.0, ...)`:
the registered name is `fisher`, its inputs are the positional parameters, and its settings
(`--set power=0.5`) the keyword-only ones; one called `lambda_` is set by `lambda`. Nothing else is
to be declared.
"""

import functools
import importlib
import inspect
import operator
import pkgutil
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import NoneType
from typing import Any, Literal

from fishertool.errors import UsageError

MERGING, PRUNING = "fishertool.merging", "fishertool.pruning"
FACTORIZATION = "fishertool.factorization"
"""Packages of methods."""
NOT_A_METHOD = ("method", "rank")


@dataclass(frozen=True)
class Method:
    name: str
    function: Callable[..., Any]
    inputs: Mapping[str, bool]
    """Positional parameters; True where the input is required."""
    settings: Mapping[str, Any]
    """Keyword-only parameters with their defaults."""
    whole: Callable[..., Any] | None = None
    """The second function of a method that must know more of a tensor than one piece."""
    models: int | None = None
    """How many models it takes, where the signature says so: `models: tuple[Tensor, Tensor]`."""

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    def passes(self, weights: Sequence[float], elements: int, settings: Mapping[str, Any]) -> Any:
        """The passes over a whole tensor that `whole` makes, with those settings that it takes."""
        assert self.whole is not None
        taken = inspect.signature(self.whole).parameters
        own = {name: value for name, value in settings.items() if name in taken}
        return self.whole(weights, elements, **own)

    def parse(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings as the function takes them: text is converted by the annotations, defaults fill in."""
        types = typing.get_type_hints(self.function)
        parsed = dict(self.settings)
        known = {name.removesuffix("_"): name for name in self.settings}
        for name, value in given.items():
            if name not in known:
                raise UsageError(f"method {self.name} has no setting {suggest(name, known)}")
            parsed[known[name]] = _convert(f"{self.name} {name}", value, types[known[name]])
        return parsed


def method_names(package: str) -> list[str]:
    """The methods of a package such as `fishertool.merging`, found without importing them."""
    parent, _, child = package.rpartition(".")
    paths = [f"{path}/{child}" for path in importlib.import_module(parent).__path__]
    found = (module.name for module in pkgutil.iter_modules(paths) if not module.ispkg)
    return sorted(name.replace("_", "-") for name in found if name not in NOT_A_METHOD)


def find_method(package: str, name: str) -> Method:
    """Import one method. Raises UsageError, with the nearest name, if there is none."""
    names = method_names(package)
    if name not in names:
        raise UsageError(f"no method {suggest(name, names)}")
    identifier = name.replace("-", "_")
    module = importlib.import_module(f"{package}.{identifier}")
    function = getattr(module, identifier)
    parameters = inspect.signature(function).parameters.values()
    inputs = {p.name: p.default is p.empty for p in parameters if p.kind is not p.KEYWORD_ONLY}
    settings = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    models = typing.get_type_hints(function).get("models")
    count = len(typing.get_args(models)) if typing.get_origin(models) is tuple else None
    return Method(name, function, inputs, settings, getattr(module, "whole", None), count)


def suggest(name: str, known: typing.Iterable[str]) -> str:
    """An unknown name, quoted, with what was probably meant.

    >>> suggest("powr", ["power", "floor"]), suggest("x", ["power", "floor"])
    ("'powr'; did you mean 'power'?", "'x'; known: power, floor")
    """
    known = list(known)
    close = get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}"
    return f"{name!r}; {hint}"


def _convert(where: str, value: Any, kind: Any) -> Any:
    """A setting by its annotation.

    bool, int, float, str, a Literal of words, float | Sequence[float], or one of these or None.
    mergekit writes all numbers as 1.0, and true and false too.
    """
    options = typing.get_args(kind)
    if NoneType in options:
        if value is None or value == "none":
            return None
        rest = [option for option in options if option is not NoneType]
        return _convert(where, value, functools.reduce(operator.or_, rest))
    if any(
        typing.get_origin(option) is Sequence for option in options
    ):  # one number, or a list of them
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            return _convert(where, items, float)
        numbers = [_convert(where, item, float) for item in items]
        return numbers if len(numbers) > 1 else numbers[0]
    if typing.get_origin(kind) is Literal:
        if value not in options:
            raise UsageError(f"{where}: {value!r} is not one of {', '.join(map(str, options))}")
        return value
    try:
        if kind is bool:
            text = value.lower() if isinstance(value, str) else value
            return {"true": True, "false": False, 1: True, 0: False}[text]
        broken = kind is int and isinstance(value, float) and not value.is_integer()
        if isinstance(value, bool) or broken:
            raise ValueError
        return kind(value)
    except (KeyError, ValueError, TypeError):
        raise UsageError(f"{where}: {value!r} is not a {kind.__name__}") from None
