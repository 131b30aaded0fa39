"""What a command prints: a table or one JSON document on stdout, talk on stderr."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fishertool.errors import GateError


def tell(message: str) -> None:
    """One line on stderr; what a terminal would act on, as a name from a file may have, is escaped."""
    with suppress(OSError):  # whoever read it may have left, or its disk be full
        print(f"fishertool: {_printable(' '.join(message.split()))}", file=sys.stderr)


def _printable(text: str) -> str:
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


@contextmanager
def telling_if_stopped(told: str | None) -> Iterator[None]:
    """Say this if Ctrl-C or SIGTERM stops what is done inside."""
    try:
        yield
    except BaseException as error:
        stop: BaseException | None = error
        while isinstance(stop, Exception):  # it may have come of breaking into a journal's locking
            stop = stop.__context__
        if stop is None:
            raise
        if told is not None:
            tell(told)
        raise stop from None


def finish(
    report: Any,
    as_json: bool,
    quiet: bool,
    report_file: Path | None,
    columns: Sequence[str] = (),
) -> None:
    """Print the report, write it where asked, and fail if a gate is not met.

    With `columns`, the table has these of every tensor too.
    """
    for warning in report.warnings:
        tell(f"warning: {warning}")
    text = report.to_json() if as_json or report_file is not None else ""
    try:
        if as_json:
            put(text)
        elif not quiet:
            put(_table(report) + _rows(report.tensors if columns else [], columns))
    finally:  # where one of the two places fails, the other has the result
        if report_file is not None:
            report_file.parent.mkdir(parents=True, exist_ok=True)
            report_file.write_text(text, encoding="utf-8")
    if unmet := [gate for gate in (report.evaluation or {}).get("gates", []) if not gate["met"]]:
        told = ", ".join(
            f"{gate['metric']} {gate['rule'].replace('_', '-')} {gate['limit']:g} "
            f"(is {gate['value']:.6g})"
            for gate in unmet
        )
        raise GateError(f"quality gate not met: {told}")


def put(text: str) -> None:
    """Write data to stdout. Whoever read it may have left, which changes nothing else."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        leave_stdout()


def leave_stdout() -> None:
    """Send to nowhere what stdout still holds and gets, as nobody reads it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _table(report: Any) -> str:
    rows = list(_flatten(report.summary))
    width = max((len(name) for name, _ in rows), default=0)
    against = (report.evaluation or {}).get("against") or {}
    lines = []
    for name, value in rows:
        other = f"  (against: {_show(against[name])})" if name in against else ""
        lines.append(f"{_printable(name):<{width}}  {_show(value)}{other}\n")
    for name, value in ((report.evaluation or {}).get("metrics") or {}).items():
        lines.append(f"{name:<{width}}  {_show(value)}\n")
    return "".join(lines)


def _rows(tensors: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    shown = [[_printable(str(tensor[column])) for column in columns] for tensor in tensors]
    widths = [max(map(len, cells)) for cells in zip(*shown, strict=True)]
    lines = ("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in shown)
    return "".join(f"{line}\n" for line in ["", *lines]) if shown else ""


def _flatten(summary: Mapping[str, Any], prefix: str = "") -> Any:
    for name, value in summary.items():
        if name == "findings":  # a sentence each
            yield from (("finding", one) for one in value)
        elif isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        elif value not in ([], None):
            yield f"{prefix}{name}", value


def _show(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_show, value))
    if isinstance(value, str) and "\n" in value:  # a text of its own, below its name
        return f"\n\n{value}"
    return f"{value:.6g}" if isinstance(value, float) else _printable(str(value))


def track_on_stderr(quiet: bool) -> Any:
    from fishertool import progress

    return progress.for_stderr(quiet)
