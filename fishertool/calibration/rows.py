"""Data files and Hub datasets -> rows."""

import csv
import glob
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

from fishertool.calibration.data import DataOptions
from fishertool.errors import HubError, InputError, UsageError
from fishertool.paths import expanded

BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
NO_ROWS = ("corresponds to no data", "BatchSize must be greater than 0")
"""What datasets says of files without rows, the second of parquet's."""


def read_rows(options: DataOptions) -> Any:
    """The rows asked for, or to select from, as a datasets.Dataset.

    Raises InputError naming the file, HubError if a dataset cannot be had.
    """
    path = check_data_source(options)
    with _quiet():
        rows = _hub_rows(options) if path is None else _local_rows(path, options)
    if options.shuffle:
        rows = rows.shuffle(seed=options.seed)
    count = options.num_examples if options.select is None else options.select_from
    if count is not None:
        rows = rows.select(range(min(count, len(rows))))
    return rows


def check_data_source(options: DataOptions) -> Path | None:
    """The local file that is meant, or None for a dataset of the Hub; nothing is read.

    Raises InputError naming the file, if it is none that can be read; UsageError for no name.
    """
    if not options.data:
        raise UsageError("--data: is empty; give a file or a Hub dataset")
    path = expanded(options.data)
    if path.suffix.lower() not in BUILDERS and not path.exists():
        return None
    if not path.exists():
        raise InputError(f"{options.data}: no such file")
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no regular file"
        raise InputError(f"{options.data}: is {what}; give a file of {', '.join(BUILDERS)}")
    if path.suffix.lower() not in BUILDERS:
        raise InputError(f"{options.data}: unknown suffix; known: {', '.join(BUILDERS)}")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: is empty")
    if options.split != "train":
        raise InputError(f"{path}: is one file, so --split {options.split!r} selects nothing")
    return path


def name_of(options: DataOptions) -> str:
    """A file's name without its folder, a dataset's as it is."""
    path = Path(options.data)
    return path.name if path.exists() else options.data


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of datasets, and without its own lines before our errors."""
    import datasets

    bars, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _local_rows(path: Path, options: DataOptions) -> Any:
    """Read into memory: a cache on disk would go stale, fill up, or be read-only."""
    import datasets

    builder, suffix = BUILDERS[path.suffix.lower()], path.suffix.lower()
    more: dict[str, Any] = {"sep": "\t"} if suffix == ".tsv" else {}
    if builder == "text":  # the others take a byte order mark for what it is
        more |= {"encoding": "utf-8-sig"}
    if builder == "csv":  # `NA`, `null` and `1` are texts; an empty cell is not
        more |= {"keep_default_na": False, "na_values": [""]}
        texts = _header(path, more.get("sep", ",")) & _texts(options)
        more["converters"] = dict.fromkeys(texts, _cell)
    with tempfile.TemporaryDirectory(prefix="fishertool-") as cache:
        try:
            return datasets.load_dataset(
                builder,
                data_files=glob.escape(str(path)),
                split="train",
                cache_dir=cache,
                keep_in_memory=True,
                **more,
            )
        except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
            cause = error.__cause__ or error
            reason = str(cause).split("\n", 1)[0]
            if any(sign in reason for sign in NO_ROWS):
                raise InputError(f"{path}: has no rows") from error
            if isinstance(cause, UnicodeDecodeError):
                reason += "; save it as UTF-8"
            raise InputError(f"{path}: not readable as {suffix[1:]}: {reason}") from error


def _header(path: Path, separator: str) -> set[str]:
    """Columns of a table. Raises InputError for a first row that has more fields: a reader would
    take the surplus for names of rows, and drop it."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            names, *rows = islice(csv.reader(file, delimiter=separator), 2)
    except (ValueError, csv.Error):  # the reader has more to say of it
        return set()
    if rows and len(rows[0]) > len(names):
        raise InputError(
            f"{path}: row 0 has {len(rows[0])} fields, its header {len(names)}; put a text that "
            "has the separator in it in double quotes"
        )
    return set(names)


def _cell(text: str) -> str | None:
    return text or None


def _texts(options: DataOptions) -> set[str]:
    """Columns that hold texts, whatever they look like."""
    others = ("label_column", "score_column", "chat_column")
    named = {
        getattr(options, one.name)
        for one in fields(options)
        if one.name.endswith("_column") and one.name not in others
    }
    return {"negative", *named}


def _hub_rows(options: DataOptions) -> Any:
    import datasets

    try:
        return datasets.load_dataset(options.data, split=options.split)
    except ValueError as error:
        raise InputError(f"{options.data}: {str(error).splitlines()[0]}") from error
    except Exception as error:  # of the Hub, a proxy, the HTTP client, the disk
        reason = " ".join(str(error).split())
        raise HubError(
            f"{options.data}: no such file here, and not fetched from the Hub: {reason}"
        ) from error
