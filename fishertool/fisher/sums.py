"""Sums over examples, kept in float64 by name: those of several workers add up to the whole."""

from collections.abc import Callable, Collection, Iterator, Mapping

from torch import Tensor

Sums = dict[str, Tensor]
Groups = Mapping[str, Sums]
"""What a statistic consists of, under names of its own; the tensors are live."""

SEPARATOR = ":"

Complete = Callable[[str, Tensor], Tensor]
"""A weight's name and the rows that this process has of its sums -> all rows."""


def all_here(name: str, rows: Tensor) -> Tensor:
    """Where no weight is sharded."""
    return rows


class Computed(Mapping[str, Tensor]):
    """Tensors that are computed whenever they are asked for, and not kept."""

    def __init__(self, names: Collection[str], compute: Callable[[str], Tensor]):
        self._names = names
        self._compute = compute

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def flattened(groups: Groups) -> Sums:
    """One mapping of all groups, `group:name` -> tensor."""
    return {
        f"{group}{SEPARATOR}{name}": value
        for group, sums in groups.items()
        for name, value in sums.items()
    }


def absorb(groups: Groups, flat: Mapping[str, Tensor]) -> None:
    """Add what another worker has, as `flattened` gives it, to these."""
    for key, value in flat.items():
        group, _, name = key.partition(SEPARATOR)
        sums = groups[group]
        if name in sums:
            sums[name] += value.to(sums[name].device)
        else:
            sums[name] = value.clone()
