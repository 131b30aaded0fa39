"""The rank-one Fisher: a bank of gradients as a matrix, to multiply with and to invert.

    F = damping I + 1/m sum_k g_k g_k^T = damping I + G^T G / m        G [member, weight]

Nothing of size weight x weight is formed, and a bank on disk is never in memory whole.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, reduce

import torch
from torch import Tensor

from fishertool.errors import InputError
from fishertool.fisher.columns import Gradients, Piece, Pieces

STRIP = 64
"""What has a triangle is multiplied in two strips of rows at least, each as far as the diagonal."""
EPSILON = torch.finfo(torch.float64).eps


class RankOneFisher:
    """F = damping I + G^T G / m, whole or in diagonal blocks of `block` consecutive weights.

    gradients  the m rows of G. A vector has an entry for each of their weights, in their order:
               `spans` has each tensor's slice of it
    damping    above zero; with `relative`, a fraction of the mean of diag(G^T G / m)
    block      None for F whole. A block is of one tensor, and the last of a tensor may be shorter;
               where `block` and a matrix's width divide one another it is rows or a part of one.
               Its m x block gradients are in memory together
    dtype      what gradients are multiplied in; their sums over pieces, and factors, are in
               float64. float32 takes about half the time; inverses then err by 1e-7 times the
               condition of F instead of 1e-16, and products of gradients below 1e-19 vanish

    F is inverted on the smaller side of each block, by Cholesky:

        S = damping I + G G^T / m  [member, member]     F^-1 = (I - G^T S^-1 G / m) / damping
        A = damping I + G^T G / m  [weight, weight]     F^-1 = A^-1

    Of F whole, S is formed and factored once. Blocks are factored as they pass, in every call:
    kept, their factors might take more memory than G.

    damping    as it came out
    fallbacks  first weight of a block -> the damping its inverse has instead, because with its own
               float64 does not tell it from singular
    clamped    entries of the last inverse diagonal that were out of bounds by more than half of
               the digits of `dtype`

    Raises ValueError for a damping, block or vector out of range; InputError for gradients that
    are not finite or whose squares are not, and for damping relative to gradients all zero.
    Source: Frantar et al. 2021, arXiv 2107.03356, whose recursion over members this is in matrix
    products; Singh and Alistarh 2020, arXiv 2004.14340, for blocks.
    """

    def __init__(
        self,
        gradients: Gradients,
        damping: float,
        block: int | None = None,
        *,
        relative: bool = False,
        dtype: torch.dtype = torch.float64,
    ):
        if block is not None and block < 1:
            raise ValueError(f"a block has one weight at least, not {block}")
        self.members, self.block = gradients.members, block
        self.spans: dict[str, slice] = {}
        self.size = 0
        for name, size in gradients.sizes.items():
            self.spans[name] = slice(self.size, self.size + size)
            self.size += size
        self._slack = math.sqrt(torch.finfo(dtype).eps)
        self._pieces = Pieces(gradients, block, dtype)
        if relative:
            mean = mean_fisher(gradients, dtype)
            if mean == 0:
                raise InputError("every gradient is zero; give a damping that is not relative")
            damping *= mean
        if not 0 < damping < math.inf:
            raise ValueError(f"damping must be finite and above zero, not {damping}")
        self.damping = damping
        self.fallbacks: dict[int, float] = {}
        self.clamped = 0
        self._whole = _Run(self._pieces, [0], self.members, damping, primal=False)

    def diagonal(self) -> Tensor:
        """diag(F), [weight], float64."""
        squares = torch.cat([piece.squares.flatten() for piece in self._pieces])
        return self.damping + squares / self.members

    def quadratic_form(self, x: Tensor) -> Tensor:
        """x^T F x, a sum of squares: [weight] -> [], [weight, column] -> [column], float64."""
        columns = self._columns(x)
        norms = torch.linalg.vector_norm(columns, dim=0, dtype=torch.float64)
        total = self.damping * norms.square()
        for run in self._runs():
            total += run.project(columns).square().sum((0, 1)) / self.members
        form: Tensor = total.reshape(x.shape[1:])
        return form

    def product(self, x: Tensor) -> Tensor:
        """F x, in the shape and dtype of x: [weight] or [weight, column]."""
        columns = self._columns(x)
        result = torch.empty_like(columns)
        for run in self._runs():
            coefficients = run.project(columns) / self.members
            for piece in run.pieces:
                values = self.damping * piece.of(columns) + piece.combine(coefficients)
                result[piece.where] = values.flatten(0, 1).to(x.dtype)
        return result.reshape(x.shape)

    def solve(self, x: Tensor) -> Tensor:
        """F^-1 x, in the shape and dtype of x: [weight] or [weight, column].

        Its error is of the order of 1e-16 |x| / damping, so that F times it can differ from x by
        1e-16 |x| times the condition of F.
        """
        columns = self._columns(x)
        result = torch.empty_like(columns)
        for run in self._factored():
            lower, dampings = run.factor
            if not run.primal:
                projected = run.project(columns) / self.members
                coefficients = torch.cholesky_solve(projected, lower)
            for piece in run.pieces:
                values = piece.of(columns)
                if run.primal:
                    values = torch.cholesky_solve(values, lower)
                else:
                    values = (values - piece.combine(coefficients)) / dampings.unsqueeze(1)
                result[piece.where] = values.flatten(0, 1).to(x.dtype)
        return result.reshape(x.shape)

    def inverse_diagonal(self) -> Tensor:
        """diag(F^-1), [weight], float64, between 1 / F_ii and 1 / damping.

            (1 - sums over members of (L^-1 G)^2 / m) / damping     with S = L L^T
            sums over rows of (L^-1)^2                              with A = L L^T

        What rounding puts out of these bounds is moved to them, and counted as `clamped`. Where no
        digits to speak of are cancelled, the lower one holds but for the last of them.
        """
        self.clamped = 0
        found = []
        for run in self._factored():
            inverse, dampings = run.inverse_factor
            for piece in run.pieces:
                if run.primal:
                    values = inverse.square().sum(1)
                else:
                    explained = _whitened(inverse, piece).square_().sum(1).double()
                    left = 1 - explained / self.members
                    values = left / dampings
                    if left.min() > self._slack**0.5:
                        found.append(values.flatten())
                        continue
                least = 1 / (dampings + piece.squares / self.members)
                most = (1 / dampings).expand_as(least)
                outside = values < least * (1 - self._slack)
                outside |= values > most * (1 + self._slack)
                self.clamped += int(outside.sum())
                found.append(values.clamp(least, most).flatten())
        return torch.cat(found)

    def inverse_blocks(self, size: int) -> Tensor:
        """The diagonal blocks of F^-1 of `size` consecutive weights, [weight / size, size, size],
        float64; of one weight each, the inverse diagonal.

        Raises ValueError where `size` does not divide every block of F.
        """
        if size == 1:
            return self.inverse_diagonal().reshape(-1, 1, 1)
        if self.block is None or any(piece.width % size for piece in self._pieces):
            raise ValueError(f"blocks of {size} weights do not divide those of {self.block} of F")
        found = []
        for run in self._factored():
            inverse, dampings = run.inverse_factor
            for piece in run.pieces:
                rows = (inverse if run.primal else _whitened(inverse, piece).double()).mT
                rows = rows.reshape(len(rows), -1, size, rows.shape[2])
                values = rows @ rows.mT
                if not run.primal:
                    eye = torch.eye(size, dtype=values.dtype, device=values.device)
                    values = (eye - values / self.members) / dampings[:, :, None, None]
                found.append(values.flatten(0, 1))
        return torch.cat(found)

    def _columns(self, x: Tensor) -> Tensor:
        if x.dim() not in (1, 2) or len(x) != self.size or not x.is_floating_point():
            expected = f"floating point, [{self.size}] or [{self.size}, columns]"
            raise ValueError(f"expected {expected}, not {x.dtype} {list(x.shape)}")
        return x.reshape(self.size, -1)

    def _runs(self) -> Iterator["_Run"]:
        if self.block is None:
            yield self._whole
            return
        for piece in self._pieces:
            primal = piece.width <= self.members
            yield _Run([piece], piece.starts, self.members, self.damping, primal)

    def _factored(self) -> Iterator["_Run"]:
        """Runs, with note taken of the fallbacks in their factors."""
        for run in self._runs():
            for start, damping in zip(run.starts, run.factor[1].flatten().tolist(), strict=True):
                if damping != self.damping:
                    self.fallbacks[start] = damping
            yield run


def mean_fisher(gradients: Gradients, dtype: torch.dtype = torch.float64) -> float:
    """The mean of diag(G^T G / m), to which damping is relative; a pass over G."""
    total = sum(float(piece.squares.sum()) for piece in Pieces(gradients, None, dtype))
    return total / gradients.members / sum(gradients.sizes.values())


class _Run:
    """What is factored together: the blocks of one piece, or F whole, a block of many pieces."""

    def __init__(
        self,
        pieces: Iterable[Piece],
        starts: Sequence[int],
        members: int,
        damping: float,
        primal: bool,
    ):
        self.pieces, self.starts, self.primal = pieces, starts, primal
        self._members, self._damping = members, damping

    def project(self, x: Tensor) -> Tensor:
        """G x: [weight, column] -> [block, member, column]."""
        return _total(piece.project(x) for piece in self.pieces)

    @cached_property
    def factor(self) -> tuple[Tensor, Tensor]:
        """L [block, side, side] of S or of A, and the dampings in it [block, 1]."""
        sides = (p.gradients.mT if self.primal else p.gradients for p in self.pieces)
        return cholesky(_total(map(_gram, sides)) / self._members, self._damping)

    @property
    def inverse_factor(self) -> tuple[Tensor, Tensor]:
        """L^-1 [block, side, side] and the dampings in L [block, 1]."""
        lower, dampings = self.factor
        eye = torch.eye(lower.shape[1], dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, eye, upper=False), dampings


def cholesky(matrices: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """L with L L^T = matrix + damping I for each, and the damping each has.

    Where rounding leaves that indefinite, its damping is multiplied by ten (and raised to what
    float64 tells from zero) until it is not. Shapes: [block, side, side], positive semidefinite,
    read on and below the diagonal -> the same, and [block, 1]; all float64.

    >>> cholesky(torch.ones(1, 2, 2, dtype=torch.float64), 1e-20)[1]
    tensor([[2.2204e-16]], dtype=torch.float64)
    """
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    dampings = matrices.new_full((len(matrices), 1, 1), damping)
    resolved = EPSILON * matrices.diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1)
    if not resolved.isfinite().all():
        raise InputError("the squares of the gradients overflow")
    lower, info = torch.linalg.cholesky_ex(matrices + damping * eye)
    while len(failed := info.nonzero().flatten()):
        dampings[failed] = torch.maximum(10 * dampings[failed], resolved[failed])
        lower[failed], info[failed] = torch.linalg.cholesky_ex(
            matrices[failed] + dampings[failed] * eye
        )
    return lower, dampings.squeeze(2)


def _gram(rows: Tensor) -> Tensor:
    """rows rows^T on and below the diagonal: [block, side, other] -> [block, side, side], float64."""
    blocks, side, _ = rows.shape
    gram = rows.new_zeros(blocks, side, side, dtype=torch.float64)
    for start, stop in _strips(side):
        gram[:, start:stop, :stop] = rows[:, start:stop] @ rows[:, :stop].mT
    return gram


def _whitened(inverse: Tensor, piece: Piece) -> Tensor:
    """L^-1 G, [block, member, width]; by the inverse, which BLAS takes half the time for."""
    result = torch.empty_like(piece.gradients)
    inverse = inverse.to(result.dtype)
    for start, stop in _strips(inverse.shape[1]):
        rows = result[:, start:stop]
        torch.matmul(inverse[:, start:stop, :stop], piece.gradients[:, :stop], out=rows)
    return result


def _strips(side: int) -> Iterator[tuple[int, int]]:
    height = min(STRIP, -(-side // 2))
    for start in range(0, side, height):
        yield start, start + height


def _total(parts: Iterable[Tensor]) -> Tensor:
    return reduce(Tensor.add_, parts)
