import torch
from torch import Tensor


def obs(weight: Tensor, inverse_diagonal: Tensor) -> Tensor:
    """The rise of the loss if a weight is zero and the others move to make up for it: OBS.

        w_i^2 / (2 [F^-1]_ii)

    F is block-diagonal, in runs of consecutive inputs of one output.

    Shapes: weight, inverse_diagonal [out, in]. Sources: Hassibi and Stork 1993 (NIPS 5);
    WoodFisher, Singh and Alistarh 2020, arXiv 2004.14340; oBERT, Kurtic et al. 2022,
    arXiv 2203.07259.
    """
    return (weight.double().square() / (2 * inverse_diagonal)).to(torch.float32)
