from torch import Tensor

from fishertool.factorization.method import Decomposition
from fishertool.factorization.parts.gram import decompose


def svd(weight: Tensor) -> Decomposition:
    """Truncated singular value decomposition: the nearest matrix of lower rank, data unseen.

        min norm(W - left @ right)

    Shapes: weight [out, in]. Source: Eckart and Young 1936.
    """
    return decompose(weight)
