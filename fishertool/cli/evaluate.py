"""`fishertool evaluate`."""

from typing import Annotated

import typer

from fishertool.cli.app import app
from fishertool.cli.flags import (
    BatchSize,
    ChatColumn,
    Config,
    Data,
    Device,
    InBatchNegatives,
    Json,
    LabelColumn,
    MaxLength,
    Model,
    NegativeColumn,
    NumExamples,
    PositiveColumn,
    QueryColumn,
    Quiet,
    ReportFile,
    Scale,
    ScoreColumn,
    Seed,
    Shuffle,
    Split,
    Task,
    TextColumn,
    TextPairColumn,
    Threads,
    TrustRemoteCode,
    data_options,
    option,
    thread_count,
)
from fishertool.cli.printing import finish, track_on_stderr
from fishertool.cli.values import limits


@app.command()
def evaluate(
    context: typer.Context,
    model: Model,
    data: Data,
    config: Config = None,
    against: Annotated[
        str | None,
        option(
            "--against",
            help="A second model: adds kl and top1_agreement, of embeddings mean_cosine.",
        ),
    ] = None,
    minimum: Annotated[
        list[str] | None, option("--min", help="Gate, as accuracy=0.9; repeatable.")
    ] = None,
    maximum: Annotated[
        list[str] | None, option("--max", help="Gate, as perplexity=20; repeatable.")
    ] = None,
    max_drop: Annotated[
        list[str] | None,
        option("--max-drop", help="Gate on how much worse than --against, as accuracy=0.01."),
    ] = None,
    max_kl: Annotated[
        float | None, option("--max-kl", help="Gate on the mean KL to --against.")
    ] = None,
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
    score_column: ScoreColumn = None,
    num_examples: NumExamples = None,
    max_length: MaxLength = None,
    batch_size: BatchSize = 8,
    shuffle: Shuffle = False,
    seed: Seed = 0,
    trust_remote_code: TrustRemoteCode = False,
    threads: Threads = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
    report_file: ReportFile = None,
) -> None:
    """Measure a model on data, alone or against another; exit 4 if a gate is not met.

    Example: fishertool evaluate ./merged --data test.jsonl --against ./model --max-drop accuracy=0.01
    """
    from fishertool.commands.evaluate import evaluate as command

    options = data_options(context, data)
    report = command(
        model,
        options,
        against=against,
        task=task,
        batch_size=batch_size,
        minimum=limits("--min", minimum),
        maximum=limits("--max", maximum),
        max_drop=limits("--max-drop", max_drop),
        max_kl=max_kl,
        threads=thread_count(threads),
        device=device,
        trust_remote_code=trust_remote_code,
        track=track_on_stderr(quiet),
    )
    finish(report, as_json, quiet, report_file)
