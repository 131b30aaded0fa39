"""Settings that may differ from tensor to tensor: numbers, gradients over layers, rules by name."""

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeGuard

from fishertool.recipe.document import Value

Scalar = bool | int | float | str
Gradient = tuple[Scalar, ...]
"""Values from the first layer to the last, with straight lines between them."""

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
RULE_KEYS = ("value", "filter", "glob")


@dataclass(frozen=True)
class Rule:
    """A value for the tensors whose name contains `filter`, or matches `glob`; for all without both."""

    value: Scalar | Gradient
    filter: str | None = None
    glob: str | None = None

    @property
    def condition(self) -> str | None:
        return self.filter or self.glob

    def matches(self, name: str) -> bool:
        if self.glob is not None:
            return fnmatchcase(name, self.glob)
        return self.filter is None or self.filter in name


Rules = tuple[Rule, ...]
"""The first that matches decides."""
Setting = Scalar | Gradient | Rules
Settings = Mapping[str, Setting]


def rules_of(setting: Setting) -> Rules:
    """A setting as rules; a value without conditions is one rule for all tensors."""
    if not isinstance(setting, tuple):
        return (Rule(setting),)
    rules = tuple(item for item in setting if isinstance(item, Rule))
    return rules or (Rule(tuple(item for item in setting if not isinstance(item, Rule))),)


def interpolate(value: Scalar | Gradient, depth: float) -> Scalar:
    """A gradient's value at `depth`, from 0 at the first layer to 1 at the last.

    Words, and true and false, have nothing between them: the one at or before `depth` is taken.

    >>> interpolate((0, 1, 0.5), 0.75), interpolate(("a", "b", "c"), 0.75), interpolate(3, 0.75)
    (0.75, 'b', 3)
    """
    if not isinstance(value, tuple):
        return value
    place = depth * (len(value) - 1)
    if math.isclose(place, round(place), abs_tol=1e-9):  # a depth is a ratio, and was rounded
        place = round(place)
    before = int(place)
    start, end = value[before], value[min(before + 1, len(value) - 1)]
    if place == before or not _is_number(start) or not _is_number(end):
        return start
    return start + (place - before) * (end - start)


def scalar(content: object) -> Scalar | None:
    """A single value, with numbers that YAML or the command line leaves as text; None for others.

    >>> scalar("1e-5"), scalar("-3"), scalar("none"), scalar([1])
    (1e-05, -3, 'none', None)
    """
    if isinstance(content, str) and NUMBER.fullmatch(content):
        whole = content.lstrip("+-").isdecimal() and len(content) < 20
        content = int(content) if whole else float(content)
    if isinstance(content, int | float) and not abs(content) <= sys.float_info.max:
        return None  # of a whole number too: it is computed with as a float
    return content if isinstance(content, bool | int | float | str) else None


def parse_setting(value: Value) -> Setting:
    """A number, truth value or word; a list of them; or one {filter, value} or a list of those."""
    if isinstance(value.content, dict):
        return (_parse_rule(value),)
    if not isinstance(value.content, list):
        return _parse_scalar(value)
    items = value.items()
    if any(isinstance(item.content, dict) for item in items):
        return tuple(map(_parse_rule, items))
    return tuple(map(_parse_scalar, items))


def _parse_rule(value: Value) -> Rule:
    keys = value.keys(RULE_KEYS)
    if "value" not in keys:
        raise value.error("a rule needs a value")
    if "filter" in keys and "glob" in keys:
        raise value.error("filter (part of a name) and glob exclude each other")
    condition = {key: keys[key].text() for key in ("filter", "glob") if key in keys}
    if "*" in condition.values():
        condition = {}
    found = keys["value"]
    if isinstance(found.content, list):
        return Rule(tuple(map(_parse_scalar, found.items())), **condition)
    return Rule(_parse_scalar(found), **condition)


def _parse_scalar(value: Value) -> Scalar:
    found = scalar(value.content)
    if found is None or found == "":
        raise value.wrong("a finite number, a word, true or false")
    return found


def _is_number(value: Scalar) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
