"""The command line: flags, help, printing, exit codes. Commands are imported when they run."""

import atexit
import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from fishertool import __version__
from fishertool.errors import FishertoolError, GateError, UsageError
from fishertool.memory import keep_freed_memory
from fishertool.registry import find_method, method_names

MERGE_METHODS = "fishertool.merging"
INTERRUPTED, TERMINATED, BUG, IO_FAILURE = 130, 143, 1, 5

app = typer.Typer(
    help="Fisher-guided surgery on Hugging Face checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Terminated(BaseException):
    """SIGTERM, raised so that what is half-written is removed on the way out."""


def run() -> NoReturn:
    """The process's whole life. It ends without taking the interpreter down, which is 0.3 s of
    freeing what torch holds; everything written is on disk by then."""
    code = main(sys.argv[1:])
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def main(arguments: list[str]) -> int:
    """Run one command line and return its exit code; see fishertool.errors for the codes."""
    previous = signal.signal(signal.SIGTERM, _terminate)
    keep_freed_memory()
    try:
        code = app(arguments, prog_name="fishertool", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was written", INTERRUPTED)
    except Terminated:
        return _fail("terminated; nothing was written", TERMINATED)
    except FishertoolError as error:
        return _fail(str(error), error.exit_code)
    except MemoryError:
        return _fail("out of memory; lower --batch-size or --threads", IO_FAILURE)
    except OSError as error:
        if error.errno == errno.EPIPE:  # whoever read stdout has left; say no more into it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return IO_FAILURE
        where = f"{error.filename}: " if error.filename else ""
        full = "; free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return _fail(f"{where}{error.strerror or error}{full}", IO_FAILURE)
    except Exception as error:  # the boundary: nothing below knows how to tell a user
        if hasattr(error, "format_message"):  # a usage error of the command-line parser
            return _fail(f"{error.format_message()} (see --help)", UsageError.exit_code)
        return _fail(
            f"a bug in fishertool, please report it: {type(error).__name__}: {error} "
            "(FISHERTOOL_DEBUG=1 shows where)",
            BUG,
        )
    finally:
        signal.signal(signal.SIGTERM, previous)


def _fail(message: str, code: int) -> int:
    if os.environ.get("FISHERTOOL_DEBUG") == "1":
        traceback.print_exc()
    print(f"fishertool: {' '.join(message.split())}", file=sys.stderr)
    return code


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _load_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make a YAML file's values the defaults of this command's flags, so that flags win."""
    if path is not None:
        from fishertool.config import read_config

        parameters = {
            _flag_name(parameter): parameter
            for parameter in context.command.params
            if parameter.name not in ("config", "help")
        }
        several = {
            flag: getattr(parameter, "multiple", False) or parameter.nargs != 1
            for flag, parameter in parameters.items()
        }
        values = read_config(path, several)
        context.default_map = {str(parameters[flag].name): value for flag, value in values.items()}
    return path


def _flag_name(parameter: Any) -> str:
    """The name a user types: `set` for the argument `settings`, `models` for a positional one."""
    flags = [flag for flag in parameter.opts if flag.startswith("--")]
    return str(flags[0][2:] if flags else parameter.name).replace("_", "-")


def _pairs(flag: str, given: list[str] | None) -> dict[str, str]:
    """key=value flags as a dict."""
    pairs: dict[str, str] = {}
    for item in given or []:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise UsageError(f"{flag} {item!r}: write key=value")
        pairs[key.strip()] = value.strip()
    return pairs


def _limits(flag: str, given: list[str] | None) -> dict[str, float]:
    return {name: _number(f"{flag} {name}", value) for name, value in _pairs(flag, given).items()}


def _number(where: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{where}: {text!r} is not a number") from None


@contextlib.contextmanager
def _importing(sources: Iterable[str], threads: int | None, dry_run: bool) -> Iterator[None]:
    """Around the import of a command: importing torch takes seconds and one core of several."""
    folders = [Path(source) for source in sources if not dry_run and _threads(threads) > 1]
    if not any(map(Path.is_dir, folders)):
        yield
        return
    from fishertool.checkpoint.digest import head_start

    with head_start(folders):
        yield


def _threads(threads: int | None) -> int:
    if threads is not None:
        return threads
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _finish(report: Any, as_json: bool, quiet: bool, report_file: Path | None) -> None:
    """Print the report, write it where asked, and fail if a gate is not met."""
    for warning in report.warnings:
        print(f"fishertool: warning: {warning}", file=sys.stderr)
    text = report.to_json()
    if report_file is not None:
        report_file.write_text(text, encoding="utf-8")
    if as_json:
        sys.stdout.write(text)
    elif not quiet:
        _print_table(report)
    if unmet := [gate for gate in (report.evaluation or {}).get("gates", []) if not gate["met"]]:
        told = ", ".join(
            f"{gate['metric']} {gate['rule'].replace('_', '-')} {gate['limit']:g} "
            f"(is {gate['value']:.6g})"
            for gate in unmet
        )
        raise GateError(f"quality gate not met: {told}")


def _print_table(report: Any) -> None:
    rows = list(_flatten(report.summary))
    width = max((len(name) for name, _ in rows), default=0)
    against = (report.evaluation or {}).get("against") or {}
    for name, value in rows:
        other = f"  (against: {_show(against[name])})" if name in against else ""
        print(f"{name:<{width}}  {_show(value)}{other}")
    for name, value in ((report.evaluation or {}).get("metrics") or {}).items():
        print(f"{name:<{width}}  {_show(value)}")


def _flatten(summary: Mapping[str, Any], prefix: str = "") -> Any:
    for name, value in summary.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        elif value not in ([], None):
            yield f"{prefix}{name}", value


def _show(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_show, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _track(quiet: bool) -> Any:
    from fishertool import progress

    return progress.for_stderr(quiet)


def _list_methods(show: bool) -> None:
    if not show:
        return
    for name in method_names(MERGE_METHODS):
        found = find_method(MERGE_METHODS, name)
        print(f"{name}  {found.summary}")
        for setting, default in found.settings.items():
            print(f"    --set {setting}={default}")
    raise typer.Exit


def _show_version(show: bool) -> None:
    if show:
        print(f"fishertool {__version__}")
        raise typer.Exit


def _option(*names: str, **more: Any) -> Any:
    return typer.Option(*names, **more)


Config = Annotated[
    Path | None,
    _option(
        "--config",
        is_eager=True,
        callback=_load_config,
        help="YAML file with flag names as keys; flags on the command line win.",
    ),
]
Json = Annotated[bool, _option("--json", help="Print the report as one JSON document.")]
Quiet = Annotated[bool, _option("--quiet", "-q", help="Print only errors and warnings.")]
ReportFile = Annotated[Path | None, _option("--report", help="Also write the report here.")]
Threads = Annotated[int | None, _option("--threads", min=1, help="CPU threads [default: all].")]
Device = Annotated[str, _option("--device", help="auto, cpu, cuda or cuda:N.")]
DryRun = Annotated[bool, _option("--dry-run", help="Check and plan from headers; write nothing.")]
Overwrite = Annotated[bool, _option("--overwrite", help="Replace an output written before.")]
Include = Annotated[
    list[str] | None, _option("--include", help="Glob of tensor names to work on; repeatable.")
]
Exclude = Annotated[
    list[str] | None, _option("--exclude", help="Glob of tensor names to leave alone; repeatable.")
]
MaxShardSize = Annotated[str, _option("--max-shard-size", help="Largest output file.")]
AllowNonfinite = Annotated[
    bool, _option("--allow-nonfinite", help="Take NaN and Inf in weights as they come.")
]
TrustRemoteCode = Annotated[
    bool, _option("--trust-remote-code", help="Let the checkpoint's own code run.")
]
Task = Annotated[
    str,
    _option(
        "--task",
        help="auto, sequence-classification, token-classification, masked-lm, causal-lm, "
        "sequence-to-sequence or embedding.",
    ),
]
BatchSize = Annotated[int, _option("--batch-size", min=1, help="Results do not depend on it.")]
MicroBatchSize = Annotated[
    str,
    _option("--batch-size", help="auto (by tokens) or a number; results do not depend on it."),
]
_DATA = _option("--data", help="A json, jsonl, csv, tsv, parquet or txt file, or a Hub dataset.")
Data = Annotated[str, _DATA]
OptionalData = Annotated[str | None, _DATA]
Split = Annotated[str, _option("--split", help="Split of a Hub dataset, e.g. train[:1000].")]
TextColumn = Annotated[str, _option("--text-column")]
TextPairColumn = Annotated[
    str | None, _option("--text-pair-column", help="The second text, where there are two.")
]
ChatColumn = Annotated[
    str | None,
    _option("--chat-column", help="Conversations, rendered with the tokenizer's chat template."),
]
LabelColumn = Annotated[
    str, _option("--label-column", help="Class names or ids; for words, a list of them.")
]
TargetColumn = Annotated[
    str | None,
    _option("--target-column", help="What a text becomes, sequence to sequence [default: target]."),
]
QueryColumn = Annotated[str | None, _option("--query-column", help="[default: query]")]
PositiveColumn = Annotated[
    str | None, _option("--positive-column", help="The query's document [default: positive].")
]
NegativeColumn = Annotated[
    str | None,
    _option(
        "--negative-column",
        help="A document or a list of them that is not the query's [default: negative, if there].",
    ),
]
InBatchNegatives = Annotated[
    int | None,
    _option(
        "--in-batch-negatives",
        min=2,
        help="Queries that lend each other their documents [default: 8 without a negative column].",
    ),
]
Scale = Annotated[float | None, _option("--scale", help="Of cosines of embeddings [default: 20].")]
MaskFraction = Annotated[
    float | None, _option("--mask-fraction", help="Of tokens, for masked-lm [default: 0.15].")
]
MaskPrompt = Annotated[
    bool,
    _option(
        "--mask-prompt",
        help="causal-lm: score the last assistant message of --chat-column, or the completion in "
        "--text-pair-column, alone.",
    ),
]
NumExamples = Annotated[int | None, _option("--num-examples", min=1, help="[default: all]")]
MaxLength = Annotated[
    int | None,
    _option("--max-length", min=2, help="Tokens a text [default: 512, or the model's limit]."),
]
Shuffle = Annotated[bool, _option("--shuffle", help="Shuffle before --num-examples, by --seed.")]
Seed = Annotated[int, _option("--seed", min=0)]


@app.callback()
def _root(
    version: Annotated[
        bool, _option("--version", is_eager=True, callback=_show_version, help="Show the version.")
    ] = False,
) -> None:
    """Fisher-guided surgery on Hugging Face checkpoints."""


@app.command("estimate-fisher")
def estimate_fisher(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or Hub id (org/name[@revision]).")],
    out: Annotated[Path, _option("--out", help="Folder to write the sidecar to.")],
    data: OptionalData = None,
    config: Config = None,
    kind: Annotated[
        str,
        _option(
            "--kind",
            help="diagonal, factored, kronecker, activation, rank-one; several with commas.",
        ),
    ] = "diagonal",
    labels: Annotated[
        str,
        _option(
            "--labels",
            help="empirical: the data's; sampled: drawn from the model; expected: exact mean over "
            "classes; expected-signed: its estimate by random signs, for any vocabulary; auto: "
            "expected for up to 8 classes, else sampled; empirical for text and queries.",
        ),
    ] = "auto",
    draws: Annotated[
        int, _option("--draws", min=1, help="Draws per prediction, of labels or signs.")
    ] = 1,
    max_classes: Annotated[
        int, _option("--max-classes", min=2, help="The most classes for --labels expected.")
    ] = 64,
    estimator: Annotated[
        str,
        _option(
            "--estimator",
            help="exact: every example's gradient by itself; signed: one backward pass a batch "
            "with random signs, unbiased, for models that exact cannot serve.",
        ),
    ] = "exact",
    until_relative_error: Annotated[
        float | None,
        _option(
            "--until-relative-error",
            min=0.0,
            help="Take examples in random order, and stop when every tensor's summed Fisher is "
            "known this well (as a standard error).",
        ),
    ] = None,
    skip_nonfinite: Annotated[
        bool,
        _option(
            "--skip-nonfinite", help="Leave out, and count, examples whose loss is not finite."
        ),
    ] = False,
    group: Annotated[
        int,
        _option("--group", min=1, help="Examples whose mean is one gradient of a rank-one bank."),
    ] = 1,
    bank_dtype: Annotated[
        str, _option("--bank-dtype", help="Of a rank-one bank: bfloat16 or float32.")
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
    max_length: MaxLength = None,
    batch_size: MicroBatchSize = "auto",
    adapter: Annotated[
        str | None, _option("--adapter", help="A LoRA adapter on the model: folder or Hub id.")
    ] = None,
    adapter_fisher: Annotated[
        str,
        _option(
            "--adapter-fisher",
            help="Of what, with --adapter: merged, the model's weights with it; adapter, its own.",
        ),
    ] = "merged",
    shuffle: Shuffle = False,
    seed: Seed = 0,
    from_optimizer: Annotated[
        Path | None,
        _option(
            "--from-optimizer",
            help="In place of --data: Adam's second moments (a saved optimizer or safetensors).",
        ),
    ] = None,
    part: Annotated[
        str | None,
        _option("--part", help="i/n: write the i-th of n partial results, for combine-fisher."),
    ] = None,
    world_size: Annotated[
        int | None,
        _option("--world-size", min=1, help="Fail unless so many processes run (torchrun)."),
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        _option("--checkpoint-every", min=1, help="Save the sums after every so many examples."),
    ] = None,
    resume: Annotated[
        bool, _option("--resume", help="Go on where a killed run last saved, if there was one.")
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
    """Measure how much a model's predictions depend on each weight.

    Example: fishertool estimate-fisher ./model --data texts.jsonl --out ./model-fisher
    """
    from fishertool.calibration import DataOptions

    if from_optimizer is not None:
        _estimate_from_optimizer(context, model, from_optimizer, out)
        return
    if data is None:
        raise UsageError("estimate-fisher needs --data, or --from-optimizer")
    with _importing([model], threads, dry_run):
        from fishertool.commands.estimate_fisher import estimate_fisher as command
        from fishertool.estimation.settings import Settings

    options = DataOptions(
        data, split, text_column, text_pair_column, chat_column, label_column,
        num_examples, max_length, shuffle, seed, target_column, query_column, positive_column,
        negative_column, mask_prompt, mask_fraction, scale, in_batch_negatives,
    )  # fmt: skip
    report = command(
        model,
        options,
        out,
        settings=Settings(
            kind, labels, draws, max_classes, estimator, group, bank_dtype,
            until_relative_error, skip_nonfinite, batch_size,
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
        threads=_threads(threads),
        device=device,
        track=_track(quiet),
    )  # fmt: skip
    if report is not None:
        _finish(report, as_json, quiet, report_file)


def _estimate_from_optimizer(context: typer.Context, model: str, path: Path, out: Path) -> None:
    """The flags that mean something without data; any other is refused."""
    taken = "kind", "task", "max_shard_size", "overwrite", "dry_run", "trust_remote_code"
    shown = "as_json", "quiet", "report_file", "threads", "device", "include", "exclude", "config"
    given = {
        name: value
        for name, value in context.params.items()
        if context.get_parameter_source(name).name != "DEFAULT"  # type: ignore[union-attr]
    }
    known = {"model", "out", "from_optimizer", *taken, *shown}
    if other := sorted(given.keys() - known):
        raise UsageError(f"--{other[0].replace('_', '-')} means nothing with --from-optimizer")
    from fishertool.commands.fisher_from_optimizer import fisher_from_optimizer as command

    values = context.params
    report = command(
        model,
        path,
        out,
        **{name: values[name] for name in taken},
        include=values["include"] or [],
        exclude=values["exclude"] or [],
        threads=_threads(values["threads"]),
    )
    _finish(report, values["as_json"], values["quiet"], values["report_file"])


@app.command("combine-fisher")
def combine_fisher(
    parts: Annotated[
        list[Path], typer.Argument(help="Folders that estimate-fisher --part wrote, all n of n.")
    ],
    out: Annotated[Path, _option("--out", help="Folder to write the sidecar to.")],
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
        track=_track(quiet),
    )
    _finish(report, as_json, quiet, report_file)


@app.command()
def merge(
    models: Annotated[list[str], typer.Argument(help="Two or more folders or Hub ids.")],
    out: Annotated[Path, _option("--out", help="Folder to write the merged checkpoint to.")],
    config: Config = None,
    method: Annotated[str, _option("--method", help="linear or fisher; see --methods.")] = "linear",
    methods: Annotated[
        bool,
        _option(
            "--methods", is_eager=True, callback=_list_methods, help="List methods and settings."
        ),
    ] = False,
    weights: Annotated[
        str | None, _option("--weights", help="One a model, as 0.6,0.4 [default: equal].")
    ] = None,
    fisher: Annotated[
        list[str] | None,
        _option("--fisher", help="A sidecar a model, in the models' order; repeatable."),
    ] = None,
    base: Annotated[str | None, _option("--base", help="The models' common ancestor.")] = None,
    anchor: Annotated[
        float | None,
        _option("--anchor", help="fisher: how many average weights --base counts for."),
    ] = None,
    power: Annotated[float | None, _option("--power", help="fisher: weight by F ** power.")] = None,
    preset: Annotated[
        str | None,
        _option("--preset", help="matena: the options of the Fisher merging paper's code."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        _option("--set", help="A setting of the method, as key=value; repeatable."),
    ] = None,
    head: Annotated[
        str | None,
        _option(
            "--head",
            help="error: refuse heads that differ; merge: merge them whatever their class names; "
            "keep-first: take the first model's. [default: error]",
        ),
    ] = None,
    search_weights: Annotated[
        str | None,
        _option("--search-weights", help="grid (2 models) or dirichlet: try many, keep the best."),
    ] = None,
    search_points: Annotated[
        int, _option("--search-points", min=1, help="How many weights to try.")
    ] = 51,
    metric: Annotated[
        str | None, _option("--metric", help="What is best [default: accuracy, or loss for text].")
    ] = None,
    evaluate_on: Annotated[
        str | None, _option("--evaluate-on", help="Data to measure the merge on, and to search by.")
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

    with _importing([*models, *([base] if base else []), *(fisher or [])], threads, dry_run):
        from fishertool.commands.merge import merge as command

    chosen: dict[str, Any] = dict(_pairs("--set", settings))
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
            _number("--weights", item) for item in weights.split(",")
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
        threads=_threads(threads),
        device=device,
        track=_track(quiet),
    )  # fmt: skip
    _finish(report, as_json, quiet, report_file)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id (org/name[@revision]).")],
    data: Data,
    config: Config = None,
    against: Annotated[
        str | None, _option("--against", help="A second model: adds kl and top1_agreement.")
    ] = None,
    minimum: Annotated[
        list[str] | None, _option("--min", help="Gate, as accuracy=0.9; repeatable.")
    ] = None,
    maximum: Annotated[
        list[str] | None, _option("--max", help="Gate, as perplexity=20; repeatable.")
    ] = None,
    max_drop: Annotated[
        list[str] | None,
        _option("--max-drop", help="Gate on how much worse than --against, as accuracy=0.01."),
    ] = None,
    max_kl: Annotated[
        float | None, _option("--max-kl", help="Gate on the mean KL to --against.")
    ] = None,
    task: Task = "auto",
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
    from fishertool.calibration import DataOptions
    from fishertool.commands.evaluate import evaluate as command

    options = DataOptions(
        data, split, text_column, text_pair_column, chat_column, label_column,
        num_examples, max_length, shuffle, seed,
    )  # fmt: skip
    report = command(
        model,
        options,
        against=against,
        task=task,
        batch_size=batch_size,
        minimum=_limits("--min", minimum),
        maximum=_limits("--max", maximum),
        max_drop=_limits("--max-drop", max_drop),
        max_kl=max_kl,
        threads=_threads(threads),
        device=device,
        trust_remote_code=trust_remote_code,
        track=_track(quiet),
    )
    _finish(report, as_json, quiet, report_file)
