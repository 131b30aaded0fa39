"""`fishertool prune`."""

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
    InBatchNegatives,
    Include,
    Json,
    LabelColumn,
    MaxLength,
    MaxShardSize,
    MethodSettings,
    Model,
    NegativeColumn,
    NumExamples,
    Overwrite,
    PositiveColumn,
    QueryColumn,
    Quiet,
    ReportFile,
    Scale,
    Seed,
    Select,
    SelectFrom,
    Shuffle,
    Split,
    Task,
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
from fishertool.cli.printing import finish, telling_if_stopped, track_on_stderr
from fishertool.cli.values import method_settings
from fishertool.registry import PRUNING

USES_OF_DATA = ("held_out", "labels", "group", "task", "recover_learning_rate")


@app.command()
def prune(
    context: typer.Context,
    model: Model,
    out: Annotated[Path, out_flag("Folder to write the pruned checkpoint to.")],
    config: Config = None,
    method: Annotated[
        str,
        option(
            "--method",
            help="magnitude, random, wanda, fisher, obs, mfac, gaprune or sparsegpt; see --methods.",
        ),
    ] = "magnitude",
    methods: Annotated[bool, methods_flag(PRUNING)] = False,
    sparsity: Annotated[
        float | None,
        option("--sparsity", help="Share of the selected weights to be zero, as 0.5."),
    ] = None,
    pattern: Annotated[
        str,
        option(
            "--pattern",
            help="unstructured, n:m (2:4 keeps two of four), blocks, as 1x4; or heads or neurons, "
            "of which every block has fewer: a smaller model, by --method fisher, obs, magnitude "
            "or random.",
        ),
    ] = "unstructured",
    fisher: Annotated[
        str | None,
        option("--fisher", help="The model's sidecar, of a kind that the method needs."),
    ] = None,
    general_fisher: Annotated[
        str | None,
        option("--general-fisher", help="gaprune: the sidecar of general data."),
    ] = None,
    settings: MethodSettings = None,
    dai_form: Annotated[
        str | None, option("--dai-form", help="gaprune: paper, or normalized. [default: paper]")
    ] = None,
    budget: Annotated[
        str | None,
        option(
            "--budget",
            help="What has the sparsity: every tensor, every row, or (global) all tensors "
            "together. [default: tensor; row for fisher and wanda]",
        ),
    ] = None,
    normalize: Annotated[
        str,
        option("--normalize", help="--budget global: none, or by each tensor's mean saliency."),
    ] = "none",
    compensate: Annotated[
        str | None,
        option(
            "--compensate",
            help="How the weights that stay make up for the others: none, summed, joint, "
            "columnwise, mask (of heads and neurons: one factor each), or auto, what lowers the "
            "held-out loss. [default: none; columnwise for sparsegpt; joint for obs of heads or "
            "neurons]",
        ),
    ] = None,
    block: Annotated[
        str | None,
        option(
            "--block",
            help="Weights in a block of the rank-one Fisher, or whole. [default: 128; whole for "
            "mfac]",
        ),
    ] = None,
    damping: Annotated[
        str | None,
        option(
            "--damping",
            help="Relative to the mean of what is inverted, the Fisher or the inputs' moment; or "
            "auto, the best on held-out examples. [default: 0.001; 0.01 for columnwise and "
            "sparsegpt]",
        ),
    ] = None,
    steps: Annotated[
        int,
        option("--steps", min=1, help="Prune in so many steps, with a new Fisher for each."),
    ] = 1,
    recover_steps: Annotated[
        int,
        option("--recover-steps", min=0, help="Steps of training at the end, with the mask kept."),
    ] = 0,
    recover_learning_rate: Annotated[
        float, option("--recover-learning-rate", help="Of these steps, at most.")
    ] = 1e-4,
    data: Annotated[
        str | None,
        option(
            "--data",
            help="Examples to estimate the Fisher on, and to measure the loss before and after.",
        ),
    ] = None,
    held_out: Annotated[
        float, option("--held-out", help="Share of --data that is measured on, and not estimated.")
    ] = 0.2,
    labels: Annotated[
        str,
        option(
            "--labels",
            help="For the estimate, as estimate-fisher has it; auto: expected-signed for classes "
            "and a rank-one Fisher.",
        ),
    ] = "auto",
    group: Annotated[
        int, option("--group", min=1, help="Examples whose mean is one gradient of the estimate.")
    ] = 1,
    task: Task = "auto",
    split: Split = "train",
    text_column: TextColumn = "text",
    text_pair_column: TextPairColumn = None,
    chat_column: ChatColumn = None,
    label_column: LabelColumn = "label",
    query_column: QueryColumn = None,
    positive_column: PositiveColumn = None,
    negative_column: NegativeColumn = None,
    in_batch_negatives: InBatchNegatives = None,
    scale: Scale = None,
    num_examples: NumExamples = None,
    select: Select = None,
    select_from: SelectFrom = None,
    max_length: MaxLength = None,
    shuffle: Shuffle = False,
    seed: Seed = 0,
    save_mask: Annotated[
        bool, option("--save-mask", help="Also write the masks, in bits: pruning_mask.safetensors.")
    ] = False,
    resume: Annotated[
        bool,
        option("--resume", help="Keep what is done if the run is killed, and go on from there."),
    ] = False,
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
    """Set the weights to zero that a model can do without, and let the others make up for them.

    Example: fishertool prune MODEL --method obs --data texts.jsonl --sparsity 0.7 --out OUT
    """
    with importing([model], threads, dry_run):
        from fishertool.commands.prune import prune as command

    chosen = method_settings(settings, dai_form=dai_form)
    if data is None:
        without = "without --data there is nothing to use it on"
        refuse(context, {*flags_of_data(), *USES_OF_DATA}, without)
    elif not recover_steps:
        refuse(context, {"recover_learning_rate"}, "needs --recover-steps")
    options = None if data is None else data_options(context, data)
    with telling_if_stopped("the same command goes on from what is done" if resume else None):
        report = command(
            model,
            out,
            method=method,
            sparsity=sparsity,
            pattern=pattern,
            fisher=fisher,
            general_fisher=general_fisher,
            settings=chosen,
            budget=budget,
            normalize=normalize,
            compensate=compensate,
            block=block,
            damping=damping,
            steps=steps,
            recover_steps=recover_steps,
            recover_learning_rate=recover_learning_rate,
            data=options,
            held_out=held_out,
            labels=labels,
            group=group,
            task=task,
            save_mask=save_mask,
            resume=resume,
            seed=seed,
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
