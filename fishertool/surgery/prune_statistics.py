"""What a pruning method asks of sidecars, and one matrix's part of it."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fishertool.checkpoint.reader import Checkpoint
from fishertool.errors import InputError, some
from fishertool.fisher.header import FisherHeader
from fishertool.pruning.method import Fisher
from fishertool.sidecar import (
    open_diagonal,
    open_sidecar,
    read_activation,
    read_diagonal,
)
from fishertool.surgery.matrix import Matrix
from fishertool.surgery.prune_bank import Bank, Gone
from fishertool.surgery.prune_recipe import KINDS, Recipe

Opened = tuple[Checkpoint, FisherHeader]


class Statistics:
    """The kinds of a sidecar that are needed, open; with those of general data where there are two."""

    def __init__(self, kinds: dict[str, Opened], general: dict[str, Opened] | None = None):
        self.kinds, self.general = kinds, general or {}
        self._totals: dict[tuple[Path, str], float] = {}
        self._all: Sequence[Matrix] = []
        self._means_of_all: dict[Path, float] = {}

    @cached_property
    def bank(self) -> Bank:
        return Bank(self.kinds["rank-one"][0])

    @property
    def factored(self) -> bool:
        """Whether a diagonal is told by its rows' and columns' sums alone."""
        opened = (*self.kinds.values(), *self.general.values())
        return any(header.kind == "factored" for _, header in opened)

    def folders(self) -> list[Path]:
        return [tensors.folder for tensors, _ in (*self.kinds.values(), *self.general.values())]

    def fingerprints(self) -> list[dict[str, str]]:
        """Of every kind that is open, and of those of general data."""
        return [
            {kind: tensors.fingerprint() for kind, (tensors, _) in kinds.items()}
            for kinds in (self.kinds, self.general)
        ]

    def unreached(self, matrices: Sequence[Matrix]) -> list[str]:
        """Experts that are told nothing about: no token went through them."""
        return [
            matrix.key
            for matrix in matrices
            if matrix.layer.kind in ("expert", "experts")
            and not all(self._is_told(kind, matrix) for kind in self.kinds)
        ]

    def _is_told(self, kind: str, matrix: Matrix) -> bool:
        header = self.kinds[kind][1]
        if matrix.name not in header.statistics:
            # A stack that is not there at all is refused, and what was left out of the estimate.
            return matrix.expert is not None or matrix.name not in header.without
        if kind == "diagonal":
            return self._total(self.kinds[kind], [matrix]) > 0
        if kind == "rank-one":
            return self.bank.mean([matrix]) > 0
        return kind != "activation" or matrix.expert is None or self._moment(matrix) is not None

    def check(self, matrices: Sequence[Matrix], estimated_on: str | None = None) -> None:
        """Refuse matrices that a kind tells nothing about, or nothing but zero; by the name of the
        data, where they were `estimated_on` some. From headers, but for stacks of experts."""
        for kinds in (self.kinds, self.general):
            for kind, (tensors, header) in kinds.items():
                where = estimated_on or tensors.folder
                names = dict.fromkeys(matrix.name for matrix in matrices)
                if lost := [name for name in names if name not in header.statistics]:
                    raise InputError(
                        f"{where}: has no {kind} statistic of {some(lost)}; leave these out with "
                        "--exclude, or estimate it of them"
                    )
                if kind == "diagonal" and not self._total(kinds[kind], matrices) > 0:
                    raise InputError(
                        f"{where}: the Fisher of what is pruned is zero everywhere; estimate it on "
                        "other data"
                    )

    def inputs(
        self, recipe: Recipe, matrices: Sequence[Matrix], matrix: Matrix, gone: Gone
    ) -> dict[str, Any]:
        """What the method names, of one matrix, as [out, in] says whatever is on disk."""
        found: dict[str, Any] = {}
        for name in recipe.method.inputs:
            if name == "inverse_diagonal":
                found[name] = self.bank.inverse_diagonal(recipe, matrices, matrix, gone)
            elif name == "inverse_blocks":
                found[name] = self.bank.inverse_blocks(recipe, matrices, matrix, gone)
            elif name == "gone":
                found[name] = gone(matrix)
            elif name == "pruned":
                found[name] = recipe.pruned_of_group
            elif name == "activations":
                found[name] = self.activations(matrix)
            elif name in KINDS or name.startswith("general"):
                kinds = self.general if name.startswith("general") else self.kinds
                if name.endswith("gradient"):
                    found[name] = _mean_gradient(kinds["mean-gradient"][0], matrix)
                else:
                    mean = self._mean_of_all(kinds["diagonal"], matrices)
                    found[name] = Fisher(_diagonal(kinds["diagonal"][0], matrix), mean)
        return found

    def diagonal(self, matrix: Matrix) -> Tensor:
        """[out, in]"""
        return _diagonal(self.kinds["diagonal"][0], matrix)

    def activations(self, matrix: Matrix) -> Tensor:
        """Of an expert that no token reaches any more after an earlier step, that of white noise:
        its weights go by their size."""
        moment = self._moment(matrix)
        return torch.eye(matrix.shape[1]) if moment is None else moment

    def _moment(self, matrix: Matrix) -> Tensor | None:
        """Of its inputs, [in, in]; None where no token reached it."""
        tensors, header = self.kinds["activation"]
        if matrix.name not in header.statistics:
            return None
        moment = read_activation(tensors, header, matrix.name, matrix.expert)
        if matrix.expert is not None and not bool(moment.any()):
            return None
        return _finite(tensors, f"{header.leaders[matrix.name]}#input", moment)

    def _mean_of_all(self, opened: Opened, matrices: Sequence[Matrix]) -> float:
        """Of a diagonal, over all that is pruned, which every one of them asks for."""
        if self._all is not matrices:
            self._all, self._means_of_all = matrices, {}
        place = opened[0].folder
        if place not in self._means_of_all:
            elements = sum(one.elements for one in matrices)
            self._means_of_all[place] = self._total(opened, matrices) / elements
        return self._means_of_all[place]

    def _total(self, opened: Opened, matrices: Sequence[Matrix]) -> float:
        """Of a diagonal; a stack's header has no expert's, which takes a pass, once."""
        tensors, header = opened
        total = 0.0
        for one in matrices:
            place = tensors.folder, one.key
            if one.expert is None:
                total += header.statistics[one.name].total
                continue
            if place not in self._totals:
                self._totals[place] = float(_diagonal(tensors, one).sum(dtype=torch.float64))
            total += self._totals[place]
        return total


def open_kind(opened: ExitStack, folder: Path, kind: str) -> Opened:
    """One kind of a sidecar; a diagonal also as its rows' and columns' sums."""
    found = open_diagonal(folder) if kind == "diagonal" else open_sidecar(folder, kind)
    opened.enter_context(found[0])
    return found


def _diagonal(tensors: Checkpoint, matrix: Matrix) -> Tensor:
    return matrix.upright(read_diagonal(tensors, matrix.name, matrix.start, matrix.stop))


def _mean_gradient(tensors: Checkpoint, matrix: Matrix) -> Tensor:
    rows = tensors.read(matrix.name, matrix.start, matrix.stop)
    return matrix.upright(_finite(tensors, matrix.name, rows))


def _finite(tensors: Checkpoint, name: str, values: Tensor) -> Tensor:
    values = values.to(torch.float32)
    if not bool(values.isfinite().all()):
        raise InputError(f"{tensors.where(name)}: has NaN or Inf; estimate it again")
    return values
