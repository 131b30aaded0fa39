"""`fishertool densify`."""

from pathlib import Path
from typing import Annotated

import typer

from fishertool.cli.app import app
from fishertool.cli.flags import (
    AllowNonfinite,
    Config,
    DryRun,
    Json,
    MaxShardSize,
    Overwrite,
    Quiet,
    ReportFile,
    Threads,
    out_place,
    thread_count,
)
from fishertool.cli.importing import importing
from fishertool.cli.printing import finish, track_on_stderr


@app.command()
def densify(
    model: Annotated[str, typer.Argument(help="A low-rank folder or Hub id.")],
    out: Annotated[
        Path,
        typer.Argument(help="Folder to write the dense checkpoint to.", callback=out_place),
    ],
    config: Config = None,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    allow_nonfinite: AllowNonfinite = False,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
    report_file: ReportFile = None,
) -> None:
    """Turn a low-rank checkpoint into a dense one, which loads everywhere.

    Example: fishertool densify model-low-rank model-dense
    """
    with importing([model], threads, dry_run):
        from fishertool.commands.densify import densify as command

    report = command(
        model,
        out,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        dry_run=dry_run,
        allow_nonfinite=allow_nonfinite,
        threads=thread_count(threads),
        track=track_on_stderr(quiet),
    )
    finish(report, as_json, quiet, report_file)
