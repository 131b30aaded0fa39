"""The rank-one Fisher of what is pruned, which a sidecar's gradients make, and its inverse."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fishertool.checkpoint.reader import Checkpoint
from fishertool.errors import InputError
from fishertool.fisher.columns import (
    Gradients,
    HeldGradients,
    MaskedGradients,
    PartialGradients,
)
from fishertool.fisher.rank_one import RankOneFisher, mean_fisher
from fishertool.sidecar import StoredGradients
from fishertool.surgery.matrix import Matrix
from fishertool.surgery.prune_recipe import Recipe, aligned

Gone = Callable[[Matrix], Tensor | None]
"""True where an earlier step pruned a matrix, [out, in]; None before the first one."""


class Bank:
    """Inverses are times the mean of the diagonal over all that is pruned, without which saliencies
    of a confident model vanish in float32; they are infinite where F is zero.

    fallbacks, clamped  what RankOneFisher had to do so far, counted
    """

    def __init__(self, tensors: Checkpoint):
        self._tensors = tensors
        self.fallbacks, self.clamped = 0, 0
        self._means: dict[str, float] = {}
        self._all: Sequence[Matrix] = []
        self._mean_of_all = 0.0
        self._whole: tuple[float, dict[str, Tensor]] | None = None

    @property
    def members(self) -> int:
        return StoredGradients(self._tensors).members

    def mean(self, matrices: Sequence[Matrix]) -> float:
        """Of the diagonal, whatever is gone; each matrix's takes a pass, once."""
        for one in matrices:
            if one.key not in self._means:
                self._means[one.key] = mean_fisher(self._gradients([one]))
        total = sum(self._means[one.key] * one.elements for one in matrices)
        return total / sum(one.elements for one in matrices)

    def curvature(
        self, recipe: Recipe, matrix: Matrix, gone: Tensor | None
    ) -> tuple[RankOneFisher, Gradients] | None:
        """The Fisher of one matrix, weights that are gone being held at zero, and the gradients it
        is made of; None where all of these are zero."""
        if not (mean := self.mean([matrix])):
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

    def inverse_diagonal(
        self, recipe: Recipe, matrices: Sequence[Matrix], matrix: Matrix, gone: Gone
    ) -> Tensor:
        """[out, in]"""
        if recipe.block is None:
            inverse = self._whole_inverse(recipe, matrices, gone)[matrix.key]
        elif (found := self.curvature(recipe, matrix, gone(matrix))) is None:
            inverse = torch.full(matrix.shape, torch.inf, dtype=torch.float64)
        else:
            inverse = found[0].inverse_diagonal().reshape(matrix.shape)
            self._count(found[0])
        return inverse * self._scale(matrices)

    def inverse_blocks(
        self, recipe: Recipe, matrices: Sequence[Matrix], matrix: Matrix, gone: Gone
    ) -> Tensor:
        """Of weights that are judged together, [out, in / group, group, group]."""
        if recipe.group == 1:
            return self.inverse_diagonal(recipe, matrices, matrix, gone)[..., None, None]
        groups = matrix.shape[0], -1, recipe.group
        if (found := self.curvature(recipe, matrix, gone(matrix))) is None:
            infinite = torch.full(matrix.shape, torch.inf, dtype=torch.float64)
            blocks = infinite.reshape(groups).diag_embed()
        else:
            blocks = found[0].inverse_blocks(recipe.group).reshape(*groups, recipe.group)
            self._count(found[0])
        return blocks * self._scale(matrices)

    def _gradients(self, matrices: Sequence[Matrix]) -> Gradients:
        names = dict.fromkeys(one.name for one in matrices)
        stored = StoredGradients(self._tensors, list(names))
        parts = {one.key: (one.name, one.first, one.elements) for one in matrices}
        return PartialGradients(stored, parts)

    def _scale(self, matrices: Sequence[Matrix]) -> float:
        if self._all is not matrices:  # every one of them asks for it
            self._all, self._mean_of_all = matrices, self.mean(matrices)
        if not self._mean_of_all:
            raise InputError(
                "every gradient of what is pruned is zero; estimate the Fisher on other data"
            )
        return self._mean_of_all

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

    def _count(self, fisher: RankOneFisher) -> None:
        self.fallbacks += len(fisher.fallbacks)
        self.clamped += fisher.clamped
