"""The import of a command, and what is done meanwhile."""

import contextlib
import gc
import os
import sys
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path

from fishertool.cli.flags import thread_count


@contextlib.contextmanager
def importing(sources: Iterable[str], threads: int | None, dry_run: bool) -> Iterator[None]:
    """Around the import of a command: importing torch takes seconds and one core of several.

    The others begin to hash what is about to be read. The collector, which finds nothing to free
    in what was just imported, would take a tenth of the time.
    """
    cores = thread_count(threads)
    first = os.environ.get("RANK") in (None, "", "0")  # the others of torchrun report nothing
    if cores > 1 and first and not dry_run and "torch" not in sys.modules:
        from fishertool.checkpoint.hash_ahead import hash_ahead

        hash_ahead(shards_of(Path(source) for source in sources), cores // 2)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def shards_of(folders: Iterable[Path]) -> list[Path]:
    """In the order in which they are read: the first of every folder, the second of every, ...

    By their names, as no index is read yet; a folder may hold other files, which are not read.
    """
    each: list[list[Path]] = []
    for folder in folders:
        with contextlib.suppress(OSError):
            single = folder / "model.safetensors"
            several = sorted(folder.glob("model-?????-of-?????.safetensors"))
            each.append([single] if single.is_file() else [*filter(Path.is_file, several)])
    return [path for row in zip_longest(*each) for path in row if path is not None]
