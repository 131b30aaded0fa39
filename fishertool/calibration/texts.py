"""Examples of one text each: with a label, with a label a word, with words masked, with a target."""

import random
import re
from collections.abc import Iterator, Mapping
from typing import Any

from fishertool.calibration.data import UNSCORED, Example
from fishertool.calibration.reader import Reader, inputs_of
from fishertool.errors import InputError

BYTE = re.compile("<0x[0-9A-F]{2}>")
"""A token of SentencePiece; in a byte-level vocabulary each letter is a byte."""


def whole(reader: Reader) -> Iterator[Example]:
    """A text or a conversation, perhaps a second text, and a label if the reader has labels."""
    options = reader.options
    for row in reader:
        if options.chat_column is None:
            text = reader.text(row, options.text_column)
        else:
            text = reader.chat(row[options.chat_column])
        pair = reader.pair(row)
        encoded, cut = reader.encode(
            text, pair, add_special_tokens=options.chat_column is None
        )  # a chat template writes its own
        if not text.strip() or not encoded["input_ids"]:
            reader.empty += 1
            continue
        label = None
        if reader.labels is not None:
            label = reader.label(row[options.label_column], reader.labels)
        reader.truncated += cut
        text_bytes = len(text.encode()) + len((pair or "").encode())
        text_bytes -= _bytes_of_first(reader, encoded, text)
        yield Example(inputs_of(encoded), label, text_bytes)


def _bytes_of_first(reader: Reader, encoded: Any, text: str) -> int:
    """How many a text's first token spells, which no other token predicts."""
    if not reader.tokenizer.is_fast:
        return 0
    (_, stop), *others = encoded["offset_mapping"]
    if any(one < stop <= other for one, other in others[:1]):  # it ends within a character
        token = reader.tokenizer.convert_ids_to_tokens(encoded["input_ids"][0])
        return 1 if BYTE.fullmatch(token) else len(token)
    return len(text[:stop].encode())


def words(reader: Reader) -> Iterator[Example]:
    """Words with a class each; the first token of a word is scored, the rest are not.

    The words are a list, or a text cut at white space; the tokenizer gets them with a space
    between. Without labels every class is 0.
    """
    reader.fast("token-classification")
    for row in reader:
        listed = _words(reader, row)
        if not any(word.strip() for word in listed):
            reader.empty += 1
            continue
        classes = [0] * len(listed)
        if reader.labels is not None:
            classes = _classes(reader, row, listed, reader.labels)
        encoded, cut = reader.encode(" ".join(listed))
        owner = [n for n, word in enumerate(listed) for _ in range(len(word) + 1)]
        word_of = [
            owner[stop - 1] if stop > start else None for start, stop in encoded["offset_mapping"]
        ]
        targets = [
            UNSCORED if word is None or word == before else classes[word]
            for before, word in zip([None, *word_of], word_of, strict=False)
        ]
        if targets.count(UNSCORED) == len(targets):
            reader.unscored += 1
            continue
        reader.truncated += cut
        yield Example(inputs_of(encoded), None, 0, targets)


def masked(reader: Reader) -> Iterator[Example]:
    """A text with a fraction of its tokens, at least one, replaced by the mask token and scored.

    Always the mask token: the random and unchanged tokens of BERT's training (one in five) are
    left out. Special tokens stay. Which tokens are masked depends on the seed and the row's
    number alone.
    """
    options, tokenizer = reader.options, reader.tokenizer
    if tokenizer.mask_token_id is None:
        raise InputError("the tokenizer has no mask token, so masked-lm cannot be scored")
    fraction, special = options.mask_fraction or 0.0, set(tokenizer.all_special_ids)
    for row in reader:
        text = reader.text(row, options.text_column)
        pair = reader.pair(row)
        if not text.strip():
            reader.empty += 1
            continue
        encoded, cut = reader.encode(text, pair)
        inputs = inputs_of(encoded)
        ids = inputs["input_ids"]
        places = [place for place, token in enumerate(ids) if token not in special]
        if not places:
            reader.unscored += 1
            continue
        count = max(1, round(fraction * len(places)))
        targets = [UNSCORED] * len(ids)
        for place in random.Random(f"{options.seed} {reader.row}").sample(places, count):
            targets[place], ids[place] = ids[place], tokenizer.mask_token_id
        reader.truncated += cut
        yield Example(inputs, None, 0, targets)


def scored_pairs(reader: Reader) -> Iterator[Example]:
    """Two sentences and a number that says how much alike they are."""
    options = reader.options
    for row in reader:
        pair = [reader.text(row, options.text_column), reader.pair(row) or ""]
        encoded, cuts = zip(*map(reader.encode, pair), strict=True)
        if not all(
            text.strip() and one["input_ids"] for text, one in zip(pair, encoded, strict=True)
        ):
            reader.empty += 1
            continue
        score = reader.number(row, str(options.score_column))
        reader.truncated += any(cuts)
        first, second = map(inputs_of, encoded)
        yield Example(first, None, 0, candidates=[second], score=score)


def targeted(reader: Reader) -> Iterator[Example]:
    """A text and the text that a sequence-to-sequence model is to make of it."""
    options = reader.options
    for row in reader:
        text = reader.text(row, options.text_column)
        target = reader.text(row, str(options.target_column))
        source, source_cut = reader.encode(text)
        wanted, target_cut = reader.encode(None, text_target=target)
        inputs = inputs_of(source) | {"labels": list(wanted["input_ids"])}
        if not text.strip() or not target.strip() or not all(inputs.values()):
            reader.empty += 1
            continue
        reader.truncated += source_cut or target_cut
        yield Example(inputs, None, 0)


def _words(reader: Reader, row: Mapping[str, Any]) -> list[str]:
    column = reader.options.text_column
    value = row[column]
    if isinstance(value, list):
        for number, word in enumerate(value):
            if not isinstance(word, str):
                kind = type(word).__name__
                raise reader.refusal(f"word {number} of its {column} is {kind}, not a string")
        return value
    return reader.text(row, column).split()


def _classes(
    reader: Reader, row: Mapping[str, Any], words: list[str], labels: Mapping[str, int]
) -> list[int]:
    column = reader.options.label_column
    values = row[column]
    if not isinstance(values, list):
        kind = type(values).__name__
        raise reader.refusal(f"its {column} is {kind}, not a list of one class a word")
    if len(values) != len(words):
        raise reader.refusal(f"{len(words)} words, but {len(values)} classes in its {column}")
    return [reader.label(value, labels, f"word {n}: ") for n, value in enumerate(values)]
