"""How well an estimate is known: the spread of each tensor's squared gradient norm over examples."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fishertool.fisher.header import TensorStatistics, relative_errors
from fishertool.fisher.sums import Groups, absorb, flattened


class TraceMoments:
    """First and second moments of t_n = |G_n|^2, whose mean over examples is a tensor's Fisher trace.

    n runs over units: examples, or what else has one gradient (a batch, for a signed sum). A
    unit's t_n may come in several parts (one a label); `begin` closes the batch before it.

    add_shards   where weights are sharded, each process has the part of t_n that its shard gives:
                 adds up, in place, those of all processes, [tensor, unit]; all then have the same
    """

    add_shards: Callable[[Tensor], None] | None = None

    def __init__(self, parameters: Mapping[str, Tensor]):
        self._sums = {
            name: torch.zeros(2, dtype=torch.float64, device=parameter.device)
            for name, parameter in parameters.items()
        }
        """name -> sum of t_n, sum of t_n ** 2"""
        self._units = {"all": torch.zeros((), dtype=torch.float64)}
        self.groups: Groups = {"traces": self._sums, "units": self._units}
        self._batch: dict[str, Tensor] = {}
        self._in_batch = 0

    def copy(self) -> "TraceMoments":
        found = TraceMoments(self._sums)
        absorb(found.groups, flattened(self.groups))
        return found

    def begin(self, units: int) -> None:
        """Before each batch, and after the last."""
        if self._batch and self.add_shards is not None:
            parts = torch.stack([self.of_batch(name) for name in self._sums])
            self.add_shards(parts)
            self._batch = dict(zip(self._sums, parts, strict=True))
        for name, traces in self._batch.items():
            self._sums[name] += torch.stack([traces.sum(), traces.square().sum()])
        self._batch.clear()
        self._in_batch = units
        self._units["all"] += units

    def of_batch(self, name: str) -> Tensor:
        """The current batch's t_n of a tensor, [unit], float64, to be added to."""
        if name not in self._batch:
            self._batch[name] = self._sums[name].new_zeros(self._in_batch)
        return self._batch[name]

    def standard_errors(self, examples: int) -> dict[str, float | None]:
        """Of each tensor's trace, by the sample variance; None for fewer than two units.

        Rounded to float32: the last bits depend on how the work was divided.
        """
        units = float(self._units["all"])
        errors: dict[str, float | None] = {}
        for name, sums in self._sums.items():
            total, squares = sums.tolist()
            if units < 2:
                errors[name] = None
                continue
            spread = max(squares - total**2 / units, 0.0) * units / (units - 1)
            errors[name] = torch.tensor(spread**0.5 / examples).item()
        return errors

    def relative_error(self, examples: int) -> float:
        """The largest of `relative_errors`; infinite for fewer than two units."""
        if float(self._units["all"]) < 2:
            return float("inf")
        statistics = {
            name: TensorStatistics(0, float(self._sums[name][0]) / examples, standard_error=error)
            for name, error in self.standard_errors(examples).items()
        }
        return max(relative_errors(statistics).values(), default=0.0)
