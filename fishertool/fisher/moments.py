"""How well an estimate is known: the spread of each tensor's squared gradient norm over examples."""

from collections.abc import Mapping

import torch
from torch import Tensor


class TraceMoments:
    """First and second moments over examples of t_n = |G_n|^2, whose mean is a tensor's Fisher trace.

    An example's t_n may come in several parts (one a label); `begin` closes the batch before it.
    """

    def __init__(self, parameters: Mapping[str, Tensor]):
        self.sums = {
            name: torch.zeros(2, dtype=torch.float64, device=parameter.device)
            for name, parameter in parameters.items()
        }
        """name -> sum of t_n, sum of t_n ** 2"""
        self._batch: dict[str, Tensor] = {}
        self._examples = 0

    def begin(self, examples: int) -> None:
        """Before each batch, and after the last."""
        for name, traces in self._batch.items():
            self.sums[name] += torch.stack([traces.sum(), traces.square().sum()])
        self._batch.clear()
        self._examples = examples

    def of_batch(self, name: str) -> Tensor:
        """The current batch's t_n of a tensor, [example], float64, to be added to."""
        if name not in self._batch:
            self._batch[name] = self.sums[name].new_zeros(self._examples)
        return self._batch[name]

    def standard_error(self, name: str, examples: int) -> float:
        """Of the mean of t_n, by the sample variance; infinite for fewer than two examples."""
        if examples < 2:
            return float("inf")
        total, squares = self.sums[name].tolist()
        variance = max(squares / examples - (total / examples) ** 2, 0.0) * examples
        return float((variance / (examples - 1) / examples) ** 0.5)

    def relative_error(self, examples: int) -> float:
        """The largest standard error of a tensor's trace, relative to the trace; of those not zero."""
        return max(
            (
                self.standard_error(name, examples) * examples / float(sums[0])
                for name, sums in self.sums.items()
                if float(sums[0]) > 0
            ),
            default=0.0,
        )
