"""A merge recipe with ranges in the place of values: what a search may choose."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from fishertool.errors import UsageError
from fishertool.recipe.document import Value
from fishertool.recipe.inputs import known_by, reduced
from fishertool.recipe.schema import Recipe, parse_recipe
from fishertool.recipe.settings import Scalar, scalar
from fishertool.registry import Method

RANGE_KEYS = ("low", "high", "log", "step", "points", "groups")
CHOICE_KEYS = ("choices", "points", "groups")
MOST_VARIABLES = 200
FINEST = 1e-12
"""Share of a range that a step is more than: finer ones cannot be counted."""
PART = 0.6
"""How far into a range the value `inside` it lies."""
WHERE = "parameters, merge_method and dtype"


@dataclass(frozen=True)
class Variable:
    """One number or word that is searched, named by its place in the recipe."""

    name: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    step: float | None = None
    """Of 1, values are whole numbers."""
    choices: tuple[Scalar, ...] = ()
    """In the place of a range."""

    @property
    def whole(self) -> bool:
        """Whether its values are whole numbers."""
        return isinstance(self.step, int) and isinstance(self.low, int)

    @property
    def steps(self) -> int:
        """How many steps fit between low and high."""
        return int((self.high - self.low) / self.step + 1e-9) if self.step else 0

    def after(self, steps: int) -> float:
        """The value so many steps above low, as it would be written: 0.3, not 3 * 0.1."""
        low, step = Decimal(str(self.low)), Decimal(str(self.step or 0))
        value = low + steps * step
        return int(value) if self.whole else float(value)


@dataclass(frozen=True)
class Space:
    """The recipes that one file stands for."""

    content: Any
    variables: tuple[Variable, ...]
    where: str
    seed: int
    layers: int | None = None
    """Of the models, over which `groups` are spread."""

    def recipe(self, values: Mapping[str, Scalar]) -> Recipe:
        """The recipe at a point: a value for every variable.

        Its seed follows from the values, so that a method which draws at random draws the same
        for the same point, whatever was tried before.
        """
        filled = self._fill(Value(self.content, self.where), values)
        told = json.dumps([self.seed, sorted(values.items())])
        seed = int.from_bytes(hashlib.sha256(told.encode()).digest()[:4], "little") >> 1
        return replace(parse_recipe(filled, self.where), seed=seed)

    @property
    def methods(self) -> dict[str, dict[str, Scalar]]:
        """Merge methods among which it may choose, each with what of a point chooses it."""
        for variable in self.variables:
            if variable.name == "merge_method":
                return {_method_name(one): {variable.name: one} for one in variable.choices}
        return {_method_name(self.content["merge_method"]): {}}

    def _fill(self, value: Value, values: Mapping[str, Scalar]) -> Any:
        content = value.content
        if _is_range(content):
            points, groups = content.get("points"), content.get("groups")
            if points or groups:
                several = [values[f"{value.place}[{i}]"] for i in range(points or groups)]
                if points or self.layers is None:
                    return several
                if groups > self.layers:
                    raise value.error(f"{groups} groups of layers; the models have {self.layers}")
                return _spread(several, self.layers)
            return values[value.place]
        if isinstance(content, dict):
            return {key: self._fill(item, values) for key, item in value.keys().items()}
        if isinstance(content, list) and content:
            return [self._fill(item, values) for item in value.items()]
        return content


def read_space(value: Value, layers_of: Callable[[str], int], seed: int) -> Space:
    """The space of a recipe's plain data.

    A range is {low, high}, with `log` for a logarithmic scale or `step` for a grid of values, or
    {choices: [...]}. With `points: n` it stands for n numbers from the first layer to the last,
    with straight lines between them; with `groups: n` for a number for each of n runs of layers,
    for which `layers_of` is asked how many a model has.

    Raises UsageError where a range is wrong or in the place of what cannot be searched, where there
    is none, and for a recipe that is wrong whatever the values.
    """
    variables, grouped = _find(value, False)
    if not variables:
        raise value.error(
            "nothing to search: write a range, as {low: 0, high: 1} or {choices: [...]}, "
            f"in the place of a value ({WHERE})"
        )
    if len(variables) > MOST_VARIABLES:
        raise value.error(f"{len(variables)} numbers to search; {MOST_VARIABLES} are the most")
    space = Space(value.content, tuple(variables), value.file, seed)
    tried = {variable.name: inside(variable) for variable in variables}
    recipe = space.recipe(tried)
    if grouped:
        if not recipe.whole:
            raise value.error("groups are for whole models; slices have parameters of their own")
        space = replace(space, layers=layers_of(recipe.slices[0].sources[0].model))
        space.recipe(tried)
    return space


def inside(variable: Variable) -> Scalar:
    """A value inside the range, above its middle, where weights may cancel; or the first choice."""
    if variable.choices:
        return variable.choices[0]
    if variable.step is not None:
        return variable.after(math.ceil(PART * variable.steps))
    low, high = variable.low, variable.high
    return low * (high / low) ** PART if variable.log else low + PART * (high - low)


def fitting(recipe: Recipe, method: Method, others: Mapping[str, Method]) -> Recipe:
    """The recipe without what only other methods of the search know: their parameters, the base.

    What none of them knows stays, to be refused by its name.
    """
    own = known_by(method)
    foreign = {name for other in others.values() for name in known_by(other)} - own

    drops_base = "base" not in method.inputs and any(
        "base" in one.inputs for one in others.values()
    )
    return replace(reduced(recipe, foreign), base=None if drops_base else recipe.base)


def _is_range(content: Any) -> bool:
    return isinstance(content, dict) and bool({"low", "high", "choices"} & content.keys())


def _find(value: Value, allowed: bool) -> tuple[list[Variable], bool]:
    """The variables under a value, `allowed` where a range may stand, and whether any is grouped."""
    content = value.content
    if _is_range(content):
        if not allowed:
            raise value.error(f"a range can only stand in {WHERE}")
        return _parse_range(value), bool(content.get("groups"))
    found: list[tuple[list[Variable], bool]] = []
    if isinstance(content, dict):
        for key, item in value.keys().items():
            top = value.place == "" and key in ("merge_method", "dtype")
            found.append(_find(item, allowed or top or key == "parameters"))
    elif isinstance(content, list) and content:
        found += [_find(item, allowed) for item in value.items()]
    return [one for variables, _ in found for one in variables], any(g for _, g in found)


def _parse_range(value: Value) -> list[Variable]:
    keys = value.keys(CHOICE_KEYS if "choices" in value.content else RANGE_KEYS)
    variable = _parse_choices(value, keys) if "choices" in keys else _parse_numbers(value, keys)
    of_all = value.place in ("merge_method", "dtype")
    if of_all and not all(isinstance(choice, str) for choice in variable.choices or (0,)):
        raise value.wrong("choices of names")
    several = [key for key in ("points", "groups") if key in keys]
    if len(several) == 2:
        raise value.error("points and groups exclude each other")
    if not several:
        return [variable]
    if of_all:
        raise value.error(f"it is the same for all layers; leave out {several[0]}")
    count = keys[several[0]].whole(2)
    return [replace(variable, name=f"{value.place}[{i}]") for i in range(count)]


def _parse_choices(value: Value, keys: Mapping[str, Value]) -> Variable:
    choices = [scalar(item.content) for item in keys["choices"].items()]
    given = tuple(choice for choice in choices if choice is not None)
    if len(given) != len(choices) or len(set(given)) < len(given) or len(given) < 2:
        raise keys["choices"].wrong("a list of two or more different numbers or words")
    return Variable(value.place, choices=given)


def _parse_numbers(value: Value, keys: Mapping[str, Value]) -> Variable:
    numbers: dict[str, float] = {}
    for key in ("low", "high", "step"):
        if key in keys:
            found = scalar(keys[key].content)
            if isinstance(found, str | bool) or found is None:
                raise keys[key].wrong("a finite number")
            numbers[key] = found
        elif key != "step":
            raise value.error(f"a range needs {key}")
    low, high, step = numbers["low"], numbers["high"], numbers.get("step")
    log = keys["log"].flag() if "log" in keys else False
    if not low < high:
        raise value.error(f"low {low} must be less than high {high}")
    if log and low <= 0:
        raise value.error(f"low {low} must be above 0 for a logarithmic scale")
    if step is not None and (log or not FINEST * (high - low) < step <= high - low):
        raise value.error(
            f"step {step}: above {FINEST} of high - low, at most all of it, and not with log"
        )
    return Variable(value.place, low, high, log, step)


def _spread(values: list[Scalar], layers: int) -> list[Scalar]:
    """A value for every layer, from one for every run of layers.

    >>> _spread([0.1, 0.9], 5)
    [0.1, 0.1, 0.1, 0.9, 0.9]
    """
    return [values[layer * len(values) // layers] for layer in range(layers)]


def split_search(value: Value) -> tuple[Value, Value]:
    """The recipe and the objectives of a search's document. Raises UsageError without objectives."""
    keys = value.keys()
    if "objectives" not in keys:
        raise UsageError(
            f"{value.file}: needs objectives, as [{{metric: accuracy, data: a.jsonl}}, ...]"
        )
    rest = {key: item for key, item in value.content.items() if key != "objectives"}
    return Value(rest, value.file), keys["objectives"]


def _method_name(given: object) -> str:
    return str(given).replace("_", "-")
