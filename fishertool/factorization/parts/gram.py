"""The best low-rank approximation in a weighted norm, by the Gram matrix of the smaller side."""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from fishertool.factorization.method import Decomposition, Factors
from fishertool.factorization.parts.blas import triangular_product
from fishertool.factorization.parts.eigen import Leading

FLOOR = 1e-9
"""Of the mean eigenvalue of a weighting, for what is singular: far below anything measured, and
float64 has room for its inverse root."""
BLOCKS = 8
"""A symmetric product by blocks of rows costs (1 + 1 / BLOCKS) / 2 of the whole."""


class Weighting:
    """A symmetric positive weighting of one side of a matrix: none, a number an index, or a matrix.

    `square` is None, [side] or [side, side]; a root of it is any R with R^T R = square. `floor` is
    that of its entries or eigenvalues relative to their mean, where a root is taken. With a floor
    of 0 inverses are pseudo-inverses. Raises ValueError for one that is zero everywhere, negative
    or not finite.
    """

    def __init__(self, square: Tensor | None, floor: float = FLOOR):
        self.square: Tensor | None = None
        if square is None:
            return
        wide = square.double()
        diagonal = wide if wide.dim() == 1 else wide.diagonal()
        mean = float(diagonal.mean())
        if not 0 < mean < float("inf") or not bool(wide.isfinite().all()):
            raise ValueError("the statistic is zero everywhere, or not finite")
        if bool((diagonal < 0).any()):
            raise ValueError("the statistic is negative somewhere")
        self._least = floor * mean
        self.square = wide.clamp(min=self._least) if wide.dim() == 1 else wide

    def times(self, matrix: Tensor) -> Tensor:
        """square @ matrix, [side, column]."""
        if self.square is None:
            return matrix
        return self.square @ matrix if self.square.dim() > 1 else self.square[:, None] * matrix

    def root_times(self, matrix: Tensor) -> Tensor:
        """R @ matrix in float64, whatever it is in."""
        if self.square is not None and self.square.dim() == 1:
            return self._power(0.5, matrix)  # converts as it multiplies
        if self._cholesky is not None:
            return triangular_product(self._cholesky, matrix.double())
        return self._power(0.5, matrix.double())

    def inverse_root_times(self, matrix: Tensor) -> Tensor:
        if self._cholesky is not None:
            solved: Tensor = torch.linalg.solve_triangular(self._cholesky.T, matrix, upper=True)
            return solved
        return self._power(-0.5, matrix)

    def _power(self, power: float, matrix: Tensor) -> Tensor:
        if self.square is None:
            return matrix
        if self.square.dim() == 1:
            return _pseudo_power(self.square, power)[:, None] * matrix
        values, vectors = self._eigen
        return vectors @ (_pseudo_power(values, power)[:, None] * (vectors.T @ matrix))

    @cached_property
    def _cholesky(self) -> Tensor | None:
        """The root that costs least, where all its pivots are above the floor."""
        if self.square is None or self.square.dim() == 1 or not self._least:
            return None
        factor, failed = torch.linalg.cholesky_ex(self.square)
        sound = not int(failed) and float(factor.diagonal().min()) ** 2 > self._least
        return factor if sound else None

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        assert self.square is not None
        found = Leading(self.square)
        values, vectors = found.values(found.side), found.vectors(found.side)
        if self._least:
            return values.clamp(min=self._least), vectors
        noise = len(values) * torch.finfo(values.dtype).eps * values[0]
        return values.where(values > noise, 0.0), vectors


def decompose(
    weight: Tensor, rows: Weighting | None = None, columns: Weighting | None = None
) -> Decomposition:
    """Minimize norm(R (W - W_r) C) over W_r of every rank, R^2 and C^2 being the two weightings.

    With out <= in, U the eigenvectors of R W C^2 W^T R,

        left = R^-1 U        right = U^T R W

    so C is neither rooted nor inverted: where R is the identity this is W projected, whatever C.
    The other way round with out > in. The error of rank r is the sum of the eigenvalues after the
    r-th (Eckart and Young 1936, of R W C).

    Shapes: weight [out, in]; R^2 [out] or [out, out]; C^2 [in] or [in, in]. In float64.
    """
    rows, columns = rows or Weighting(None), columns or Weighting(None)

    def square_norm(error: Tensor) -> Tensor:
        return (rows.times(error) * columns.times(error.T).T).sum()

    if weight.shape[0] <= weight.shape[1]:
        gram, left_and_right = _sides(weight, rows, columns)
    else:
        gram, right_and_left = _sides(weight.T, columns, rows)

        def left_and_right(rank: int) -> tuple[Tensor, Tensor]:
            right, left = right_and_left(rank)
            return left.T, right.T

    def terms(rank: int) -> Factors:
        # Each term in two equal halves, so that neither factor overflows a narrow dtype.
        left, right = left_and_right(rank)
        ratio = (right.norm(dim=1) / left.norm(dim=0)).sqrt()
        ratio[(ratio == 0) | ~ratio.isfinite()] = 1.0
        return Factors(left * ratio, right / ratio[:, None])

    def singular_values(count: int) -> Tensor:
        return gram.values(count).sqrt()

    return Decomposition(gram.side, gram.trace, singular_values, terms, square_norm)


def _sides(
    weight: Tensor, near: Weighting, far: Weighting
) -> tuple[Leading, Callable[[int], tuple[Tensor, Tensor]]]:
    """The Gram matrix of a matrix [near, far] with near <= far; by rank [near, rank] and
    [rank, far]."""
    rooted = near.root_times(weight)
    gram = Leading(_upper_half(rooted, far.times(rooted.T)))

    def sides(rank: int) -> tuple[Tensor, Tensor]:
        first = gram.vectors(rank)
        return near.inverse_root_times(first), first.T @ rooted

    return gram, sides


def _pseudo_power(values: Tensor, power: float) -> Tensor:
    return values.pow(power).where(values > 0, 0.0)


def _upper_half(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, which is symmetric, on and above the diagonal."""
    side = len(left)
    product = left.new_zeros(side, side)
    step = -(-side // BLOCKS)
    for start in range(0, side, step):
        torch.mm(
            left[start : start + step], right[:, start:], out=product[start : start + step, start:]
        )
    return product
