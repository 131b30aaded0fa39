"""`fishertool factorize`."""

from pathlib import Path
from typing import Annotated

import typer

from fishertool.cli.app import app
from fishertool.cli.flags import (
    AllowNonfinite,
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
    MethodSettings,
    Model,
    NumExamples,
    OptionalData,
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
    flags_of_data,
    methods_flag,
    option,
    out_flag,
    refuse,
    thread_count,
)
from fishertool.cli.importing import importing
from fishertool.cli.printing import finish, track_on_stderr
from fishertool.cli.values import method_settings
from fishertool.errors import UsageError
from fishertool.registry import FACTORIZATION


@app.command()
def factorize(
    context: typer.Context,
    model: Model,
    out: Annotated[Path, out_flag("Folder to write the factorized checkpoint to.")],
    config: Config = None,
    method: Annotated[
        str, option("--method", help="svd, fwsvd, asvd, whitened, kronecker or tfwsvd.")
    ] = "kronecker",
    methods: Annotated[bool, methods_flag(FACTORIZATION)] = False,
    fisher: Annotated[
        str | None,
        option("--fisher", help="The model's sidecar, of a kind that the method needs."),
    ] = None,
    sides: Annotated[
        str | None, option("--sides", help="fwsvd: weigh inputs (in), or outputs too (both).")
    ] = None,
    start: Annotated[
        str | None, option("--start", help="tfwsvd: the method whose result it refines.")
    ] = None,
    settings: MethodSettings = None,
    keep: Annotated[
        float | None,
        option("--keep", help="Share of the selected weights' parameters that is kept, as 0.5."),
    ] = None,
    rank: Annotated[int | None, option("--rank", help="One rank for all.")] = None,
    energy: Annotated[
        float | None,
        option("--energy", help="Share of every matrix's squared singular values to keep."),
    ] = None,
    target_parameters: Annotated[
        int | None, option("--target-parameters", help="What the whole model may have at most.")
    ] = None,
    allocate: Annotated[
        str | None,
        option(
            "--allocate",
            help="How a budget is divided: uniform, energy, global, or auto, the best of these on "
            "--evaluate-on. [default: uniform]",
        ),
    ] = None,
    rank_multiple: Annotated[
        int, option("--rank-multiple", help="Ranks are multiples of this; 8 suits GPUs.")
    ] = 1,
    format: Annotated[  # noqa: A002 (the flag's name)
        str,
        option(
            "--format",
            help="low-rank: smaller, loads after `import fishertool`; dense: the products, of the "
            "old size, load everywhere.",
        ),
    ] = "low-rank",
    finetune_steps: Annotated[
        int | None,
        option("--finetune-steps", help="Train the factors for so many steps on --data."),
    ] = None,
    data: OptionalData = None,
    learning_rate: Annotated[
        float, option("--learning-rate", help="Of --finetune-steps; its peak.")
    ] = 3e-4,
    evaluate_on: Annotated[
        str | None, option("--evaluate-on", help="Held-out data to measure the result on.")
    ] = None,
    split: Split = "train",
    text_column: TextColumn = "text",
    text_pair_column: TextPairColumn = None,
    chat_column: ChatColumn = None,
    label_column: LabelColumn = "label",
    num_examples: NumExamples = None,
    max_length: MaxLength = None,
    batch_size: Annotated[
        int, option("--batch-size", min=1, help="Examples a training step; and at once to measure.")
    ] = 8,
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
    """Replace linear layers by pairs of smaller ones, chosen by what the data say matters.

    Example: fishertool factorize MODEL --fisher F --keep 0.5 --evaluate-on test.jsonl --out OUT
    """

    with importing([model], threads, dry_run):
        from fishertool.commands.factorize import factorize as command
        from fishertool.surgery.factorize_recover import Finetuning

    chosen = method_settings(settings, sides=sides)
    if (finetune_steps is None) != (data is None):
        raise UsageError("--finetune-steps and --data, what to train on, go together")

    if finetune_steps is None:
        refuse(context, {"learning_rate"}, "needs --finetune-steps")
    if data is None and evaluate_on is None:
        unread = "without --data or --evaluate-on there is nothing to read"
        refuse(context, {*flags_of_data(), "batch_size"}, unread)

    finetune = None
    if finetune_steps is not None and data is not None:
        finetune = Finetuning(
            finetune_steps, data_options(context, data), learning_rate, batch_size
        )
    report = command(
        model,
        out,
        method=method,
        fisher=fisher,
        settings=chosen,
        start=start,
        keep=keep,
        rank=rank,
        energy=energy,
        target_parameters=target_parameters,
        allocate=allocate,
        rank_multiple=rank_multiple,
        format=format,
        finetune=finetune,
        evaluate_on=None if evaluate_on is None else data_options(context, evaluate_on),
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
    )
    finish(report, as_json, quiet, report_file)
