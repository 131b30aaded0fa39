"""Every flag that verbs have in common, declared once; and reading what was given."""

import os
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from fishertool.cli.printing import put
from fishertool.errors import StorageError, UsageError
from fishertool.paths import expanded
from fishertool.registry import find_method, method_names


def load_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make a YAML file's values the defaults of this command's flags, so that flags win."""
    if path is not None:
        from fishertool.recipe.document import read_document

        set_defaults(context, read_document(path), path)
    return path


def set_defaults(context: typer.Context, content: Any, path: Path) -> None:
    """Make the content of a file the defaults of this command's flags."""
    from fishertool.config import parse_config

    parameters = {
        flag_name(parameter): parameter
        for parameter in context.command.params
        if parameter.name not in ("config", "help")
    }
    several = {
        flag: getattr(parameter, "multiple", False) or parameter.nargs != 1
        for flag, parameter in parameters.items()
    }
    switches = [flag for flag, one in parameters.items() if getattr(one, "is_flag", False)]
    values = parse_config(content, path, several, switches)
    context.default_map = {str(parameters[flag].name): value for flag, value in values.items()}


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an argument is the user's, by flag or file, and not its default."""
    return context.get_parameter_source(name).name != "DEFAULT"  # type: ignore[union-attr]


def report_place(context: typer.Context, path: Path | None) -> Path | None:
    """Refuse, before any work, a report that could not be written after it."""
    if path is not None:
        path = expanded(path)
        there = next(parent for parent in path.absolute().parents if parent.exists())
        if path.is_dir() or not there.is_dir():
            raise UsageError(f"--report {path}: is no place for a file")
        from fishertool.checkpoint.staging import REPORT_FILE
        from fishertool.report import is_report

        if REPORT_FILE in (path.name, path.resolve().name):
            raise UsageError(
                f"--report {path}: is what an output's own report is called; choose another name"
            )
        if path.is_file() and path.stat().st_size and not is_report(path):
            raise UsageError(f"--report {path}: is there, and is no report; choose another name")
        if not os.access(path if path.exists() else there, os.W_OK):
            raise StorageError(f"--report {path}: no permission to write it")
        out = context.params.get("out")
        if isinstance(out, Path):
            _check_apart(path, out)
        else:  # of a verb that writes nothing
            _check_beside(path, out or context.params.get("path"))
    return path


def out_place(context: typer.Context, out: Path | None) -> Path | None:
    """The output's folder; it and the report are held against each other by which is read last."""
    if out is not None:
        out = expanded(out)
    _check_apart(context.params.get("report_file"), out)
    return out


def _check_apart(report: Path | None, out: Path | None) -> None:
    if report is not None and out is not None and report.resolve().is_relative_to(out.resolve()):
        raise UsageError(
            f"--report {report}: is in the output {out}, which has a report of its own; choose "
            "another place"
        )


def looked_at(context: typer.Context, source: str) -> str:
    """A folder or Hub id that is read and told of, and may have a report that nothing replaces."""
    _check_beside(context.params.get("report_file"), source)
    return source


def _check_beside(report: Path | None, source: str | None) -> None:
    if report is None or source is None:
        return
    if report.resolve().is_relative_to(expanded(source).resolve()):
        raise UsageError(
            f"--report {report}: is in {source}, which is only read; choose another place"
        )


def flag_name(parameter: Any) -> str:
    """The name a user types: `set` for the argument `settings`, `models` for a positional one."""
    flags = [flag for flag in parameter.opts if flag.startswith("--")]
    return str(flags[0][2:] if flags else parameter.name).replace("_", "-")


def data_options(context: typer.Context, source: str) -> Any:
    """The data flags of a verb, for one source; those it does not have at their defaults."""
    from fishertool.calibration import DataOptions

    names = [field.name for field in fields(DataOptions) if field.name in context.params]
    given = {name: context.params[name] for name in names}
    return DataOptions(**given | {"data": source})


def flags_of_data() -> set[str]:
    """Names of the arguments that say what is read from data; the seed has other uses too."""
    from fishertool.calibration import DataOptions

    return {field.name for field in fields(DataOptions)} - {"seed"}


def refuse(context: typer.Context, names: Collection[str], why: str) -> None:
    """Refuse arguments of these names where they are given, all in one line."""
    if unused := [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in names and is_given(context, parameter.name)
    ]:
        raise UsageError(f"{', '.join(unused)}: {why}")


def thread_count(threads: int | None) -> int:
    if threads is not None:
        return threads
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def option(*names: str, help: str = "", **more: Any) -> Any:  # noqa: A002
    """An option whose help shows its brackets, which are else taken for the markup of colours."""
    return typer.Option(*names, help=help.replace("[", r"\[") or None, **more)


def out_flag(help: str) -> Any:  # noqa: A002
    """`--out`, the folder that a verb writes."""
    return option("--out", help=help, callback=out_place)


def methods_flag(package: str) -> Any:
    """`--methods`, which lists a package's methods with their settings, and ends."""

    def show(wanted: bool) -> None:
        if not wanted:
            return
        for name in method_names(package):
            found = find_method(package, name)
            put(f"{name}  {found.summary}\n")
            for setting, default in found.settings.items():
                put(f"    --set {setting.removesuffix('_')}={default}\n")
        raise typer.Exit

    return option("--methods", is_eager=True, callback=show, help="List methods and settings.")


Model = Annotated[str, typer.Argument(help=r"Folder or Hub id (org/name\[@revision]).")]
Config = Annotated[
    Path | None,
    option(
        "--config",
        is_eager=True,
        callback=load_config,
        help="YAML file with flag names as keys; flags on the command line win.",
    ),
]
MethodSettings = Annotated[
    list[str] | None,
    option("--set", help="A setting of the method, as key=value; repeatable."),
]
Json = Annotated[bool, option("--json", help="Print the report as one JSON document.")]
Quiet = Annotated[bool, option("--quiet", "-q", help="Print only errors and warnings.")]
ReportFile = Annotated[
    Path | None, option("--report", callback=report_place, help="Also write the report here.")
]
Threads = Annotated[
    int | None, option("--threads", min=1, max=1024, help="CPU threads [default: all].")
]
Device = Annotated[str, option("--device", help="auto, cpu, cuda or cuda:N.")]
DryRun = Annotated[bool, option("--dry-run", help="Check and plan from headers; write nothing.")]
Overwrite = Annotated[bool, option("--overwrite", help="Replace an output written before.")]
Include = Annotated[
    list[str] | None, option("--include", help="Glob of tensor names to work on; repeatable.")
]
Exclude = Annotated[
    list[str] | None, option("--exclude", help="Glob of tensor names to leave alone; repeatable.")
]
MaxShardSize = Annotated[str, option("--max-shard-size", help="Largest output file.")]
AllowNonfinite = Annotated[
    bool, option("--allow-nonfinite", help="Take NaN and Inf in weights as they come.")
]
TrustRemoteCode = Annotated[
    bool, option("--trust-remote-code", help="Let the checkpoint's own code run.")
]
Task = Annotated[
    str,
    option(
        "--task",
        help="auto, sequence-classification, token-classification, masked-lm, causal-lm, "
        "sequence-to-sequence or embedding.",
    ),
]
BatchSize = Annotated[int, option("--batch-size", min=1, help="Results do not depend on it.")]
MicroBatchSize = Annotated[
    str,
    option("--batch-size", help="auto (by tokens) or a number; results do not depend on it."),
]
_DATA = option("--data", help="A json, jsonl, csv, tsv, parquet or txt file, or a Hub dataset.")
Data = Annotated[str, _DATA]
OptionalData = Annotated[str | None, _DATA]
Split = Annotated[str, option("--split", help="Split of a Hub dataset, e.g. train[:1000].")]
TextColumn = Annotated[str, option("--text-column")]
TextPairColumn = Annotated[
    str | None, option("--text-pair-column", help="The second text, where there are two.")
]
ChatColumn = Annotated[
    str | None,
    option("--chat-column", help="Conversations, rendered with the tokenizer's chat template."),
]
LabelColumn = Annotated[
    str, option("--label-column", help="Class names or ids; for words, a list of them.")
]
TargetColumn = Annotated[
    str | None,
    option("--target-column", help="What a text becomes, sequence to sequence [default: target]."),
]
QueryColumn = Annotated[str | None, option("--query-column", help="[default: query]")]
PositiveColumn = Annotated[
    str | None, option("--positive-column", help="The query's document [default: positive].")
]
NegativeColumn = Annotated[
    str | None,
    option(
        "--negative-column",
        help="A document or a list of them that is not the query's [default: negative, if there].",
    ),
]
InBatchNegatives = Annotated[
    int | None,
    option(
        "--in-batch-negatives",
        min=2,
        help="Queries that lend each other their documents [default: 8 without a negative column].",
    ),
]
Scale = Annotated[float | None, option("--scale", help="Of cosines of embeddings [default: 20].")]
ScoreColumn = Annotated[
    str | None,
    option(
        "--score-column",
        help="embedding: how much alike --text-column and --text-pair-column are, a number.",
    ),
]
MaskFraction = Annotated[
    float | None, option("--mask-fraction", help="Of tokens, for masked-lm [default: 0.15].")
]
MaskPrompt = Annotated[
    bool,
    option(
        "--mask-prompt",
        help="causal-lm: score the last assistant message of --chat-column, or the completion in "
        "--text-pair-column, alone.",
    ),
]
NumExamples = Annotated[int | None, option("--num-examples", min=1, help="[default: all]")]
MaxLength = Annotated[
    int | None,
    option("--max-length", min=2, help="Tokens a text [default: 512, or the model's limit]."),
]
Select = Annotated[
    str | None,
    option(
        "--select",
        help="Which --num-examples of the pool: random, or kmeans, the one nearest to each centre "
        "by the model's own embeddings [default: the first].",
    ),
]
SelectFrom = Annotated[
    int | None, option("--select-from", min=1, help="Rows in the pool of --select [default: all].")
]
Shuffle = Annotated[bool, option("--shuffle", help="Shuffle before --num-examples, by --seed.")]
Seed = Annotated[int, option("--seed", min=0, max=2**63 - 1)]
