"""Classes are paired by their names: those of data with a model's, and one model's with another's."""

from collections.abc import Mapping, Sequence
from typing import Any


def have_names(labels: Mapping[str, int]) -> bool:
    """Whether the classes of a head have names of their own, not transformers' LABEL_0, LABEL_1."""
    return any(name != f"LABEL_{number}" for name, number in labels.items())


def ids_by_name(names: Sequence[str], labels: Mapping[str, int]) -> list[int] | None:
    """The id that each name has in `labels`, whatever its case; None unless all have one each.

    >>> ids_by_name(["entailment", "contradiction"], {"CONTRADICTION": 0, "ENTAILMENT": 2})
    [2, 0]
    """
    for spelt in (str, str.casefold):
        known = {spelt(name): number for name, number in labels.items()}
        found = [known.get(spelt(name)) for name in names]
        ids = [number for number in found if number is not None]
        if len(known) == len(labels) and len(set(ids)) == len(names):
            return ids
    return None


def names_in(rows: Any, column: str) -> list[str] | None:
    """The classes that a column's numbers, or lists of them, stand for, where the data say so."""
    feature = rows.features[column]
    names = getattr(getattr(feature, "feature", feature), "names", None)
    return None if names is None else list(map(str, names))
