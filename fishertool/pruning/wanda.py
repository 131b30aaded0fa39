from torch import Tensor


def wanda(weight: Tensor, activations: Tensor) -> Tensor:
    """abs(w_ij) times the root mean square of input feature j; compared within output rows.

        abs(w_ij) sqrt(A_jj)        A = E[x x^T]

    The norm over all tokens, as the paper has it, is a factor sqrt(tokens) larger throughout.

    Shapes: weight [out, in], activations A [in, in]. Source: Sun et al. 2023, arXiv 2306.11695.
    """
    return weight.abs() * activations.diagonal().clamp(min=0).sqrt().to(weight)
