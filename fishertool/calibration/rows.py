"""Data files and Hub datasets -> rows."""

import tempfile
from pathlib import Path
from typing import Any

from fishertool.calibration.data import DataOptions
from fishertool.errors import HubError, InputError

BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}


def read_rows(options: DataOptions) -> Any:
    """The rows asked for, or to select from, as a datasets.Dataset.

    Raises InputError naming the file, HubError if a dataset cannot be had.
    """
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
    count = options.num_examples if options.select is None else options.select_from
    if count is not None:
        rows = rows.select(range(min(count, len(rows))))
    return rows


def name_of(options: DataOptions) -> str:
    """A file's name without its folder, a dataset's as it is."""
    path = Path(options.data)
    return path.name if path.exists() else options.data


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
