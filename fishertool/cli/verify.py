"""`fishertool verify`."""

from typing import Annotated

import typer

from fishertool.cli.app import app
from fishertool.cli.flags import (
    AllowNonfinite,
    Config,
    Json,
    Quiet,
    ReportFile,
    Threads,
    looked_at,
    option,
    thread_count,
)
from fishertool.cli.importing import importing
from fishertool.cli.printing import finish, track_on_stderr
from fishertool.errors import InputError


@app.command()
def verify(
    out: Annotated[
        str,
        typer.Argument(help="What a verb wrote, or any checkpoint.", callback=looked_at),
    ],
    config: Config = None,
    no_load: Annotated[
        bool, option("--no-load", help="Do not try whether transformers would load it.")
    ] = False,
    allow_nonfinite: AllowNonfinite = False,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
    report_file: ReportFile = None,
) -> None:
    """Check that an output is what its report says, and would load; exit 3 if it is not.

    Example: fishertool verify merged
    """
    with importing([], threads, dry_run=True):
        from fishertool.commands.verify import verify as command

    report = command(
        out,
        allow_nonfinite=allow_nonfinite,
        load=not no_load,
        threads=thread_count(threads),
        track=track_on_stderr(quiet),
    )
    finish(report, as_json, quiet, report_file)
    if findings := report.summary["findings"]:
        more = f"; and {len(findings) - 1} more" if len(findings) > 1 else ""
        raise InputError(f"{out}: {findings[0]}{more}")
