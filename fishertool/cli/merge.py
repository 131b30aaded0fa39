"""`fishertool merge`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    flag_name,
    importing,
    load_config,
    number,
    option,
    pairs,
    thread_count,
)
from fishertool.cli.printing import finish, track_on_stderr
from fishertool.errors import UsageError
from fishertool.registry import find_method, method_names

if TYPE_CHECKING:
    from fishertool.recipe.schema import Recipe

MERGE_METHODS = "fishertool.merging"
SAID_BY_A_RECIPE = (
    "models", "method", "fisher", "base", "anchor", "power", "preset", "settings", "head",
    "tokenizer", "include", "exclude",
)  # fmt: skip


def _list_methods(show: bool) -> None:
    if not show:
        return
    for name in method_names(MERGE_METHODS):
        found = find_method(MERGE_METHODS, name)
        print(f"{name}  {found.summary}")
        for setting, default in found.settings.items():
            print(f"    --set {setting.removesuffix('_')}={default}")
    raise typer.Exit


def _load(context: typer.Context, path: Path | None) -> Path | None:
    """A recipe is read later; a file of flags gives their defaults."""
    if path is not None:
        from fishertool.recipe.document import read_document
        from fishertool.recipe.schema import is_recipe

        if not is_recipe(read_document(path)):
            load_config(context, path)
    return path


@app.command()
def merge(
    context: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Folders or Hub ids, as ID@REVISION too; with a LoRA, BASE+ADAPTER."),
    ] = None,
    out: Annotated[
        Path | None, option("--out", help="Folder to write the merged checkpoint to.")
    ] = None,
    config: Annotated[
        Path | None,
        option(
            "--config",
            is_eager=True,
            callback=_load,
            help="A recipe, as mergekit's or with what is ours; or flag names as keys.",
        ),
    ] = None,
    print_config: Annotated[
        bool, option("--print-config", help="Print the merge as a recipe, and do nothing.")
    ] = False,
    method: Annotated[str, option("--method", help="See --methods.")] = "linear",
    methods: Annotated[
        bool,
        option(
            "--methods", is_eager=True, callback=_list_methods, help="List methods and settings."
        ),
    ] = False,
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
    from fishertool.calibration import DataOptions

    recipe = _recipe(context, config)
    if print_config:
        from fishertool.recipe.inputs import normalised
        from fishertool.recipe.write import to_yaml

        print(to_yaml(normalised(recipe, find_method(MERGE_METHODS, recipe.method))), end="")
        return
    if out is None:
        raise UsageError("--out is missing: the folder to write to")
    with importing(recipe.reads, threads, dry_run):
        from fishertool.commands.merge import merge as command

    options = None
    if evaluate_on is not None:
        options = DataOptions(
            evaluate_on, split, text_column, text_pair_column, chat_column, label_column,
            num_examples, max_length, shuffle, seed,
        )  # fmt: skip
    report = command(
        recipe,
        out,
        weights=_weights(weights),
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


def _weights(given: str | None) -> list[float] | str | None:
    if given is None or given in ("optimal", "optimal-free"):
        return given
    return [number("--weights", item) for item in given.split(",")]


def _recipe(context: typer.Context, config: Path | None) -> "Recipe":
    """What is to be merged: the file's recipe, or one of the flags."""
    from fishertool.recipe.document import read_document
    from fishertool.recipe.flags import from_flags
    from fishertool.recipe.schema import is_recipe, parse_recipe

    flags = context.params
    content = None if config is None else read_document(config)
    if is_recipe(content):
        _refuse_flags_of_a_recipe(context, config)
        recipe = parse_recipe(content, str(config))
        if _is_given(context, "seed"):
            recipe = replace(recipe, seed=flags["seed"])
    else:
        recipe = from_flags(
            flags["models"] or [],
            flags["method"],
            fisher=flags["fisher"] or [],
            base=flags["base"],
            head=flags["head"],
            settings=_settings(flags),
            preset=flags["preset"],
            tokenizer=flags["tokenizer"],
            include=flags["include"] or [],
            exclude=flags["exclude"] or [],
            seed=flags["seed"],
        )
    if flags["dtype"] is not None:
        recipe = replace(recipe, dtype=flags["dtype"])
    return recipe


def _settings(flags: dict[str, Any]) -> dict[str, Any]:
    chosen: dict[str, Any] = dict(pairs("--set", flags["settings"]))
    for name in ("anchor", "power", "trim"):
        if flags[name] is not None:
            if name in chosen:
                raise UsageError(f"--{name} and --set {name} say it twice")
            chosen[name] = flags[name]
    return chosen


def _is_given(context: typer.Context, name: str) -> bool:
    return context.get_parameter_source(name).name != "DEFAULT"  # type: ignore[union-attr]


def _refuse_flags_of_a_recipe(context: typer.Context, config: Path | None) -> None:
    for parameter in context.command.params:
        if parameter.name in SAID_BY_A_RECIPE and _is_given(context, parameter.name):
            raise UsageError(
                f"{flag_name(parameter)}: the recipe {config} says what is merged; change it there"
            )
