"""`fishertool merge`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fishertool.cli.app import app
from fishertool.cli.flags import (
    AllowNonfinite,
    BatchSize,
    ChatColumn,
    Config,
    Device,
    DryRun,
    Exclude,
    Include,
    Json,
    LabelColumn,
    MaxLength,
    MaxShardSize,
    NumExamples,
    Overwrite,
    Quiet,
    ReportFile,
    Seed,
    Shuffle,
    Split,
    TextColumn,
    TextPairColumn,
    Threads,
    TrustRemoteCode,
    importing,
    number,
    option,
    pairs,
    thread_count,
)
from fishertool.cli.printing import finish, track_on_stderr
from fishertool.errors import UsageError
from fishertool.registry import find_method, method_names

MERGE_METHODS = "fishertool.merging"


def _list_methods(show: bool) -> None:
    if not show:
        return
    for name in method_names(MERGE_METHODS):
        found = find_method(MERGE_METHODS, name)
        print(f"{name}  {found.summary}")
        for setting, default in found.settings.items():
            print(f"    --set {setting}={default}")
    raise typer.Exit


@app.command()
def merge(
    models: Annotated[list[str], typer.Argument(help="Two or more folders or Hub ids.")],
    out: Annotated[Path, option("--out", help="Folder to write the merged checkpoint to.")],
    config: Config = None,
    method: Annotated[str, option("--method", help="linear or fisher; see --methods.")] = "linear",
    methods: Annotated[
        bool,
        option(
            "--methods", is_eager=True, callback=_list_methods, help="List methods and settings."
        ),
    ] = False,
    weights: Annotated[
        str | None, option("--weights", help="One a model, as 0.6,0.4 [default: equal].")
    ] = None,
    fisher: Annotated[
        list[str] | None,
        option("--fisher", help="A sidecar a model, in the models' order; repeatable."),
    ] = None,
    base: Annotated[str | None, option("--base", help="The models' common ancestor.")] = None,
    anchor: Annotated[
        float | None,
        option("--anchor", help="fisher: how many average weights --base counts for."),
    ] = None,
    power: Annotated[float | None, option("--power", help="fisher: weight by F ** power.")] = None,
    preset: Annotated[
        str | None,
        option("--preset", help="matena: the options of the Fisher merging paper's code."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        option("--set", help="A setting of the method, as key=value; repeatable."),
    ] = None,
    head: Annotated[
        str | None,
        option(
            "--head",
            help="error: refuse heads that differ; merge: merge them whatever their class names; "
            "keep-first: take the first model's. [default: error]",
        ),
    ] = None,
    search_weights: Annotated[
        str | None,
        option("--search-weights", help="grid (2 models) or dirichlet: try many, keep the best."),
    ] = None,
    search_points: Annotated[
        int, option("--search-points", min=1, help="How many weights to try.")
    ] = 51,
    metric: Annotated[
        str | None, option("--metric", help="What is best [default: accuracy, or loss for text].")
    ] = None,
    evaluate_on: Annotated[
        str | None, option("--evaluate-on", help="Data to measure the merge on, and to search by.")
    ] = None,
    split: Split = "train",
    text_column: TextColumn = "text",
    text_pair_column: TextPairColumn = None,
    chat_column: ChatColumn = None,
    label_column: LabelColumn = "label",
    num_examples: NumExamples = None,
    max_length: MaxLength = None,
    batch_size: BatchSize = 8,
    shuffle: Shuffle = False,
    seed: Seed = 0,
    include: Include = None,
    exclude: Exclude = None,
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
    """Merge several checkpoints of one architecture into one.

    Example: fishertool merge A B --method fisher --fisher FA --fisher FB --out OUT
    """
    from fishertool.calibration import DataOptions

    with importing([*models, *([base] if base else []), *(fisher or [])], threads, dry_run):
        from fishertool.commands.merge import merge as command

    chosen: dict[str, Any] = dict(pairs("--set", settings))
    for name, value in (("anchor", anchor), ("power", power)):
        if value is not None:
            if name in chosen:
                raise UsageError(f"--{name} and --set {name} say it twice")
            chosen[name] = value
    options = None
    if evaluate_on is not None:
        options = DataOptions(
            evaluate_on, split, text_column, text_pair_column, chat_column, label_column,
            num_examples, max_length, shuffle, seed,
        )  # fmt: skip
    report = command(
        models,
        out,
        method=method,
        weights=None if weights is None else [
            number("--weights", item) for item in weights.split(",")
        ],
        fisher=fisher or [],
        base=base,
        head=head,
        preset=preset,
        settings=chosen,
        search_weights=search_weights,
        search_points=search_points,
        metric=metric,
        evaluate_on=options,
        batch_size=batch_size,
        include=include or [],
        exclude=exclude or [],
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        dry_run=dry_run,
        allow_nonfinite=allow_nonfinite,
        trust_remote_code=trust_remote_code,
        threads=thread_count(threads),
        device=device,
        track=track_on_stderr(quiet),
    )  # fmt: skip
    finish(report, as_json, quiet, report_file)
