"""Ranges in a recipe: which variables they make, and the recipe at a point."""

from typing import Any

import pytest

from fishertool.errors import UsageError
from fishertool.recipe.document import Value
from fishertool.recipe.space import Space, Variable, fitting, inside, read_space
from fishertool.registry import find_method

UNIT = {"low": 0, "high": 1}


def space_of(weight: Any, layers: int = 6, **more: Any) -> Space:
    content = {
        "merge_method": "ties",
        "base_model": "c",
        "models": [{"model": "a", "parameters": {"weight": weight}}, {"model": "b"}],
    } | more
    return read_space(Value(content, "f.yml"), lambda model: layers, seed=0)


def weight_of(space: Space, **values: float) -> Any:
    return space.recipe(values).slices[0].sources[0].parameters["weight"]


PLACE = "models[0].parameters.weight"


def test_a_range_is_a_variable_named_by_its_place() -> None:
    space = space_of(UNIT)
    assert space.variables == (Variable(PLACE, 0, 1),)
    assert weight_of(space, **{PLACE: 0.25}) == 0.25


def test_points_are_a_gradient_and_groups_are_steps_over_the_layers() -> None:
    names = [f"{PLACE}[0]", f"{PLACE}[1]"]
    values = dict(zip(names, (0.2, 0.8), strict=True))
    points, groups = (space_of({**UNIT, key: 2}) for key in ("points", "groups"))
    assert [one.name for one in points.variables] == [one.name for one in groups.variables] == names
    assert weight_of(points, **values) == (0.2, 0.8)
    assert weight_of(groups, **values) == (0.2, 0.2, 0.2, 0.8, 0.8, 0.8)


def test_a_range_can_stand_in_a_rule() -> None:
    space = space_of([{"filter": "mlp", "value": UNIT}, {"value": 0.5}])
    [variable] = space.variables
    first, second = weight_of(space, **{variable.name: 0.1})
    assert (first.filter, first.value, second.value) == ("mlp", 0.1, 0.5)


def test_the_seed_follows_from_the_point_alone() -> None:
    space = space_of(UNIT)
    one, same, other = (space.recipe({PLACE: value}).seed for value in (0.1, 0.1, 0.2))
    assert one == same != other
    again = read_space(Value(space.content, "f.yml"), lambda model: 6, seed=1)
    assert again.recipe({PLACE: 0.1}).seed != one


def test_what_only_another_method_knows_is_left_out() -> None:
    choices = {"choices": ["linear", "dare_ties"]}
    space = space_of(UNIT, merge_method=choices, parameters={"density": UNIT, "normalise": 1})
    methods = {name: find_method("fishertool.merging", name) for name in space.methods}
    assert list(methods) == ["linear", "dare-ties"]
    point = {one.name: inside(one) for one in space.variables}
    for name, choice in space.methods.items():
        others = {other: method for other, method in methods.items() if other != name}
        found = fitting(space.recipe(point | choice), methods[name], others)
        assert ("density" in found.parameters) == (name == "dare-ties")
        assert found.base == ("c" if name == "dare-ties" else None)
        assert "normalise" in found.parameters  # known to none: to be refused by its name


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (Variable("x", 0, 1), 0.6),
        (Variable("x", 0.01, 1, log=True), 0.01**0.4),
        (Variable("x", 0, 1, step=0.25), 0.75),
        (Variable("x", 1, 4, step=1), 3),
        (Variable("x", choices=("a", "b")), "a"),
    ],
)
def test_inside(variable: Variable, expected: Any) -> None:
    assert inside(variable) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (
            {"low": 1, "high": 1},
            "f.yml: models[0].parameters.weight: low 1 must be less than high 1",
        ),
        ({"low": 0, "high": float("inf")}, "not a finite number"),
        ({"low": 0, "high": True}, "not a finite number"),
        ({"low": 0, "high": 1, "step": 0}, "step 0"),
        ({"low": 0, "high": 1, "step": 1e-320}, "above 1e-12 of high - low"),
        ({"low": -1e308, "high": 1e308, "step": 1e307}, "at most all of it"),
        ({"low": 1, "high": 2, "log": True, "step": 0.5}, "not with log"),
        ({**UNIT, "pionts": 2}, "did you mean 'points'?"),
        ({**UNIT, "points": 1}, "a whole number of at least 2"),
        ({**UNIT, "points": 2, "groups": 2}, "exclude each other"),
        ({**UNIT, "groups": 7}, "7 groups of layers; the models have 6"),
        ({**UNIT, "points": 500}, "200 are the most"),
        ({"choices": [1, 1]}, "two or more different"),
        ({"choices": [1], "low": 2}, "no key 'low'"),
        (0.5, "nothing to search"),
    ],
)
def test_wrong_ranges_are_refused_with_their_place(weight: Any, message: str) -> None:
    with pytest.raises(UsageError) as found:
        space_of(weight)
    assert message in str(found.value)


def test_groups_are_for_whole_models() -> None:
    sources = [
        {"model": name, "layer_range": [0, 2], "parameters": {"weight": {**UNIT, "groups": 2}}}
        for name in "ab"
    ]
    content = {"merge_method": "linear", "slices": [{"sources": sources}]}
    with pytest.raises(UsageError, match="groups are for whole models"):
        read_space(Value(content, "f.yml"), lambda model: 2, seed=0)
