"""The Fisher of a mask on the inputs of a layer: of heads before the layer that joins them, of the
neurons between the two matrices of a feed-forward layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fishertool.fisher.diagonal import wide
from fishertool.fisher.gradients import Gradient, OuterProducts, Whole
from fishertool.fisher.kronecker import add_gram
from fishertool.fisher.sums import Groups, Sums


@dataclass(frozen=True)
class Masked:
    """A layer y = W (m * x), m one number a unit, which is a run of `features` inputs."""

    weight: Tensor
    """[out, in], or [in, out] if it is turned."""
    features: int
    turned: bool = False

    @property
    def units(self) -> int:
        return self.weight.shape[0 if self.turned else 1] // self.features


class MaskMoments:
    """Sums over examples of u u^T for u = d log p / d m at m = 1, one number a unit; float64.

    A mask on a layer's inputs scales columns of its weight, so its gradient follows from the
    weight's, without forming that:

        d log p / d m_i = sum over outputs o and features f of i of W_of G_of
                        = sum over time and f of x_f (W^T delta)_f

    sums  weight name -> [unit, unit] on and above the diagonal blocks (`mirrored` fills in the
          rest), or [unit], its diagonal, if not `cross`

    Source: Kwon et al. 2022, arXiv 2204.09656, whose mask is on heads and neurons.
    """

    def __init__(self, layers: Mapping[str, Masked], cross: bool = True):
        self._layers = dict(layers)
        self.sums: Sums = {
            name: torch.zeros(
                [one.units] * (2 if cross else 1), dtype=torch.float64, device=one.weight.device
            )
            for name, one in layers.items()
        }
        self.groups: Groups = {"masks": self.sums}

    def begin(self, examples: Sequence[int]) -> None:
        """Nothing is kept from batch to batch."""

    def add(self, name: str, gradients: Sequence[Gradient]) -> None:
        if (layer := self._layers.get(name)) is None:
            return
        found = torch.stack([mask_gradients(layer, part) for part in gradients]).sum(0)
        total = self.sums[name]
        if total.dim() == 2:
            add_gram(total, found)
        else:
            total += found.square().sum(0, dtype=torch.float64)


def mask_gradients(layer: Masked, part: Gradient) -> Tensor:
    """d log p / d m, [example, unit], float32 or wider, from one part of the weight's gradient."""
    weight = wide(layer.weight.detach())
    weight = weight.T if layer.turned else weight
    if isinstance(part, OuterProducts):
        x, delta = (part.left, part.right) if part.transposed else (part.right, part.left)
        by_feature = (wide(x) * (wide(delta) @ weight)).sum(1)
    elif isinstance(part, Whole):
        values = wide(part.values)
        by_feature = ((values.mT if layer.turned else values) * weight).sum(1)
    else:
        raise TypeError(f"{type(part).__name__} is no gradient of a linear layer's weight")
    return by_feature.reshape(len(by_feature), -1, layer.features).sum(2)
