"""Points of a search as vectors in the unit cube, where a surrogate model lives."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fishertool.recipe.settings import Scalar
from fishertool.recipe.space import Variable


def width(variables: Sequence[Variable]) -> int:
    """Dimensions of the cube: one a number, and one for every choice of a word."""
    return sum(len(variable.choices) or 1 for variable in variables)


def encode(variables: Sequence[Variable], point: Mapping[str, Any]) -> list[float]:
    """A point's coordinates, each from 0 to 1. A choice is 1 in its own and 0 in the others'."""
    row: list[float] = []
    for variable in variables:
        value = point[variable.name]
        if variable.choices:
            row += [float(value == choice) for choice in variable.choices]
        else:
            row.append((_scale(variable, value) - _low(variable)) / _length(variable))
    return row


def decode(variables: Sequence[Variable], row: Tensor) -> dict[str, Scalar]:
    """The point nearest to a vector [width]: steps are rounded to, the largest choice is taken."""
    point: dict[str, Scalar] = {}
    start = 0
    for variable in variables:
        if variable.choices:
            end = start + len(variable.choices)
            point[variable.name] = variable.choices[int(row[start:end].argmax())]
        else:
            end = start + 1
            point[variable.name] = _value(variable, float(row[start].clamp(0, 1)))
        start = end
    return point


def snapped(variables: Sequence[Variable], rows: Tensor) -> Tensor:
    """Vectors [point, width] moved to the points that they decode to."""
    near = [encode(variables, decode(variables, row)) for row in rows]
    return torch.tensor(near, dtype=torch.float64).reshape(rows.shape)


def _value(variable: Variable, part: float) -> float | int:
    value = _low(variable) + part * _length(variable)
    if variable.step is not None:
        steps = round((value - variable.low) / variable.step)
        return variable.after(min(steps, variable.steps))
    if variable.log:
        value = math.exp(value)
    # Rounding may lead out of the range; its ends may be whole numbers, and 10 is not told as 10.0 is.
    return float(min(max(value, variable.low), variable.high))


def _low(variable: Variable) -> float:
    return _scale(variable, variable.low)


def _length(variable: Variable) -> float:
    return _scale(variable, variable.high) - _low(variable)


def _scale(variable: Variable, value: float) -> float:
    return math.log(value) if variable.log else float(value)
