from typing import Literal

from torch import Tensor

from fishertool.factorization.method import Decomposition
from fishertool.factorization.parts.gram import Weighting, decompose


def fwsvd(
    weight: Tensor,
    rows: Tensor,
    columns: Tensor,
    *,
    sides: Literal["in", "both"] = "in",
    floor: float = 1e-6,
) -> Decomposition:
    """SVD weighted by the Fisher of every input dimension, or of inputs and outputs.

        in     min sum_ij c_j / out (W - left @ right)_ij^2
        both   min sum_ij r_i c_j / total (W - left @ right)_ij^2

    r and c are the row and column sums of the diagonal Fisher F, total their sum; so `both` is the
    optimum for the matrix of rank one that has F's sums, and `in` for F if all outputs count alike.
    Entries of r and c below `floor` times their mean are raised to it.

    Shapes: weight [out, in], rows [out], columns [in]. Raises ValueError for a Fisher that is zero
    everywhere. Source: Hsu et al. 2022, arXiv 2207.00112, which writes Z = X W: its rows are
    inputs.
    """
    if sides == "in":
        return decompose(weight, None, Weighting(columns.double() / weight.shape[0], floor))
    by_row = rows.double() / columns.double().sum()
    return decompose(weight, Weighting(by_row, floor), Weighting(columns, floor))
