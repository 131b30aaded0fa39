"""The mean gradient: where the weights would move, which squares do not tell."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fishertool.fisher.diagonal import wide
from fishertool.fisher.gradients import Gradient, OuterProducts, Placed, ScatteredRows, rows_of
from fishertool.fisher.sums import Computed, Groups, Sums


class MeanGradient:
    """Sums over examples of the gradients of log p, by parameter name, in float64.

    One label an example, the data's: with labels drawn from the model, the mean tends to zero.
    The sums lie where their parameter does, or on `device`.
    """

    def __init__(self, parameters: Mapping[str, Tensor], device: str | None = None):
        self.sums: Sums = {
            name: torch.zeros(rows_of(value), dtype=torch.float64, device=device or value.device)
            for name, value in parameters.items()
        }
        self.groups: Groups = {"gradients": self.sums}
        self._shapes = {name: parameter.shape for name, parameter in parameters.items()}

    def begin(self, examples: Sequence[int]) -> None:
        """Nothing is kept from batch to batch."""

    def add(self, name: str, gradients: Sequence[Gradient]) -> None:
        for part in gradients:
            add_sum(self.sums[name], part)

    def mean(self, examples: int) -> Mapping[str, Tensor]:
        """float32, shaped as the parameters; each is computed when it is asked for."""

        def of(name: str) -> Tensor:
            return (self.sums[name] / examples).float().reshape(self._shapes[name])

        return Computed(self.sums, of)


def add_sum(total: Tensor, part: Gradient) -> None:
    """total += sum over examples of G_n; [row, width], float64. Products are formed in float32, or
    the part's own wider dtype."""
    if isinstance(part, Placed):
        add_sum(total[part.first : part.first + part.rows], part.part)
    elif isinstance(part, OuterProducts):
        left, right = wide(part.left).flatten(0, 1), wide(part.right).flatten(0, 1)
        total += (left.T @ right).to(total.device)
    elif isinstance(part, ScatteredRows):
        total.index_add_(
            0, part.ids.flatten().to(total.device), part.values.flatten(0, 1).to(total)
        )
    else:
        total += part.values.sum(0, dtype=torch.float64).to(total.device)
