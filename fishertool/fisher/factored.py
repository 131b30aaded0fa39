"""The factored Fisher: row and column sums of the diagonal, megabytes for billions of weights."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fishertool.fisher.diagonal import add_squares, summed_rows, tiles_of_squares, wide
from fishertool.fisher.gradients import Gradient, OuterProducts, ScatteredRows, local, rows_of
from fishertool.fisher.moments import TraceMoments
from fishertool.fisher.sums import Complete, Groups, all_here


class Factored:
    """Row and column sums of squared per-example gradients, float64; vectors are kept whole.

    For a matrix [row, width] with F its diagonal Fisher, rows_i = sum_j F_ij and
    columns_j = sum_i F_ij; `expand` is the matrix that has both. Of a sharded parameter, these are
    the rows of its shard, and what they add to the columns.
    """

    def __init__(self, parameters: Mapping[str, Tensor]):
        def zeros(size: int, like: Tensor) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=like.device)

        self._shapes = {name: parameter.shape for name, parameter in parameters.items()}
        here = {name: local(parameter) for name, parameter in parameters.items()}
        self.rows = {name: zeros(rows_of(part)[0], part) for name, part in here.items()}
        self.columns = {name: zeros(rows_of(part)[1], part) for name, part in here.items()}
        self.traces = TraceMoments(here)
        self.groups: Groups = {
            "rows": self.rows,
            "columns": self.columns,
            **self.traces.groups,
        }

    def begin(self, examples: Sequence[int]) -> None:
        self.traces.begin(len(examples))

    def add(self, name: str, gradients: Sequence[Gradient]) -> None:
        """Add every example's row and column sums of G ** 2, G the sum of its parts."""
        rows, columns, norms = self.rows[name], self.columns[name], self.traces.of_batch(name)
        if len(gradients) == 1:
            [part] = gradients
            if isinstance(part, OuterProducts) and _is_short(part):
                add_marginals(rows, columns, part, norms)
                return
            if isinstance(part, ScatteredRows):
                for n, (touched, summed) in enumerate(summed_rows(part)):
                    squares = summed.square_()
                    by_row = squares.sum(1, dtype=torch.float64)
                    norms[n] += by_row.sum()
                    rows.index_add_(0, touched, by_row)
                    columns += squares.sum(0, dtype=torch.float64)
                return
        if len(self._shapes[name]) < 2:
            add_squares(rows.unsqueeze(1), gradients, norms)
            return
        for start, squares in tiles_of_squares(gradients, (len(rows), len(columns)), norms):
            rows[start : start + len(squares)] += squares.sum(1, dtype=torch.float64)
            columns += squares.sum(0, dtype=torch.float64)

    def mean(
        self, examples: int, complete: Complete = all_here
    ) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Rows and columns of every matrix, float32; the whole Fisher of a vector, and None."""
        found: dict[str, tuple[Tensor, Tensor | None]] = {}
        for name, shape in self._shapes.items():
            rows = (complete(name, self.rows[name]) / examples).float()
            if len(shape) < 2:
                found[name] = rows.reshape(shape), None
            else:
                found[name] = rows, (self.columns[name] / examples).float()
        return found


def marginals(diagonal: Tensor) -> tuple[Tensor, Tensor | None]:
    """What `Factored.mean` gives, from a diagonal at hand."""
    if diagonal.dim() < 2:
        return diagonal, None
    matrix = diagonal.reshape(rows_of(diagonal)).double()
    return matrix.sum(1).float(), matrix.sum(0).float()


def expand(rows: Tensor, columns: Tensor) -> Tensor:
    """rows columns^T / total: the non-negative rank-one matrix with these row and column sums.

    Shapes: [row], [width] -> [row, width]. All zero where the total is. It is the minimizer of
    the generalized Kullback-Leibler divergence to the diagonal among rank-one matrices (Shazeer
    and Stern 2018, arXiv 1804.04235, section 3).
    """
    total = columns.sum()
    return rows.outer(columns / total) if bool(total > 0) else rows.outer(columns)


def add_marginals(rows: Tensor, columns: Tensor, part: OuterProducts, norms: Tensor) -> None:
    """The sums of G_n ** 2 for G_n = L^T R without forming it, L [time, row], R [time, width].

        rows = diag(L^T (R R^T) L)        columns = diag(R^T (L L^T) R)

    costs 2 time^2 (row + width) multiplications an example, where G takes time row width.
    """
    left, right = wide(part.left), wide(part.right)
    by_row = (
        (left * (right @ right.mT @ left)).sum(1).clamp_(min=0)
    )  # sums of squares but for rounding
    by_column = (right * (left @ left.mT @ right)).sum(1).clamp_(min=0)
    norms += by_row.sum(1, dtype=torch.float64)
    rows += by_row.sum(0, dtype=torch.float64)
    columns += by_column.sum(0, dtype=torch.float64)


def _is_short(part: OuterProducts) -> bool:
    time, rows, width = part.left.shape[1], part.left.shape[2], part.right.shape[2]
    return 2 * time * (rows + width) < rows * width
