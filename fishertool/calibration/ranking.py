"""Queries and the documents they are scored against, each query's with it."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fishertool.calibration.data import Example
from fishertool.calibration.reader import Reader, inputs_of

NEGATIVE = "negative"
BLOCK = 8


def queries(reader: Reader) -> Iterator[Example]:
    """A query, its positive, and the documents that are wrong for it.

    These are its own negatives, where there is a negative column (a text or a list of texts a
    row). Without one, or with --in-batch-negatives N, rows are cut in order into blocks of N
    (a last one of 1 joins the block before), and the positives and negatives of the other
    queries of its block are added. A text that is there already, as the positive or another
    negative, is not added again. An example thus stands alone, whatever it is batched with: it
    costs one encoding a text, so N + 1 of them with in-batch negatives, where training costs 2.
    """
    options = reader.options
    negative = options.negative_column
    if negative is None and NEGATIVE in reader.columns:
        negative = NEGATIVE
    size = options.in_batch_negatives or (BLOCK if negative is None else 1)
    encode = functools.cache(lambda text: _encoded(reader, text))
    rows = list(_rows(reader, negative, lambda text: bool(encode(text)[0])))
    for block in _blocks(rows, size):
        shared = [document for _, *documents in block for document in documents]
        for query, *documents in block:
            texts = [query, *dict.fromkeys([*documents, *shared])]
            if len(texts) < 3:
                reader.unscored += 1
                continue
            inputs, cuts = zip(*map(encode, texts), strict=True)
            reader.truncated += any(cuts)
            yield Example(inputs[0], None, 0, candidates=inputs[1:])


def _encoded(reader: Reader, text: str) -> tuple[dict[str, list[int]], bool]:
    """The inputs of a text, none if it has no tokens, and whether it was cut."""
    encoded, cut = reader.encode(text)
    return (inputs_of(encoded) if text.strip() and encoded["input_ids"] else {}), cut


def _rows(
    reader: Reader, negative: str | None, has_text: Callable[[str], bool]
) -> Iterator[list[str]]:
    """Query, positive and negatives of each row; without query or positive it is left out."""
    options = reader.options
    for row in reader:
        texts = [
            reader.text(row, str(options.query_column)),
            reader.text(row, str(options.positive_column)),
        ]
        if not all(map(has_text, texts)):
            reader.empty += 1
            continue
        negatives = [] if negative is None else _negatives(reader, row, negative)
        yield texts + list(filter(has_text, negatives))


def _negatives(reader: Reader, row: Mapping[str, Any], column: str) -> list[str]:
    value = row[column]
    if not isinstance(value, list):
        return [reader.text(row, column)]
    for number, text in enumerate(value):
        if not isinstance(text, str):
            kind = type(text).__name__
            raise reader.refusal(f"text {number} of its {column} is {kind}, not a string")
    return value


def _blocks(rows: list[list[str]], size: int) -> Iterator[list[list[str]]]:
    starts = list(range(0, len(rows), size))
    if size > 1 and len(starts) > 1 and len(rows) % size == 1:
        starts.pop()
    for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
        yield rows[start:stop]
