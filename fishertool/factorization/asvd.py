from torch import Tensor

from fishertool.factorization.method import Decomposition
from fishertool.factorization.parts.gram import Weighting, decompose


def asvd(
    weight: Tensor, inputs: Tensor, *, exponent: float = 0.5, floor: float = 1e-6
) -> Decomposition:
    """SVD with every input dimension scaled by the typical size of its activations.

        min sum_ij s_j^2 (W - left @ right)_ij^2        s_j = sqrt(A_jj) ^ exponent

    The paper takes the mean of |x_j|; this is the root of the mean of x_j^2, which a sidecar of
    second moments holds. Entries of s^2 below `floor` times their mean are raised to it.

    Shapes: weight [out, in], inputs A [in, in]. Raises ValueError for inputs that are zero
    everywhere. Source: Yuan et al. 2023, arXiv 2312.05821.
    """
    sizes = inputs.diagonal().double().pow(exponent)
    return decompose(weight, None, Weighting(sizes, floor))
