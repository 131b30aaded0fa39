from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """abs(w): needs no data, and is what every other mask is compared with.

    Shapes: weight [out, in]. Source: Han et al. 2015, arXiv 1506.02626.
    """
    return weight.abs()
