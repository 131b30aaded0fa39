"""`fishertool merge`."""

from pathlib import Path
from typing import Annotated

import typer

from fishertool.cli.app import app
from fishertool.cli.flags import (
    AllowNonfinite,
    BatchSize,
    ChatColumn,
    Device,
    DryRun,
    Exclude,
    Include,
    Json,
    LabelColumn,
    MaxLength,
    MaxShardSize,
    MethodSettings,
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
    data_options,
    methods_flag,
    option,
    out_flag,
    thread_count,
)
from fishertool.cli.importing import importing
from fishertool.cli.merge_recipe import (
    check_measuring,
    check_seed,
    load_recipe_or_config,
    recipe_of,
    text_of,
    weights_of,
)
from fishertool.cli.printing import finish, put, track_on_stderr
from fishertool.errors import UsageError
from fishertool.registry import MERGING


@app.command()
def merge(
    context: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Folders or Hub ids, as ID@REVISION too; with a LoRA, BASE+ADAPTER."),
    ] = None,
    out: Annotated[Path | None, out_flag("Folder to write the merged checkpoint to.")] = None,
    config: Annotated[
        Path | None,
        option(
            "--config",
            is_eager=True,
            callback=load_recipe_or_config,
            help="A recipe, as mergekit's or with what is ours; or flag names as keys.",
        ),
    ] = None,
    print_config: Annotated[
        bool, option("--print-config", help="Print the merge as a recipe, and do nothing.")
    ] = False,
    method: Annotated[str, option("--method", help="See --methods.")] = "linear",
    methods: Annotated[bool, methods_flag(MERGING)] = False,
    weights: Annotated[
        str | None,
        option(
            "--weights",
            help="One a model, as 0.6,0.4 [default: equal]; optimal: those of the least predicted "
            "loss that sum to 1; optimal-free: whatever they sum to (task-arithmetic).",
        ),
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
    trim: Annotated[
        float | None,
        option("--trim", help="fisher: keep this part of each task vector, by F * tau ** 2."),
    ] = None,
    preset: Annotated[
        str | None,
        option("--preset", help="matena: the options of the Fisher merging paper's code."),
    ] = None,
    settings: MethodSettings = None,
    head: Annotated[
        str | None,
        option(
            "--head",
            help="error: refuse heads that differ; merge: merge them whatever their class names; "
            "keep-first: take the first model's. [default: error]",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        option(
            "--tokenizer",
            help="For vocabularies that differ: union, base, or a model whose it is to be.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        option("--dtype", help="Of the output, as bfloat16 [default: the first model's]."),
    ] = None,
    as_lora: Annotated[
        int | None,
        option("--as-lora", min=1, help="Write the merge as a LoRA of this rank on --base."),
    ] = None,
    predict: Annotated[
        bool,
        option("--predict", help="Report the predicted loss by layer too; needs all --fisher."),
    ] = False,
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

    given = weights_of(weights)
    recipe = recipe_of(context, config)
    if print_config:
        put(text_of(context, recipe, given))
        return
    if out is None:
        raise UsageError("--out is missing: the folder to write to")
    with importing(recipe.reads, threads, dry_run):
        from fishertool.commands.merge import merge as command

    check_seed(context, recipe)
    check_measuring(context)
    options = None if evaluate_on is None else data_options(context, evaluate_on)
    report = command(
        recipe,
        out,
        weights=given,
        as_lora=as_lora,
        predict=predict,
        search_weights=search_weights,
        search_points=search_points,
        metric=metric,
        evaluate_on=options,
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
