"""What a pruning method asks of sidecars, and one matrix's part of it."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fishertool.checkpoint.reader import Checkpoint
from fishertool.errors import InputError, some
from fishertool.fisher.columns import (
    Gradients,
    HeldGradients,
    MaskedGradients,
    PartialGradients,
)
from fishertool.fisher.header import FisherHeader
from fishertool.fisher.rank_one import RankOneFisher, mean_fisher
from fishertool.pruning.method import Fisher
from fishertool.sidecar import (
    StoredGradients,
    open_diagonal,
    open_sidecar,
    read_activation,
    read_diagonal,
)
from fishertool.surgery.matrix import Matrix
from fishertool.surgery.prune_recipe import KINDS, Recipe, aligned

Opened = tuple[Checkpoint, FisherHeader]
Gone = Callable[[Matrix], Tensor | None]
"""True where an earlier step pruned a matrix, [out, in]; None before the first one."""


class Statistics:
    """The kinds of a sidecar that are needed, open; with those of general data where there are two.

    fallbacks, clamped  what RankOneFisher had to do so far, counted
    """

    def __init__(self, kinds: dict[str, Opened], general: dict[str, Opened] | None = None):
        self.kinds, self.general = kinds, general or {}
        self.fallbacks, self.clamped = 0, 0
        self._means: dict[str, float] = {}
        self._totals: dict[tuple[Path, str], float] = {}
        self._all: Sequence[Matrix] = []
        self._means_of_all: dict[tuple[Path, str], float] = {}
        self._whole: tuple[float, dict[str, Tensor]] | None = None

    @property
    def members(self) -> int:
        """Gradients of the bank."""
        return StoredGradients(self.kinds["rank-one"][0]).members

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
            return self._mean([matrix]) > 0
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
                inverse = self._inverse_diagonal(recipe, matrices, matrix, gone)
                found[name] = inverse * self._scale(matrices)
            elif name == "inverse_blocks":
                blocks = self._inverse_blocks(recipe, matrices, matrix, gone)
                found[name] = blocks * self._scale(matrices)
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
                    mean = self._once(matrices, kinds["diagonal"], self._diagonal_mean)
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

    def curvature(
        self, recipe: Recipe, matrix: Matrix, gone: Tensor | None
    ) -> tuple[RankOneFisher, Gradients] | None:
        """The rank-one Fisher of one matrix, weights that are gone being held at zero, and the
        gradients it is made of; None where all of these are zero."""
        if not (mean := self._mean([matrix])):
            return None
        gradients = self._gradients([matrix])
        if matrix.turned:
            rows = gradients.read(matrix.key, 0, matrix.elements)
            shaped = rows.reshape(len(rows), *reversed(matrix.shape)).mT
            gradients = HeldGradients({matrix.key: shaped.contiguous()})
        if gone is not None:
            gradients = MaskedGradients(gradients, {matrix.key: ~gone.flatten()})
        block = recipe.block and aligned(recipe.block, matrix.shape[1], recipe.group)
        assert recipe.damping is not None
        return RankOneFisher(gradients, recipe.damping * mean, block), gradients

    def _gradients(self, matrices: Sequence[Matrix]) -> Gradients:
        names = dict.fromkeys(one.name for one in matrices)
        stored = StoredGradients(self.kinds["rank-one"][0], list(names))
        parts = {one.key: (one.name, one.first, one.elements) for one in matrices}
        return PartialGradients(stored, parts)

    def _once(
        self, matrices: Sequence[Matrix], opened: Opened, mean: Callable[..., float]
    ) -> float:
        """A mean over all that is pruned, which every one of them asks for."""
        if self._all is not matrices:
            self._all, self._means_of_all = matrices, {}
        place = opened[0].folder, opened[1].kind
        if place not in self._means_of_all:
            self._means_of_all[place] = mean(matrices, opened)
        return self._means_of_all[place]

    def _diagonal_mean(self, matrices: Sequence[Matrix], opened: Opened) -> float:
        return self._total(opened, matrices) / sum(one.elements for one in matrices)

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

    def _mean(self, matrices: Sequence[Matrix]) -> float:
        """Of the rank-one Fisher's diagonal, whatever is gone; each matrix's takes a pass, once."""
        for one in matrices:
            if one.key not in self._means:
                self._means[one.key] = mean_fisher(self._gradients([one]))
        total = sum(self._means[one.key] * one.elements for one in matrices)
        return total / sum(one.elements for one in matrices)

    def _scale(self, matrices: Sequence[Matrix]) -> float:
        """The mean over all, without which saliencies of a confident model vanish in float32."""
        mean = self._once(matrices, self.kinds["rank-one"], lambda some, _: self._mean(some))
        if not mean:
            raise InputError(
                "every gradient of what is pruned is zero; estimate the Fisher on other data"
            )
        return mean

    def _inverse_diagonal(
        self, recipe: Recipe, matrices: Sequence[Matrix], matrix: Matrix, gone: Gone
    ) -> Tensor:
        if recipe.block is None:
            return self._whole_inverse(recipe, matrices, gone)[matrix.key]
        found = self.curvature(recipe, matrix, gone(matrix))
        if found is None:
            return torch.full(matrix.shape, torch.inf, dtype=torch.float64)
        inverse = found[0].inverse_diagonal().reshape(matrix.shape)
        self._count(found[0])
        return inverse

    def _whole_inverse(
        self, recipe: Recipe, matrices: Sequence[Matrix], gone: Gone
    ) -> dict[str, Tensor]:
        """Its diagonal, by matrix, where F is whole."""
        assert recipe.damping is not None
        if self._whole is None or self._whole[0] != recipe.damping:
            gradients = self._gradients(matrices)
            held = {one: gone(one) for one in matrices}
            masks = {
                one.key: one.upright(~mask).flatten()
                for one, mask in held.items()
                if mask is not None
            }
            if masks:
                gradients = MaskedGradients(gradients, masks)
            fisher = RankOneFisher(gradients, recipe.damping * self._scale(matrices), None)
            values = fisher.inverse_diagonal()
            self._count(fisher)

            def upright(one: Matrix) -> Tensor:
                return one.upright(values[fisher.spans[one.key]].reshape(one.info.shape))

            self._whole = recipe.damping, {one.key: upright(one) for one in matrices}
        return self._whole[1]

    def _inverse_blocks(
        self, recipe: Recipe, matrices: Sequence[Matrix], matrix: Matrix, gone: Gone
    ) -> Tensor:
        if recipe.group == 1:
            return self._inverse_diagonal(recipe, matrices, matrix, gone)[..., None, None]
        found = self.curvature(recipe, matrix, gone(matrix))
        groups = matrix.shape[0], -1, recipe.group
        if found is None:
            infinite = torch.full(matrix.shape, torch.inf, dtype=torch.float64)
            return infinite.reshape(groups).diag_embed()
        blocks = found[0].inverse_blocks(recipe.group)
        self._count(found[0])
        return blocks.reshape(*groups, recipe.group)

    def _count(self, fisher: RankOneFisher) -> None:
        self.fallbacks += len(fisher.fallbacks)
        self.clamped += fisher.clamped


def open_kind(opened: ExitStack, folder: Path, kind: str) -> Opened:
    """One kind of a sidecar; a diagonal also as its rows' and columns' sums."""
    found = open_diagonal(folder) if kind == "diagonal" else open_sidecar(folder, kind)
    opened.enter_context(found[0])
    return found


def _diagonal(tensors: Checkpoint, matrix: Matrix) -> Tensor:
    values = matrix.upright(read_diagonal(tensors, matrix.name, matrix.start, matrix.stop))
    if not bool((values >= 0).all()) or not bool(values.isfinite().all()):
        raise InputError(f"{tensors.folder}: {matrix.key}: a Fisher is finite and not negative")
    return values


def _mean_gradient(tensors: Checkpoint, matrix: Matrix) -> Tensor:
    rows = tensors.read(matrix.name, matrix.start, matrix.stop)
    return matrix.upright(_finite(tensors, matrix.name, rows))


def _finite(tensors: Checkpoint, name: str, values: Tensor) -> Tensor:
    values = values.to(torch.float32)
    if not bool(values.isfinite().all()):
        raise InputError(f"{tensors.where(name)}: has NaN or Inf; estimate it again")
    return values
