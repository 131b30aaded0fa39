"""`fishertool inspect`."""

from typing import Annotated

import typer

from fishertool.cli.app import app
from fishertool.cli.flags import (
    Config,
    Json,
    Quiet,
    ReportFile,
    looked_at,
    option,
    refuse,
)
from fishertool.cli.printing import finish

COLUMNS = ("name", "dtype", "shape", "bytes", "file")


@app.command()
def inspect(
    context: typer.Context,
    path: Annotated[
        str,
        typer.Argument(
            help="A checkpoint, adapter, Fisher sidecar or other output: folder or Hub id.",
            callback=looked_at,
        ),
    ],
    config: Config = None,
    tensors: Annotated[bool, option("--tensors", help="Also a row for every tensor.")] = False,
    include: Annotated[
        list[str] | None,
        option("--include", help="Glob of names of --tensors to show; repeatable."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        option("--exclude", help="Glob of names of --tensors to leave out; repeatable."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    report_file: ReportFile = None,
) -> None:
    """Show what a folder holds, from headers alone: no weight is read.

    Example: fishertool inspect model --tensors --include '*.attention.*'
    """
    if not tensors:
        refuse(context, ("include", "exclude"), "choose among --tensors; give that too")
    from fishertool.commands.inspect import inspect as command

    report = command(path, tensors=tensors, include=include or (), exclude=exclude or ())
    finish(report, as_json, quiet, report_file, COLUMNS)
