"""The leading eigenvectors of a symmetric matrix, at the cost of so many only."""

import torch
from torch import Tensor

from fishertool.factorization.parts.blas import UPPER, Argument, call

FEW = 1 / 4
"""Up to this share of all eigenvectors, they take less time one by one than all together."""
MAX_SIDE = 32_766
"""Of a wider one LAPACK cannot say how large a workspace it wants."""


class Leading:
    """Eigenvalues, largest first, and vectors of a positive semidefinite matrix, of which only the
    upper half is read. The most that were asked for so far are kept."""

    def __init__(self, upper: Tensor):
        self.side = len(upper)
        self.trace = float(upper.trace())
        self._upper = upper
        self._values, self._vectors = upper.new_zeros(0), upper.new_zeros(self.side, 0)

    def values(self, count: int) -> Tensor:
        """[count]. Raises LinAlgError where they do not converge."""
        return self._first(count)[0]

    def vectors(self, count: int) -> Tensor:
        """[side, count]. Raises LinAlgError where the values do not converge."""
        return self._first(count)[1]

    def _first(self, count: int) -> tuple[Tensor, Tensor]:
        if count > len(self._values):
            values, vectors = _ascending(self._upper, count)
            self._values, self._vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        return self._values[:count], self._vectors[:, :count]


def _ascending(upper: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """At least the last `count`. The LAPACK that torch was built with can compute all of them only,
    and on some processors takes half as long again; it stays for what the other gives up."""
    served = upper.device.type == "cpu" and upper.dtype == torch.float64
    if served and len(upper) <= MAX_SIDE and bool(upper.triu().isfinite().all()):
        compute = _some if count <= FEW * len(upper) else _all
        if (found := compute(upper, count)) is not None:
            return found
    values, vectors = torch.linalg.eigh(upper, UPLO="U")
    return values, vectors


def _some(upper: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """One by one, from the tridiagonal form."""
    side, values = len(upper), upper.new_empty(len(upper))
    vectors = upper.new_empty(count, side)
    support = torch.empty(2 * count, dtype=torch.int32)
    failed = _call(
        "dsyevr", b"V", b"I", UPPER, side, upper.contiguous().clone(), side, 0.0, 0.0,
        side - count + 1, side, 0.0, 0, values, vectors, side, support,
    )  # fmt: skip
    return None if failed else (values[:count], vectors.T)


def _all(upper: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """By divide and conquer."""
    side, values = len(upper), upper.new_empty(len(upper))
    vectors = upper.contiguous().clone()
    failed = _call("dsyevd", b"V", UPPER, side, vectors, side, values)
    return None if failed else (values, vectors.T)


def _call(name: str, *arguments: Argument) -> int:
    """A routine of LAPACK with its two workspaces, asked for their sizes first; its `info`."""
    info = torch.zeros(1, dtype=torch.int32)

    def run(floats: Tensor, integers: Tensor, asked: int | None = None) -> None:
        work = floats, asked or len(floats), integers, asked or len(integers)
        call("lapack", name, *arguments, *work, info)

    floats, integers = torch.empty(1, dtype=torch.float64), torch.empty(1, dtype=torch.int32)
    run(floats, integers, asked=-1)
    run(floats.new_empty(int(floats)), integers.new_empty(int(integers)))
    return int(info)
