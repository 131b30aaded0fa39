"""Which examples are run together: micro-batches that waste no padding."""

from collections.abc import Iterable, Sequence

TOKENS = 1024
"""Fewer, and what is done once a batch weighs (adding up in float64); more, and activations leave
the caches of a CPU."""


def micro_batches(
    lengths: Sequence[int],
    examples: Iterable[int] | None = None,
    *,
    rows_each: Sequence[int] | None = None,
    size: int | None = None,
    tokens: int = TOKENS,
) -> list[list[int]]:
    """Indices of examples, the longest first, in batches of `size`, or of at most `tokens` tokens
    with padding (one example at least); only examples with as many rows each go together.

    >>> micro_batches([3, 9, 5, 4], tokens=10)
    [[1], [2, 3], [0]]
    """
    if examples is None:
        examples = range(len(lengths))
    rows = rows_each or [1] * len(lengths)
    order = sorted(examples, key=lambda index: (-rows[index], -lengths[index]))
    batches: list[list[int]] = []
    for index in order:
        if batches:
            last = batches[-1]
            limit = size if size is not None else max(1, tokens // max(lengths[last[0]], 1))
            if len(last) < limit and rows[last[0]] == rows[index]:
                last.append(index)
                continue
        batches.append([index])
    return batches
