"""Run any merge method as streaming does: passes over the pieces first, then piece by piece."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fishertool.merging.method import Fisher, make_passes
from fishertool.registry import Method, find_method, method_names

PACKAGE = "fishertool.merging"
INPUTS = {"models", "weights", "base", "fishers", "generators", "whole"}
METHODS = [
    name for name in method_names(PACKAGE) if set(find_method(PACKAGE, name).inputs) <= INPUTS
]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sidecar(values: Tensor) -> Fisher:
    """One tensor that is the whole model."""
    wide = values.double()
    mean = float(wide.mean())
    return Fisher(values, mean, mean, float(wide.square().sum().sqrt()))


def fishers_for(models: Sequence[Tensor]) -> list[Fisher]:
    """Squares, over several orders of magnitude."""
    return [
        sidecar(random(*model.shape, seed=50 + n, dtype=model.dtype).pow(4))
        for n, model in enumerate(models)
    ]


def generators_for(models: Sequence[Tensor], seed: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * seed + n) for n in range(len(models))]


def merge(
    name: str,
    models: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor | None = None,
    rows: int | None = None,
    seed: int = 0,
    **settings: Any,
) -> Tensor:
    """The method's result for a tensor that is read `rows` at a time, or in one piece."""
    method = find_method(PACKAGE, name)
    settings = method.parse(settings)
    fishers = fishers_for(models) if "fishers" in method.inputs else []
    arguments = [*models, *(one.values for one in fishers)]
    arguments += [] if base is None or "base" not in method.inputs else [base]
    before = [tensor.clone() for tensor in arguments]
    pieces = [
        _Piece(part, len(models), fishers, base is not None and "base" in method.inputs)
        for part in zip(*(_split(tensor, rows) for tensor in arguments), strict=True)
    ]
    found = {"whole": _look(method, weights, models[0].numel(), settings, pieces)}
    merged = []
    for number, piece in enumerate(pieces):
        inputs: dict[str, Any] = {key: one for key, one in found.items() if key in method.inputs}
        if "fishers" in method.inputs:
            inputs["fishers"] = piece.fishers
        if "generators" in method.inputs:
            inputs["generators"] = generators_for(models, seed + number)
        if piece.base is not None:
            inputs["base"] = piece.base
        merged.append(method.function(piece.models, weights, **inputs, **settings))
    for tensor, old in zip(arguments, before, strict=True):
        assert torch.equal(tensor, old), "an argument was written to"
        assert all(one.data_ptr() != tensor.data_ptr() for one in merged if one.numel())
    for one, piece in zip(merged, pieces, strict=True):
        assert (one.shape, one.dtype) == (piece.models[0].shape, models[0].dtype)
    return torch.cat(merged).reshape(models[0].shape)


class _Piece:
    def __init__(
        self, parts: Sequence[Tensor], models: int, fishers: Sequence[Fisher], base: bool
    ) -> None:
        self.models = list(parts[:models])
        self.base = parts[-1] if base else None
        values = parts[models : models + len(fishers)]
        self.fishers = [
            one._replace(values=part) for one, part in zip(fishers, values, strict=True)
        ]

    def look(self, fishers: bool) -> tuple[Any, ...]:
        return (self.models, self.base, self.fishers) if fishers else (self.models, self.base)


def _split(tensor: Tensor, rows: int | None) -> Sequence[Tensor]:
    if rows is None:
        return [tensor]
    return torch.split(tensor.flatten(0, -2) if tensor.ndim > 1 else tensor, rows)


def _look(
    method: Method,
    weights: Sequence[float],
    elements: int,
    settings: dict[str, Any],
    pieces: Sequence[_Piece],
) -> Any:
    if method.whole is None:
        return None
    looks = [piece.look("fishers" in method.inputs) for piece in pieces]
    return make_passes(method.passes(weights, elements, settings), lambda: looks)
