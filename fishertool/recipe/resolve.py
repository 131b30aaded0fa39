"""What a recipe's settings are for each tensor."""

import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fishertool.errors import UsageError
from fishertool.recipe.inputs import WEIGHT
from fishertool.recipe.schema import Recipe, Slice
from fishertool.recipe.settings import Scalar, Setting, Settings, interpolate, rules_of
from fishertool.registry import Method, suggest


class Resolved(NamedTuple):
    """What a method is called with. Tensors of the same settings share these objects."""

    weights: list[float]
    settings: dict[str, Any]


class Matches(NamedTuple):
    """How many tensors a rule decided."""

    place: str
    condition: str
    tensors: int


class _Given:
    """A setting where the recipe gives it, with the number of tensors each rule decided."""

    def __init__(self, place: str, setting: Setting) -> None:
        self.place, self.setting, self.rules = place, setting, rules_of(setting)
        self.counts = [0] * len(self.rules)
        self._latest = [0] * len(self.rules)
        self._values: dict[tuple[int, float], Scalar] = {}

    def at(self, name: str, depth: float, tensor: int) -> Scalar | None:
        for index, rule in enumerate(self.rules):
            if rule.matches(name):
                if self._latest[index] != tensor:  # once, though several models ask
                    self._latest[index] = tensor
                    self.counts[index] += 1
                key = (index, depth)
                if key not in self._values:
                    self._values[key] = interpolate(rule.value, depth)
                return self._values[key]
        return None


_Chain = Sequence[_Given]
"""Where a value is looked for: source, slice, recipe."""


@dataclass(frozen=True)
class _Chains:
    """Of one slice."""

    models: list[str]
    weights: list[_Chain]
    shared: dict[str, _Chain]
    per_model: dict[str, list[_Chain]]


class Resolver:
    """Settings and weights by tensor; a source's settings win over its slice's, these over the recipe's.

    Raises UsageError for a parameter that the method does not know, and for a setting of the whole
    method that the models of one slice give differently. Rules go by `named` models, as for a report.
    """

    def __init__(self, recipe: Recipe, method: Method, named: Callable[[str], str] = str) -> None:
        self.recipe = recipe
        self._method, self._named = method, named
        self._known = {name.removesuffix("_"): name for name in method.settings}
        types = typing.get_type_hints(method.function)
        self._per_model = {known for known, name in self._known.items() if _several(types[name])}
        self._given: list[_Given] = []
        self._resolved: dict[object, Resolved] = {}
        self._tensors = 0
        everywhere = self._take(recipe.parameters, "parameters.")
        self._slices = [
            self._chains(f"slices[{number}]", piece, everywhere, recipe.whole)
            for number, piece in enumerate(recipe.slices)
        ]

    def at(self, slice_number: int, tensor_name: str, t: float) -> Resolved:
        """The settings of one tensor; to be called once for each.

        t  its depth in the slice, from 0 at the first layer to 1 at the last
        """
        self._tensors += 1

        def first(chain: _Chain) -> Scalar | None:
            for given in chain:
                value = given.at(tensor_name, t, self._tensors)
                if value is not None:
                    return value
            return None

        chains = self._slices[slice_number]
        weights = tuple(map(first, chains.weights))
        shared = tuple((name, first(chain)) for name, chain in chains.shared.items())
        several = tuple((name, tuple(map(first, of))) for name, of in chains.per_model.items())
        key = (weights, shared, several)
        if key not in self._resolved:
            settings: dict[str, Any] = {name: value for name, value in shared if value is not None}
            for name, values in several:
                if any(value is not None for value in values):
                    settings[name] = self._each(name, values, chains.models, tensor_name)
            self._resolved[key] = Resolved(
                self._weights(weights, chains.models, tensor_name), self._parse(settings)
            )
        return self._resolved[key]

    def matches(self) -> list[Matches]:
        """Every rule that is for some tensors only, and how many it decided so far."""
        return [
            Matches(given.place, rule.condition, count)
            for given in self._given
            for rule, count in zip(given.rules, given.counts, strict=True)
            if rule.condition is not None
        ]

    def unmatched(self) -> list[tuple[str, str]]:
        """Place and condition of the rules that decided none."""
        return [(place, condition) for place, condition, count in self.matches() if not count]

    def _take(self, parameters: Settings, before: str = "", after: str = "") -> dict[str, _Given]:
        known = [*self._known, *([WEIGHT] if "weights" in self._method.inputs else [])]
        taken = {}
        for name, setting in parameters.items():
            if name not in known:
                raise self._error(
                    f"method {self._method.name} has no setting {suggest(name, known)}"
                )
            taken[name] = _Given(f"{before}{name}{after}", setting)
        self._given += taken.values()
        return taken

    def _chains(
        self, place: str, piece: Slice, everywhere: dict[str, _Given], whole: bool
    ) -> _Chains:
        here = self._take(piece.parameters, f"{place}.parameters.")
        models = [source.model for source in piece.sources]
        inside = "" if whole else f" in {place}"
        own = [
            self._take(source.parameters, after=f" of {self._named(source.model)}{inside}")
            for source in piece.sources
        ]

        def chain(name: str, *first: dict[str, _Given]) -> _Chain:
            return [scope[name] for scope in (*first, here, everywhere) if name in scope]

        given = [name for name in self._known if any(name in s for s in (*own, here, everywhere))]
        shared = {}
        for name in given:
            if name not in self._per_model:
                self._check_same(name, own, models)
                shared[name] = chain(name, *[scope for scope in own if name in scope][:1])
        return _Chains(
            models,
            [chain(WEIGHT, scope) for scope in own],
            shared,
            {
                name: [chain(name, scope) for scope in own]
                for name in given
                if name in self._per_model
            },
        )

    def _check_same(
        self, name: str, own: Sequence[dict[str, _Given]], models: Sequence[str]
    ) -> None:
        given = [
            (scope[name], model) for scope, model in zip(own, models, strict=True) if name in scope
        ]
        for one, model in given[1:]:
            if one.setting != given[0][0].setting:
                raise self._error(
                    f"{name} is one setting for all models in method {self._method.name}; "
                    f"{given[0][1]} and {model} give different ones"
                )

    def _weights(
        self, found: Sequence[Scalar | None], models: Sequence[str], tensor: str
    ) -> list[float]:
        if all(weight is None for weight in found):
            return [1 / len(found)] * len(found)
        for weight, model in zip(found, models, strict=True):
            if weight is None:
                raise self._error(f"{model} has no weight for {tensor}; other models have one")
            if isinstance(weight, bool | str):
                raise self._error(f"weight of {model}: {weight!r} is not a number")
        return [float(weight) for weight in found if weight is not None]

    def _each(
        self, name: str, values: Sequence[Scalar | None], models: Sequence[str], tensor: str
    ) -> Any:
        """A number a model, the method's own where a model has none; one number if all agree."""
        default = self._method.settings[self._known[name]]
        filled = [default if value is None else value for value in values]
        for value, model in zip(filled, models, strict=True):
            if value is None:
                raise self._error(f"{model} has no {name} for {tensor}; other models have one")
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise self._error(f"{name} of {model}: {value!r} is not a number")
        return filled[0] if len(set(filled)) == 1 else filled

    def _parse(self, settings: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._method.parse(settings)
        except UsageError as error:
            raise self._error(str(error)) from None

    def _error(self, problem: str) -> UsageError:
        return UsageError(f"{self.recipe.where}: {problem}" if self.recipe.where else problem)


def _several(kind: Any) -> bool:
    """Whether a setting's annotation lets it differ from model to model."""
    return any(typing.get_origin(option) is Sequence for option in typing.get_args(kind))
