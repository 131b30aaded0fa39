"""Sums over examples, kept in float64 by name: those of several workers add up to the whole."""

from collections.abc import Mapping

from torch import Tensor

Sums = dict[str, Tensor]
Groups = Mapping[str, Sums]
"""What a statistic consists of, under names of its own; the tensors are live."""

SEPARATOR = ":"


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
