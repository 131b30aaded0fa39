"""The model card (README.md) of a published output, made of its report."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import yaml

from fishertool.plugin import is_low_rank

HEADS = {
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "ForConditionalGeneration": ("AutoModelForSeq2SeqLM", None),
    "MTModel": ("AutoModelForSeq2SeqLM", "translation"),
}
"""How names of architectures end, the class that loads them, and the Hub's word for their task."""
WHAT = {
    "merge": "A merge of {models}",
    "prune": "{models}, pruned",
    "factorize": "{models}, its linear layers factorized",
    "densify": "The dense form of the low-rank {models}",
    "estimate-fisher": "A Fisher sidecar of {models}: how much its predictions depend on each weight",
    "combine-fisher": "A Fisher sidecar, put together of parts",
}
RELATION = {"merge": "merge"}
"""The Hub has adapter, merge, quantized and finetune for how a model comes of its bases; a pruned or
factorized one is nearest to the last."""
NOT_REBUILT = ("out", "dry_run", "batch_size", "recipe", "set", "predict")
DATA = ("data", "evaluate_on", "finetune")
NEEDS = {"recover_learning_rate": "recover_steps"}
"""Options that are refused without another."""


@dataclass(frozen=True)
class Subject:
    """What is published, besides its report."""

    repo: str
    kind: str
    """model, sentence-transformers, adapter or sidecar."""
    config: Mapping[str, Any]
    """config.json, or of an adapter adapter_config.json."""
    license: str | None = None


def model_card(subject: Subject, report: Mapping[str, Any] | None) -> str:
    """Front matter for the Hub, what was done, with what, how it came out, loading and rebuilding.

    Of the report it takes ids, options and figures, which name no folder of any machine. Pure.
    """
    report = report or {}
    name = subject.repo.rpartition("/")[2]
    parts = [
        f"---\n{_front_matter(subject, report)}\n---\n\n# {name}\n",
        f"{_what(report)}\n",
        *_section("Inputs", _inputs(report)),
        *_section("Results", _results(report)),
        *_section("Use", _use(subject)),
        *_section("How to make it again", _again(report)),
    ]
    return "\n".join(parts)


def _front_matter(subject: Subject, report: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    command, sidecar = report.get("command"), subject.kind == "sidecar"
    bases = [] if sidecar else list(dict.fromkeys(_hub_ids(report)))
    relation = "adapter" if subject.kind == "adapter" else RELATION.get(str(command), "finetune")
    library = {"model": "transformers", "adapter": "peft", "sidecar": "fishertool"}
    method = _summary(report).get("method")
    tags = ["fishertool", command, method, "fisher-information" if sidecar else None]
    data = ModelCardData(
        base_model=bases or None,
        base_model_relation=relation if bases else None,
        license=subject.license,
        library_name=library.get(subject.kind, subject.kind),
        pipeline_tag=_task(subject),
        tags=list(dict.fromkeys(str(tag) for tag in tags if tag)),
    )
    return str(data.to_yaml())


def _task(subject: Subject) -> str | None:
    if subject.kind == "sentence-transformers":
        return "sentence-similarity"
    return None if subject.kind == "sidecar" else _head(subject.config)[1]


def _head(config: Mapping[str, Any]) -> tuple[str, str | None]:
    for architecture in config.get("architectures") or ():
        for ending, head in HEADS.items():
            if str(architecture).endswith(ending):
                return head
    return "AutoModel", None


def _hub_ids(report: Mapping[str, Any]) -> Iterator[str]:
    """Of the models it was made of, the base first."""
    for role in ("base", "model", "adapter"):
        for one in _of_role(report, role):
            if "/" in one["id"]:
                yield one["id"].partition("@")[0]


def _what(report: Mapping[str, Any]) -> str:
    if not report:
        return "How it was made is not recorded."
    models = _join(f"`{one['id']}`" for one in _of_role(report, "model"))
    told = WHAT.get(report["command"], "An output").format(models=models)
    if base := _join(f"`{one['id']}`" for one in _of_role(report, "base")):
        told += f" (base: {base})"
    if method := _summary(report).get("method"):
        told += f", by the method `{method}`"
    version = (report.get("environment") or {}).get("versions", {}).get("fishertool")
    return f"{told}. Made by `fishertool {report['command']}`, version {version}."


def _inputs(report: Mapping[str, Any]) -> list[str]:
    rows = []
    for one in report.get("inputs") or ():
        files = one["files"]
        sha256 = f"`{files[0]['sha256']}`" if len(files) == 1 else f"{len(files)} files"
        size = sum(file["bytes"] for file in files)
        rows.append([one["role"], f"`{one['id']}`", f"{size:,}", sha256])
    told = _table(["role", "id", "bytes", "SHA-256"], rows)
    if calibration := report.get("calibration"):
        told += [
            "",
            f"Calibration: {_show(calibration.get('examples'))} examples, "
            f"{_show(calibration.get('tokens'))} tokens.",
        ]
    return told


def _results(report: Mapping[str, Any]) -> list[str]:
    evaluation = report.get("evaluation") or {}
    after, before = evaluation.get("metrics") or {}, evaluation.get("against") or {}
    told = [
        [name, _show(before.get(name)), _show(value)]
        for name, value in after.items()
        if _is_figure(value)
    ]
    figures = [
        [name, _show(value)] for name, value in _summary(report).items() if _is_figure(value)
    ]
    tables = [_table(["", "value"], figures)]
    if told and before:
        tables.insert(0, _table(["on the evaluation's data", "before", "after"], told))
    elif told:
        rows = [[name, value] for name, _, value in told]
        tables.insert(0, _table(["on the evaluation's data", "value"], rows))
    return [line for table in tables if table for line in (*table, "")][:-1]


def _use(subject: Subject) -> list[str]:
    repo, low_rank = subject.repo, is_low_rank(subject.config)
    needed = ["import fishertool  # teaches transformers the low-rank layers"] if low_rank else []
    if subject.kind == "sidecar":
        return ["```bash", f"fishertool merge MODEL ... --fisher {repo} ... --out OUT", "```"]
    if subject.kind == "sentence-transformers":
        code = [
            "from sentence_transformers import SentenceTransformer",
            "",
            f'model = SentenceTransformer("{repo}")',
        ]
    elif subject.kind == "adapter":
        base = _named(subject.config.get("base_model_name_or_path"))
        code = [
            "from peft import PeftModel",
            "",
            f'model = PeftModel.from_pretrained(base, "{repo}")  # base: the model {base}, loaded',
        ]
    else:
        loader = _head(subject.config)[0]
        code = [
            f"from transformers import {loader}",
            "",
            f'model = {loader}.from_pretrained("{repo}")',
        ]
    return ["```python", *needed, *code, "```"]


def _named(base: Any) -> str:
    """A Hub id; of a folder its own name."""
    name = str(base)
    return PurePath(name).name if name.startswith(("/", "~", ".")) else name


def _again(report: Mapping[str, Any]) -> list[str]:
    """A file and a command line; names of inputs are those of the table."""
    if not report:
        return []
    options, command = report.get("options") or {}, report["command"]
    recipe = options.get("recipe")
    content = recipe if recipe is not None else _flags(options)
    line = f"fishertool {command} --config again.yml --out OUT"
    if command in ("densify", "combine-fisher"):  # all that they are given has its place
        content, line = None, f"fishertool {command} {_places(report)} OUT"
        line = line.replace(" OUT", " --out OUT") if command == "combine-fisher" else line
    elif recipe is not None:
        line += "".join(f" {flag}" for flag in _merge_flags(options, _summary(report)))
    told = ["```bash", line, "```"]
    if content:
        told = [
            "`again.yml`:",
            "",
            "```yaml",
            *yaml.safe_dump(content, sort_keys=False, width=100).rstrip().splitlines(),
            "```",
            "",
            *told,
        ]
    told += ["", "All options and digests are in `fishertool_report.json`."]
    return told


def _places(report: Mapping[str, Any]) -> str:
    return " ".join(one["id"] for one in report.get("inputs") or () if one["role"] != "data")


def _merge_flags(options: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterator[str]:
    """What a merge was given beside its recipe; weights that were searched for, as found."""
    weights = summary.get("weights") if options.get("search_weights") else options.get("weights")
    if isinstance(weights, Sequence) and not isinstance(weights, str):
        weights = ",".join(map(repr, weights))
    if weights is not None:
        yield f"--weights={weights}"
    for name in ("as_lora", "max_shard_size", "allow_nonfinite", "trust_remote_code"):
        value = options.get(name)
        if value not in (None, False, "5GB"):
            yield f"--{_flag(name)}" if value is True else f"--{_flag(name)} {value}"


def _flags(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as `--config` takes them: those that say something, by the names of their flags."""
    flags: dict[str, Any] = {}
    for name, value in options.items():
        if name in DATA and isinstance(value, Mapping):
            given = {key: one for key, one in value.items() if key != "data"}
            flags |= _flags(given) | {_flag(name): value.get("data")}
        elif name == "settings":
            if effective := options.get("set") or value:
                flags["set"] = [f"{key}={one}" for key, one in effective.items()]
        elif name in NEEDS and not options.get(NEEDS[name]):
            continue
        elif name not in NOT_REBUILT and value not in (None, False, "", [], {}):
            flags[_flag(name)] = value
    return flags


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _section(title: str, lines: list[str]) -> list[str]:
    return [f"## {title}\n", "\n".join(lines) + "\n"] if lines else []


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines]


def _of_role(report: Mapping[str, Any], role: str) -> list[Mapping[str, Any]]:
    return [one for one in report.get("inputs") or () if one["role"] == role]


def _summary(report: Mapping[str, Any]) -> Mapping[str, Any]:
    return report.get("summary") or {}


def _is_figure(value: Any) -> bool:
    if isinstance(value, list):
        return 0 < len(value) <= 8 and all(isinstance(one, int | float) for one in value)
    return isinstance(value, str | int | float) and not isinstance(value, bool) and value != ""


def _show(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_show, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _join(names: Iterable[str]) -> str:
    *first, last = list(names) or [""]
    return f"{', '.join(first)} and {last}" if first else last
