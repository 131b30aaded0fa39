"""`fishertool estimate-fisher`."""

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
    MaskFraction,
    MaskPrompt,
    MaxLength,
    MaxShardSize,
    MicroBatchSize,
    Model,
    NegativeColumn,
    NumExamples,
    OptionalData,
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
    TargetColumn,
    Task,
    TextColumn,
    TextPairColumn,
    Threads,
    TrustRemoteCode,
    data_options,
    is_given,
    option,
    out_flag,
    thread_count,
)
from fishertool.cli.importing import importing
from fishertool.cli.printing import finish, track_on_stderr
from fishertool.errors import UsageError
from fishertool.launcher import check_alone


@app.command("estimate-fisher")
def estimate_fisher(
    context: typer.Context,
    model: Model,
    out: Annotated[Path, out_flag("Folder to write the sidecar to.")],
    data: OptionalData = None,
    config: Config = None,
    kind: Annotated[
        str,
        option(
            "--kind",
            help="diagonal, factored, kronecker, activation, mean-gradient, rank-one; several with "
            "commas.",
        ),
    ] = "diagonal",
    with_mean_gradient: Annotated[
        bool,
        option(
            "--with-mean-gradient",
            help="Beside --kind: the mean gradient over the examples, with the data's labels.",
        ),
    ] = False,
    labels: Annotated[
        str,
        option(
            "--labels",
            help="empirical: the data's; sampled: drawn from the model; expected: exact mean over "
            "classes; expected-signed: its estimate by random signs, for any vocabulary; auto: "
            "expected for up to 8 classes, else sampled; empirical for text, queries and mean "
            "gradients.",
        ),
    ] = "auto",
    draws: Annotated[
        int, option("--draws", min=1, help="Draws per prediction, of labels or signs.")
    ] = 1,
    max_classes: Annotated[
        int, option("--max-classes", min=2, help="The most classes for --labels expected.")
    ] = 64,
    estimator: Annotated[
        str,
        option(
            "--estimator",
            help="exact: every example's gradient by itself; signed: one backward pass a batch "
            "with random signs, unbiased, for models that exact cannot serve.",
        ),
    ] = "exact",
    until_relative_error: Annotated[
        float | None,
        option(
            "--until-relative-error",
            min=0.0,
            help="Take examples in random order, and stop when every tensor's summed Fisher is "
            "known this well (as a standard error).",
        ),
    ] = None,
    fsdp: Annotated[
        bool,
        option(
            "--fsdp",
            help="Under torchrun: shard the weights over the processes, for models that one device "
            "cannot hold; with --estimator signed.",
        ),
    ] = False,
    skip_nonfinite: Annotated[
        bool,
        option("--skip-nonfinite", help="Leave out, and count, examples whose loss is not finite."),
    ] = False,
    group: Annotated[
        int,
        option("--group", min=1, help="Examples whose mean is one gradient of a rank-one bank."),
    ] = 1,
    bank_dtype: Annotated[
        str, option("--bank-dtype", help="Of a rank-one bank: bfloat16 or float32.")
    ] = "bfloat16",
    task: Task = "auto",
    split: Split = "train",
    text_column: TextColumn = "text",
    text_pair_column: TextPairColumn = None,
    chat_column: ChatColumn = None,
    label_column: LabelColumn = "label",
    target_column: TargetColumn = None,
    query_column: QueryColumn = None,
    positive_column: PositiveColumn = None,
    negative_column: NegativeColumn = None,
    in_batch_negatives: InBatchNegatives = None,
    scale: Scale = None,
    mask_fraction: MaskFraction = None,
    mask_prompt: MaskPrompt = False,
    num_examples: NumExamples = None,
    select: Select = None,
    select_from: SelectFrom = None,
    max_length: MaxLength = None,
    batch_size: MicroBatchSize = "auto",
    adapter: Annotated[
        str | None, option("--adapter", help="A LoRA adapter on the model: folder or Hub id.")
    ] = None,
    adapter_fisher: Annotated[
        str,
        option(
            "--adapter-fisher",
            help="Of what, with --adapter: merged, the model's weights with it; adapter, its own.",
        ),
    ] = "merged",
    shuffle: Shuffle = False,
    seed: Seed = 0,
    from_optimizer: Annotated[
        Path | None,
        option(
            "--from-optimizer",
            help="In place of --data: Adam's second moments (a saved optimizer or safetensors).",
        ),
    ] = None,
    part: Annotated[
        str | None,
        option("--part", help="i/n: write the i-th of n partial results, for combine-fisher."),
    ] = None,
    world_size: Annotated[
        int | None,
        option("--world-size", min=1, help="Fail unless so many processes run (torchrun)."),
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        option("--checkpoint-every", min=1, help="Save the sums after every so many examples."),
    ] = None,
    resume: Annotated[
        bool, option("--resume", help="Go on where a killed run last saved, if there was one.")
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
    device_map: Annotated[
        str | None,
        option(
            "--device-map",
            help="Spread the layers over the devices: auto, balanced, balanced_low_0, sequential.",
        ),
    ] = None,
    accumulate_on: Annotated[
        str,
        option(
            "--accumulate-on", help="Keep a diagonal's sums where the weights are, or on the cpu."
        ),
    ] = "weights",
    as_json: Json = False,
    quiet: Quiet = False,
    report_file: ReportFile = None,
) -> None:
    """Measure how much a model's predictions depend on each weight.

    Example: fishertool estimate-fisher ./model --data texts.jsonl --out ./model-fisher
    """

    if from_optimizer is not None:
        _estimate_from_optimizer(context, model, from_optimizer, out)
        return
    if data is None:
        raise UsageError("estimate-fisher needs --data, or --from-optimizer")
    if device_map is not None and device != "auto":
        raise UsageError("--device and --device-map: give one of them")
    with importing([model], threads, dry_run):
        from fishertool.commands.estimate_fisher import estimate_fisher as command
        from fishertool.estimation.settings import Settings

    options = data_options(context, data)
    report = command(
        model,
        options,
        out,
        settings=Settings(
            kind, labels, draws, max_classes, estimator, group, bank_dtype,
            until_relative_error, skip_nonfinite, batch_size, fsdp, with_mean_gradient,
        ),
        task=task,
        part=part,
        world_size=world_size,
        checkpoint_every=checkpoint_every,
        resume=resume,
        adapter=adapter,
        adapter_fisher=adapter_fisher,
        include=include or [],
        exclude=exclude or [],
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        dry_run=dry_run,
        allow_nonfinite=allow_nonfinite,
        trust_remote_code=trust_remote_code,
        threads=thread_count(threads),
        device=device,
        device_map=device_map,
        accumulate_on=accumulate_on,
        track=track_on_stderr(quiet),
    )  # fmt: skip
    if report is not None:
        finish(report, as_json, quiet, report_file)


def _estimate_from_optimizer(context: typer.Context, model: str, path: Path, out: Path) -> None:
    """The flags that mean something without data; any other is refused."""
    taken = "kind", "task", "max_shard_size", "overwrite", "dry_run", "trust_remote_code"
    shown = "as_json", "quiet", "report_file", "threads", "device", "include", "exclude", "config"
    given = {name for name in context.params if is_given(context, name)}
    known = {"model", "out", "from_optimizer", *taken, *shown}
    if other := sorted(given - known):
        raise UsageError(f"--{other[0].replace('_', '-')} means nothing with --from-optimizer")
    check_alone("estimate-fisher --from-optimizer")
    from fishertool.commands.fisher_from_optimizer import fisher_from_optimizer as command

    values = context.params
    report = command(
        model,
        path,
        out,
        **{name: values[name] for name in taken},
        include=values["include"] or [],
        exclude=values["exclude"] or [],
        threads=thread_count(values["threads"]),
    )
    finish(report, values["as_json"], values["quiet"], values["report_file"])
