"""One row's cells -> texts, labels and token ids, and a count of what was cut or left out."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fishertool.calibration.data import TOKEN_TYPES, DataOptions
from fishertool.errors import InputError

DEFAULT_MAX_LENGTH = 512
UNLIMITED = 1 << 20
"""Tokenizers without a limit of their own state an absurdly large one."""


class Reader:
    """Iterates over rows, and reads the cells of the row it is at.

    labels     class names -> ids of the model's head; None where there are none to read
    classes    of each class id of the data the model's id, where these may differ
    cut        False leaves texts longer than `limit` whole, for who splits them
    row        number of the row it is at
    truncated  examples with a text cut at `limit` tokens
    empty      rows without text
    unscored   rows of which nothing would be scored

    Raises InputError naming the file, the row and what is wrong there.
    """

    def __init__(
        self,
        rows: Any,
        options: DataOptions,
        tokenizer: Any,
        limit: int,
        labels: Mapping[str, int] | None,
        cut: bool,
        classes: Sequence[int] | None,
    ):
        self.options, self.tokenizer, self.limit, self.labels = options, tokenizer, limit, labels
        self.columns: list[str] = rows.column_names
        self.row, self.truncated, self.empty, self.unscored = 0, 0, 0, 0
        self._rows, self._cut, self._classes = rows, cut, classes

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        try:
            for number, row in enumerate(self._rows):
                self.row = number
                yield row
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self.options.data}: has text that is not UTF-8; save it as UTF-8"
            ) from error

    def text(self, row: Mapping[str, Any], column: str) -> str:
        """A cell's text; a missing one is empty."""
        value = row[column]
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self.refusal(f"its {column} is {type(value).__name__}, not a string")
        return value

    def number(self, row: Mapping[str, Any], column: str) -> float:
        try:
            value = float(row[column])
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise self.refusal(f"its {column} is {row[column]!r}, not a number")
        return value

    def pair(self, row: Mapping[str, Any]) -> str | None:
        """The second text of a row, if there is one."""
        column = self.options.text_pair_column
        return None if column is None or row[column] is None else self.text(row, column)

    def chat(self, messages: Any, prompt: bool = False) -> str:
        """A conversation as the tokenizer's chat template writes it; of a prompt, up to where the
        assistant answers."""
        if messages is None:
            return ""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt
                )
            )
        except Exception as error:  # a template may raise anything
            if getattr(self.tokenizer, "chat_template", None) is None:
                raise InputError(
                    f"--chat-column {self.options.chat_column}: the model's tokenizer has no chat "
                    "template; copy one from the original model, or give --text-column"
                ) from error
            raise self.refusal(f"the chat template does not take it: {error}") from error

    def label(self, value: Any, labels: Mapping[str, int], where: str = "") -> int:
        """The head's id of a class: by its name there, or by its id in the data."""
        if value is None:
            raise self.refusal(f"{where}has no label")
        if isinstance(value, str) and value in labels:
            return labels[value]
        if isinstance(value, str):
            whole = value.isdecimal()
        else:  # a column of numbers with a gap holds fractions
            whole = isinstance(value, float) and value.is_integer()
        number = int(value) if whole else value
        if type(number) is int:
            if self._classes is not None and number in range(len(self._classes)):
                number = self._classes[number]
            elif labels.get(str(number), number) != number:
                raise self.refusal(
                    f"{where}label {number} may be the class named {str(number)!r}, whose id is "
                    f"{labels[str(number)]}, or the one whose id it is; write names as strings, in "
                    "a json or parquet file"
                )
            if number in labels.values():
                return number
        raise self.refusal(
            f"{where}label {value!r} is none of the model's: "
            f"{', '.join(f'{name} ({number})' for name, number in labels.items())}"
        )

    def encode(self, text: str | None, pair: str | None = None, **more: Any) -> tuple[Any, bool]:
        """What the tokenizer makes of a text, and whether it was cut."""
        settings: dict[str, Any] = {
            "return_offsets_mapping": self.tokenizer.is_fast,
            "return_attention_mask": False,
            "padding": False,  # a stored tokenizer may carry both from its training
            "truncation": False,
            "verbose": False,
            **more,
        }
        encoded = self.tokenizer(text, pair, **settings)
        too_long = self._cut and len(encoded["input_ids"]) > self.limit
        if too_long:
            settings |= {"truncation": True, "max_length": self.limit}
            encoded = self.tokenizer(text, pair, **settings)
        return encoded, too_long

    def fast(self, purpose: str) -> None:
        """Refuse a tokenizer that cannot tell which characters a token stands for."""
        if not self.tokenizer.is_fast:
            raise InputError(
                f"{type(self.tokenizer).__name__} does not tell which characters a token stands "
                f"for, as {purpose} needs; convert it to a tokenizer.json"
            )

    def refusal(self, what: str) -> InputError:
        return InputError(f"{self.options.data}: row {self.row}: {what}")


def inputs_of(encoded: Any) -> dict[str, list[int]]:
    """The model's inputs among what a tokenizer gives."""
    return {name: list(encoded[name]) for name in ("input_ids", TOKEN_TYPES) if name in encoded}


def length_limit(options: DataOptions, tokenizer: Any, model_limit: int | None) -> int:
    """Tokens a text may have."""
    limits = [limit for limit in (tokenizer.model_max_length, model_limit) if limit]
    limits = [limit for limit in limits if limit < UNLIMITED]
    if options.max_length is None:
        return min([DEFAULT_MAX_LENGTH, *limits])
    return min([options.max_length, *limits])
