"""What a factorization method is.

A pure function in a file of its own name, called once for every matrix:

    def name(weight, [fisher], [rows], [columns], [inputs], [gradients], [start],
             *, setting=default) -> Decomposition

weight     W of a linear layer, [out, in]
fisher     its diagonal Fisher, [out, in]
rows       the Fisher summed over inputs, [out]
columns    the Fisher summed over outputs, [in]
inputs     A = E[x x^T] of the layer's input, [in, in]
gradients  B = E[d d^T] times the tokens of an example, d the gradient at the output, [out, out]
start      another method's decomposition, to be refined; a method that names it refines

The result is in float64 and good for every rank: `truncate` cuts it, and only then are the terms
computed. Nothing is written into the arguments. Raises ValueError for a statistic that is zero
everywhere, negative or not finite.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Factors(NamedTuple):
    """W ~ left @ right, a column of `left` as long as the row of `right` that it goes with."""

    left: Tensor
    """[out, rank]"""
    right: Tensor
    """[rank, in]"""


@dataclass(frozen=True)
class Decomposition:
    """A matrix as a sum of outer products, those first that the method's norm finds largest."""

    length: int
    """How many there are: min(out, in)."""
    whole: float
    """The squared norm of the matrix: the sum of all squared singular values."""
    singular_values: Callable[[int], Tensor]
    """So many of the first, descending, in the method's norm: the squares of those cut off are the
    error."""
    terms: Callable[[int], Factors]
    """The sum of so many of the first."""
    square_norm: Callable[[Tensor], Tensor]
    """What the method minimizes, of an error [out, in]; up to a factor that is the same for all."""
    refine: Callable[[Factors], Factors] | None = None
    """Where the truncated sum is not yet the answer: what leads from it to the answer."""

    def truncate(self, rank: int) -> Factors:
        """The factors of that rank. Raises ValueError for one that the terms do not reach."""
        if not 1 <= rank <= self.length:
            raise ValueError(f"rank {rank} of {self.length} terms")
        factors = self.terms(rank)
        return factors if self.refine is None else self.refine(factors)
