"""`fishertool combine-fisher`."""

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
    out_flag,
)
from fishertool.cli.printing import finish, track_on_stderr


@app.command("combine-fisher")
def combine_fisher(
    parts: Annotated[
        list[Path], typer.Argument(help="Folders that estimate-fisher --part wrote, all n of n.")
    ],
    out: Annotated[Path, out_flag("Folder to write the sidecar to.")],
    config: Config = None,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    allow_nonfinite: AllowNonfinite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    report_file: ReportFile = None,
) -> None:
    """Put the parts of one Fisher estimate together: the sidecar that one run would have written.

    Example: fishertool combine-fisher part-1 part-2 --out model-fisher
    """
    from fishertool.commands.combine_fisher import combine_fisher as command

    report = command(
        parts,
        out,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        dry_run=dry_run,
        allow_nonfinite=allow_nonfinite,
        track=track_on_stderr(quiet),
    )
    finish(report, as_json, quiet, report_file)
