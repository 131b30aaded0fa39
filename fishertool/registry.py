"""Methods by name: a method is the function in the file of its own name, its signature the schema.

`fishertool/merging/fisher.py` holds `fisher(models, weights, fishers, base=None, *, power=1.0, ...)`:
the registered name is `fisher`, its inputs are the positional parameters, and its settings
(`--set power=0.5`) the keyword-only ones. Nothing else is to be declared.
"""

import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import NoneType
from typing import Any, Literal

from fishertool.errors import UsageError

NOT_A_METHOD = ("method",)


@dataclass(frozen=True)
class Method:
    name: str
    function: Callable[..., Any]
    inputs: Mapping[str, bool]
    """Positional parameters; True where the input is required."""
    settings: Mapping[str, Any]
    """Keyword-only parameters with their defaults."""

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    def parse(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings as the function takes them: text is converted by the annotations, defaults fill in."""
        types = typing.get_type_hints(self.function)
        parsed = dict(self.settings)
        for name, value in given.items():
            if name not in self.settings:
                raise UsageError(
                    f"method {self.name} has no setting {suggest(name, self.settings)}"
                )
            parsed[name] = _convert(f"{self.name} {name}", value, types[name])
        return parsed


def method_names(package: str) -> list[str]:
    """The methods of a package such as `fishertool.merging`, found without importing them."""
    parent, _, child = package.rpartition(".")
    paths = [f"{path}/{child}" for path in importlib.import_module(parent).__path__]
    found = (module.name for module in pkgutil.iter_modules(paths))
    return sorted(name.replace("_", "-") for name in found if name not in NOT_A_METHOD)


def find_method(package: str, name: str) -> Method:
    """Import one method. Raises UsageError, with the nearest name, if there is none."""
    names = method_names(package)
    if name not in names:
        raise UsageError(f"no method {suggest(name, names)}")
    identifier = name.replace("-", "_")
    function = getattr(importlib.import_module(f"{package}.{identifier}"), identifier)
    parameters = inspect.signature(function).parameters.values()
    inputs = {p.name: p.default is p.empty for p in parameters if p.kind is not p.KEYWORD_ONLY}
    settings = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    return Method(name, function, inputs, settings)


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
    """A setting by its annotation: bool, int, float, str, a Literal of words, or one of these or None."""
    options = typing.get_args(kind)
    if NoneType in options:
        if value is None or value == "none":
            return None
        return _convert(where, value, next(option for option in options if option is not NoneType))
    if typing.get_origin(kind) is Literal:
        if value not in options:
            raise UsageError(f"{where}: {value!r} is not one of {', '.join(map(str, options))}")
        return value
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if kind is int and isinstance(value, float):
            raise ValueError
        return kind(value)
    except (KeyError, ValueError, TypeError):
        raise UsageError(f"{where}: {value!r} is not a {kind.__name__}") from None
