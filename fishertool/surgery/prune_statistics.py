"""What a pruning method asks of sidecars, and one matrix's part of it."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fishertool import hub
from fishertool.checkpoint.reader import Checkpoint
from fishertool.errors import InputError, some
from fishertool.fisher.columns import Gradients, HeldGradients, MaskedGradients
from fishertool.fisher.header import FisherHeader
from fishertool.fisher.rank_one import RankOneFisher, mean_fisher
from fishertool.pruning.method import Fisher
from fishertool.sidecar import (
    StoredGradients,
    check_fits,
    open_diagonal,
    open_sidecar,
    read_diagonal,
)
from fishertool.surgery.matrix import Matrix
from fishertool.surgery.prune_recipe import KINDS, Recipe

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
        self._whole: tuple[float, dict[str, Tensor]] | None = None

    @property
    def members(self) -> int:
        """Gradients of the bank."""
        return StoredGradients(self.kinds["rank-one"][0]).members

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

        def is_told(kind: str, matrix: Matrix) -> bool:
            found = self.kinds[kind][1].statistics.get(matrix.name)
            if found is None or kind not in ("diagonal", "rank-one"):
                return found is not None
            return (found.total if kind == "diagonal" else self._mean([matrix])) > 0

        return [
            matrix.name
            for matrix in matrices
            if matrix.layer.kind == "expert"
            and not all(is_told(kind, matrix) for kind in self.kinds)
        ]

    def check(
        self, recipe: Recipe, matrices: Sequence[Matrix], estimated_on: str | None = None
    ) -> None:
        """Refuse, from headers, matrices that a kind tells nothing about, or nothing but zero; by
        the name of the data, where they were `estimated_on` some."""
        for kinds in (self.kinds, self.general):
            for kind, (tensors, header) in kinds.items():
                where = estimated_on or tensors.folder
                names = [matrix.name for matrix in matrices]
                if lost := [name for name in names if name not in header.statistics]:
                    raise InputError(
                        f"{where}: has no {kind} statistic of {some(lost)}; leave these out with "
                        "--exclude, or estimate it of them"
                    )
                if kind == "diagonal" and not sum(header.statistics[n].total for n in names) > 0:
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
                kind = "mean-gradient" if name.endswith("gradient") else "diagonal"
                found[name] = _read(*kinds[kind], kind, matrices, matrix)
        return found

    def diagonal(self, matrix: Matrix) -> Tensor:
        """[out, in]"""
        found = _read(*self.kinds["diagonal"], "diagonal", [matrix], matrix)
        assert isinstance(found, Fisher)
        return found.values

    def activations(self, matrix: Matrix) -> Tensor:
        tensors, header = self.kinds["activation"]
        return _finite(tensors, f"{header.leaders[matrix.name]}#input")

    def curvature(
        self, recipe: Recipe, matrix: Matrix, gone: Tensor | None
    ) -> tuple[RankOneFisher, Gradients] | None:
        """The rank-one Fisher of one matrix, weights that are gone being held at zero, and the
        gradients it is made of; None where all of these are zero."""
        if not (mean := self._mean([matrix])):
            return None
        tensors, _ = self.kinds["rank-one"]
        gradients: Gradients = StoredGradients(tensors, [matrix.name])
        if matrix.turned:
            rows = gradients.read(matrix.name, 0, matrix.elements)
            shaped = rows.reshape(len(rows), *reversed(matrix.shape)).mT
            gradients = HeldGradients({matrix.name: shaped.contiguous()})
        if gone is not None:
            gradients = MaskedGradients(gradients, {matrix.name: ~gone.flatten()})
        block = (
            None if recipe.block is None else aligned(recipe.block, matrix.shape[1], recipe.group)
        )
        assert recipe.damping is not None
        return RankOneFisher(gradients, recipe.damping * mean, block), gradients

    def _mean(self, matrices: Sequence[Matrix]) -> float:
        """Of the rank-one Fisher's diagonal, whatever is gone; each matrix's takes a pass, once."""
        tensors, _ = self.kinds["rank-one"]
        for name in (one.name for one in matrices if one.name not in self._means):
            self._means[name] = mean_fisher(StoredGradients(tensors, [name]))
        total = sum(self._means[one.name] * one.elements for one in matrices)
        return total / sum(one.elements for one in matrices)

    def _scale(self, matrices: Sequence[Matrix]) -> float:
        """The mean over all, without which saliencies of a confident model vanish in float32."""
        if not (mean := self._mean(matrices)):
            raise InputError(
                "every gradient of what is pruned is zero; estimate the Fisher on other data"
            )
        return mean

    def _inverse_diagonal(
        self, recipe: Recipe, matrices: Sequence[Matrix], matrix: Matrix, gone: Gone
    ) -> Tensor:
        if recipe.block is None:
            return self._whole_inverse(recipe, matrices, gone)[matrix.name]
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
            names = [one.name for one in matrices]
            gradients: Gradients = StoredGradients(self.kinds["rank-one"][0], names)
            held = {one: gone(one) for one in matrices}
            masks = {
                one.name: one.upright(~mask).flatten()
                for one, mask in held.items()
                if mask is not None
            }
            if masks:
                gradients = MaskedGradients(gradients, masks)
            fisher = RankOneFisher(gradients, recipe.damping * self._scale(matrices), None)
            values = fisher.inverse_diagonal()
            self._count(fisher)

            def upright(one: Matrix) -> Tensor:
                on_disk = one.shape[::-1] if one.turned else one.shape
                return one.upright(values[fisher.spans[one.name]].reshape(on_disk))

            self._whole = recipe.damping, {one.name: upright(one) for one in matrices}
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


def open_statistics(
    opened: ExitStack, recipe: Recipe, model: Checkpoint, fisher: str, general: str | None
) -> Statistics:
    """The sidecars' parts that the recipe needs.

    Raises InputError for one that lacks a kind, or is of another checkpoint.
    """
    found = []
    for source in (fisher, general):
        kinds: dict[str, Opened] = {}
        for kind in recipe.kinds if source is not None else ():
            assert source is not None
            folder = hub.resolve(source)
            tensors, header = (
                open_diagonal(folder) if kind == "diagonal" else open_sidecar(folder, kind)
            )
            opened.enter_context(tensors)
            check_fits(tensors, header, model)
            kinds[kind] = tensors, header
        found.append(kinds)
    return Statistics(*found)


def aligned(block: int, width: int, group: int = 1) -> int:
    """The largest divisor of a row's width in the upper half below `block`; `block` if there is none,
    when blocks run on over the ends of rows. Of whole groups, which divide the width.

    >>> aligned(128, 384), aligned(50, 384), aligned(50, 384 + 1), aligned(128, 16)
    (128, 48, 35, 16)
    >>> aligned(13, 20), aligned(13, 20, 4)
    (10, 12)
    """
    if block >= width:
        return width
    block -= block % group
    found = [
        size for size in range(block, block // 2, -1) if width % size == 0 and size % group == 0
    ]
    return found[0] if found else block


def _read(
    tensors: Checkpoint,
    header: FisherHeader,
    kind: str,
    matrices: Sequence[Matrix],
    matrix: Matrix,
) -> Fisher | Tensor:
    rows = matrix.stop - matrix.start
    if kind == "mean-gradient":
        return matrix.upright(_finite(tensors, matrix.name))
    values = matrix.upright(read_diagonal(tensors, matrix.name, 0, rows).reshape(rows, -1))
    if not bool((values >= 0).all()) or not bool(values.isfinite().all()):
        raise InputError(f"{tensors.folder}: {matrix.name}: a Fisher is finite and not negative")
    statistics = [header.statistics[one.name] for one in matrices]
    mean = sum(one.total for one in statistics) / sum(one.elements for one in statistics)
    return Fisher(values, mean)


def _finite(tensors: Checkpoint, name: str) -> Tensor:
    values = tensors[name].to(torch.float32)
    if not bool(values.isfinite().all()):
        raise InputError(f"{tensors.where(name)}: has NaN or Inf; estimate it again")
    return values
