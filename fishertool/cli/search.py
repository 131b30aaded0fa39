"""`fishertool search`."""

from pathlib import Path
from typing import Annotated

import typer

from fishertool.cli.app import app
from fishertool.cli.flags import (
    AllowNonfinite,
    BatchSize,
    Config,
    Device,
    DryRun,
    Json,
    MaxShardSize,
    Overwrite,
    Quiet,
    ReportFile,
    Seed,
    Threads,
    TrustRemoteCode,
    option,
    out_flag,
    thread_count,
)
from fishertool.cli.printing import finish, telling_if_stopped, track_on_stderr


@app.command()
def search(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="A merge recipe with ranges in the place of values, and objectives.",
        ),
    ],
    out: Annotated[Path, out_flag("Folder for the front: JSON, recipes, a page.")],
    config: Config = None,
    sampler: Annotated[
        str,
        option(
            "--sampler", help="mmmo, mmmo-weights (needs fishers), gp, tpe, nsga2, random or grid."
        ),
    ] = "mmmo",
    evaluations: Annotated[
        int, option("--evaluations", min=1, help="Merges to make and measure, failed ones too.")
    ] = 30,
    startup: Annotated[
        int, option("--startup", min=2, help="How many of them before the sampler learns.")
    ] = 10,
    batch: Annotated[
        int, option("--batch", min=1, help="mmmo: how many are chosen at a time.")
    ] = 1,
    without: Annotated[
        list[str] | None,
        option(
            "--without",
            help="mmmo: leave out recombination, screening or sparsity; repeatable.",
        ),
    ] = None,
    pick: Annotated[
        str | None,
        option(
            "--pick",
            help="Also write one merge of the front, to OUT/picked: knee, or NAME=WEIGHT,... for "
            "the one nearest to the best of all objectives by weight.",
        ),
    ] = None,
    storage: Annotated[
        str | None,
        option(
            "--storage",
            help="Where trials are kept, for workers on other machines: an Optuna URL, as "
            "sqlite:///F or postgresql://... [default: OUT/search.journal].",
        ),
    ] = None,
    study: Annotated[
        str | None, option("--study", help="The search's name there [default: that of OUT].")
    ] = None,
    worker: Annotated[
        bool, option("--worker", help="Take part in the search of OUT that another process leads.")
    ] = False,
    resume: Annotated[
        bool, option("--resume", help="Go on with the search in OUT, also for more --evaluations.")
    ] = False,
    scratch: Annotated[
        Path | None,
        option(
            "--scratch",
            help="Write every merge here and load it from there [default: in memory, if it can be].",
        ),
    ] = None,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    allow_nonfinite: AllowNonfinite = False,
    trust_remote_code: TrustRemoteCode = False,
    threads: Threads = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
    report_file: ReportFile = None,
) -> None:
    """Search the merges that no other beats in every objective, in few evaluations.

    Example: fishertool search RECIPE.yml --out OUT --evaluations 30 --pick knee
    """
    from fishertool.commands.search import search as command

    told = None if worker or dry_run else "--resume goes on from what is measured"
    with telling_if_stopped(told):
        report = command(
            recipe,
            out,
            sampler=sampler,
            evaluations=evaluations,
            startup=startup,
            batch=batch,
            without=without or [],
            pick=pick,
            storage=storage,
            study=study,
            worker=worker,
            resume=resume,
            scratch=scratch,
            seed=seed,
            batch_size=batch_size,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            dry_run=dry_run,
            allow_nonfinite=allow_nonfinite,
            trust_remote_code=trust_remote_code,
            threads=thread_count(threads),
            device=device,
            track=track_on_stderr(quiet),
        )
    finish(report, as_json, quiet, report_file)
