"""Data files and Hub datasets -> token ids, labels, and a fingerprint of them."""

import hashlib
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fishertool.errors import HubError, InputError

BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
DEFAULT_MAX_LENGTH = 512
UNLIMITED = 1 << 20
"""Tokenizers without a limit of their own state an absurdly large one."""


@dataclass(frozen=True)
class DataOptions:
    """The data flags, the same for every verb."""

    data: str
    split: str = "train"
    text_column: str = "text"
    text_pair_column: str | None = None
    chat_column: str | None = None
    label_column: str = "label"
    num_examples: int | None = None
    max_length: int | None = None
    shuffle: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Example:
    inputs: Mapping[str, list[int]]
    """What the tokenizer gives: input_ids, and token_type_ids where the model has them."""
    label: int | None
    text_bytes: int
    """UTF-8 bytes of the text that the tokens after the first stand for."""

    @property
    def length(self) -> int:
        return len(self.inputs["input_ids"])


@dataclass(frozen=True)
class CalibrationData:
    examples: list[Example]
    name: str
    truncated: int
    """Examples cut at the maximum length."""
    empty: int
    """Rows left out because they have no text."""
    max_length: int

    @property
    def tokens(self) -> int:
        return sum(example.length for example in self.examples)

    def fingerprint(self) -> str:
        """SHA-256 of token ids and labels, in order."""
        total = hashlib.sha256()
        for example in self.examples:
            ids = example.inputs["input_ids"]
            label = -1 if example.label is None else example.label
            total.update(struct.pack(f"<qq{len(ids)}i", len(ids), label, *ids))
        return total.hexdigest()

    def describe(self) -> dict[str, Any]:
        """For reports: what exactly was read."""
        return {
            "examples": len(self.examples),
            "tokens": self.tokens,
            "max_length": self.max_length,
            "truncated": self.truncated,
            "empty": self.empty,
            "token_ids_sha256": self.fingerprint(),
        }

    def warnings(self) -> list[str]:
        found = []
        if self.truncated:
            found.append(
                f"{self.truncated} of {len(self.examples)} texts were cut at {self.max_length} tokens"
            )
        if self.empty:
            found.append(f"{self.empty} rows without text were left out")
        return found


def load(
    options: DataOptions,
    tokenizer: Any,
    model_limit: int | None,
    labels: Mapping[str, int] | None,
    *,
    need_labels: bool = False,
    long_texts: Literal["cut", "keep"] = "cut",
) -> CalibrationData:
    """Read and tokenize the data.

    labels       class names -> ids of the model's head, or None if it has none
    need_labels  whether a missing label column is an error
    long_texts   `keep` leaves texts longer than the limit whole, for who splits them

    Raises InputError naming the file and row or column, HubError if a dataset cannot be had.
    """
    limit = _max_length(options, tokenizer, model_limit)
    rows = _rows(options)
    columns = rows.column_names
    text_column = options.chat_column or options.text_column
    wanted = [text_column, *([options.text_pair_column] if options.text_pair_column else [])]
    if need_labels:
        wanted.append(options.label_column)
    for column in wanted:
        if column not in columns:
            raise InputError(f"{options.data}: no column {column!r}; it has {', '.join(columns)}")
    with_labels = labels is not None and options.label_column in columns
    examples, truncated, empty = [], 0, 0
    for number, row in enumerate(rows):
        where = f"{options.data}: row {number}"
        text = _text(row[text_column], where, tokenizer, options.chat_column is not None)
        if not text.strip():
            empty += 1
            continue
        pair = row[options.text_pair_column] if options.text_pair_column else None
        label = _label(row[options.label_column], labels, where) if with_labels and labels else None
        example, cut = _tokenize(text, pair, label, tokenizer, limit, long_texts == "cut", options)
        examples.append(example)
        truncated += cut
    if not examples:
        raise InputError(f"{options.data}: no rows with text in it")
    return CalibrationData(examples, _name(options), truncated, empty, limit)


def _tokenize(
    text: str,
    pair: str | None,
    label: int | None,
    tokenizer: Any,
    limit: int,
    cut: bool,
    options: DataOptions,
) -> tuple[Example, bool]:
    encoded = tokenizer(
        text,
        pair,
        add_special_tokens=options.chat_column is None,  # a chat template writes its own
        return_offsets_mapping=tokenizer.is_fast,
        return_attention_mask=False,
        padding=False,  # a stored tokenizer may carry both from its training
        truncation=False,
        verbose=False,
    )
    ids = encoded["input_ids"]
    too_long = len(ids) > limit
    if too_long and cut:
        short = tokenizer(
            text,
            pair,
            padding=False,
            truncation=True,
            max_length=limit,
            add_special_tokens=options.chat_column is None,
            return_attention_mask=False,
        )
        ids, encoded = short["input_ids"], {**encoded, **short}
    first_end = encoded["offset_mapping"][0][1] if tokenizer.is_fast and ids else 0
    inputs = {
        name: list(encoded[name]) for name in ("input_ids", "token_type_ids") if name in encoded
    }
    return Example(inputs, label, len(text[first_end:].encode())), too_long and cut


def _rows(options: DataOptions) -> Any:
    """The rows asked for, as a datasets.Dataset."""
    import datasets

    path = Path(options.data).expanduser()
    local = path.suffix.lower() in BUILDERS or path.exists()
    if local and not path.is_file():
        raise InputError(f"{options.data}: no such file")
    if local and path.suffix.lower() not in BUILDERS:
        raise InputError(f"{options.data}: unknown suffix; known: {', '.join(BUILDERS)}")
    progress_bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        rows = _local_rows(path, options) if local else _hub_rows(options)
    finally:
        if progress_bars:
            datasets.enable_progress_bars()
    if options.shuffle:
        rows = rows.shuffle(seed=options.seed)
    if options.num_examples is not None:
        rows = rows.select(range(min(options.num_examples, len(rows))))
    return rows


def _local_rows(path: Path, options: DataOptions) -> Any:
    """Read into memory: a cache on disk would go stale, fill up, or be read-only."""
    import datasets

    if path.stat().st_size == 0:
        raise InputError(f"{path}: is empty")
    if options.split != "train":
        raise InputError(f"{path}: is one file, so --split {options.split!r} selects nothing")
    builder, suffix = BUILDERS[path.suffix.lower()], path.suffix.lower()
    more = {"sep": "\t"} if suffix == ".tsv" else {}
    with tempfile.TemporaryDirectory(prefix="fishertool-") as cache:
        try:
            return datasets.load_dataset(
                builder,
                data_files=str(path),
                split="train",
                cache_dir=cache,
                keep_in_memory=True,
                **more,
            )
        except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
            reason = str(error.__cause__ or error).split("\n", 1)[0]
            raise InputError(f"{path}: not readable as {suffix[1:]}: {reason}") from error


def _hub_rows(options: DataOptions) -> Any:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return datasets.load_dataset(options.data, split=options.split)
    except ValueError as error:
        raise InputError(f"{options.data}: {str(error).splitlines()[0]}") from error
    except (OSError, HfHubHTTPError) as error:
        reason = str(error).split("\n", 1)[0]
        raise HubError(
            f"{options.data}: no such file here, and not fetched from the Hub: {reason}"
        ) from error


def _max_length(options: DataOptions, tokenizer: Any, model_limit: int | None) -> int:
    limits = [limit for limit in (tokenizer.model_max_length, model_limit) if limit]
    limits = [limit for limit in limits if limit < UNLIMITED]
    if options.max_length is None:
        return min([DEFAULT_MAX_LENGTH, *limits])
    return min([options.max_length, *limits])


def _text(value: Any, where: str, tokenizer: Any, chat: bool) -> str:
    if value is None:
        return ""
    if chat:
        try:
            return str(tokenizer.apply_chat_template(value, tokenize=False))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{where}: the chat template does not take it: {error}") from error
    if not isinstance(value, str):
        raise InputError(f"{where}: its text is {type(value).__name__}, not a string")
    return value


def _label(value: Any, labels: Mapping[str, int], where: str) -> int:
    """A class id, or a class name of the model's head."""
    if isinstance(value, str) and value in labels:
        return labels[value]
    number = int(value) if isinstance(value, str) and value.isdigit() else value
    if type(number) is int and number in labels.values():
        return number
    raise InputError(
        f"{where}: label {value!r} is none of the model's: "
        f"{', '.join(f'{name} ({number})' for name, number in labels.items())}"
    )


def _name(options: DataOptions) -> str:
    path = Path(options.data)
    return path.name if path.exists() else options.data
