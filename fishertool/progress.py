"""Progress as an argument: libraries call `track`, and only this file knows how it looks."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Protocol

Advance = Callable[[int], None]
SECONDS_BETWEEN_LINES = 10.0


class Track(Protocol):
    def __call__(
        self, description: str, total: int, unit: str
    ) -> AbstractContextManager[Advance]: ...


@contextmanager
def silent(description: str, total: int, unit: str) -> Iterator[Advance]:
    """Show nothing."""
    yield lambda count: None


@contextmanager
def plain_lines(description: str, total: int, unit: str) -> Iterator[Advance]:
    """A line on stderr now and then, without control codes: for logs."""
    start = shown = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, shown
        done += count
        now = time.monotonic()
        if now - shown >= SECONDS_BETWEEN_LINES and done:
            shown = now
            rate = done / (now - start)
            left = (total - done) / rate
            with suppress(OSError):  # whoever read it may have left
                print(
                    f"{description}: {done}/{total} {unit}, {rate:.3g} {unit}/s, {left:.0f} s left",
                    file=sys.stderr,
                    flush=True,
                )

    yield advance


@contextmanager
def bar(description: str, total: int, unit: str) -> Iterator[Advance]:
    """A bar with rate and time left, on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}% {task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total, rate="")

        def advance(count: int) -> None:
            progress.advance(task, count)
            speed = progress.tasks[0].speed
            progress.update(task, rate=f"{speed:.3g} {unit}/s" if speed else "")

        yield advance


def for_stderr(quiet: bool) -> Track:
    """What suits where stderr goes."""
    if quiet:
        return silent
    return bar if sys.stderr.isatty() else plain_lines
