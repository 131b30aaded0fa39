from torch import Tensor

from fishertool.factorization.method import Decomposition
from fishertool.factorization.parts.gram import Weighting, decompose


def whitened(weight: Tensor, inputs: Tensor) -> Decomposition:
    """The least change of the layer's outputs on the calibration data.

        min E norm((W - left @ right) x)^2 = norm((W - left @ right) A^(1/2))^2

    With out <= in, left holds the leading eigenvectors of W A W^T and right = left^T W: A is not
    inverted, and may be singular. With out > in the smaller side is A's, whose eigenvalues are
    floored at 1e-9 of their mean.

    Shapes: weight [out, in], inputs A [in, in]. Raises ValueError for inputs that are zero
    everywhere. Source: Wang et al. 2024 (SVD-LLM), arXiv 2403.07378.
    """
    return decompose(weight, None, Weighting(inputs))
