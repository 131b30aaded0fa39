"""What each factorization method costs in quality: KL to the original, loss, accuracy or perplexity.

    python scripts/bench/factorize_quality.py FOLDER [--cases classifier,lm] [--seeds 0,1,2]
        [--keeps 0.7,0.5,0.3] [--methods ...] [--threads 1]

Every seed trains a model anew (kept in FOLDER for the next run). The Fisher is of 512 training
texts; `auto` picks the allocation on validation texts; all figures are of test texts, which neither
saw. Nothing is retrained after factorizing. One JSON line a result, in FOLDER/quality.jsonl, and a
Markdown table of means over seeds on stdout.
"""

import argparse
import json
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import transformers
from factorize_cases import CASES
from torch import Tensor, nn

from fishertool.calibration import DataOptions
from fishertool.commands.estimate_fisher import estimate_fisher
from fishertool.estimation.settings import Settings
from fishertool.registry import FACTORIZATION, find_method
from fishertool.searching.ranks import OriginalsJudge, best_allocation
from fishertool.surgery.factorize_plan import Refined, plan_factorize
from fishertool.surgery.factorize_ranks import Budget
from fishertool.surgery.factorize_terms import KeptTerms, decompose_all
from fishertool.surgery.factorize_write import factorized_rows

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "svd": ("svd", {}),
    "asvd": ("asvd", {}),
    "fwsvd": ("fwsvd", {}),
    "fwsvd both": ("fwsvd", {"sides": "both"}),
    "tfwsvd": ("tfwsvd", {}),
    "whitened": ("whitened", {}),
    "kronecker": ("kronecker", {}),
}
LABELS = {"classifier": "expected", "lm": "sampled"}
SCORES = {"classifier": "accuracy", "lm": "perplexity"}
MAX_LENGTH = {"classifier": 48, "lm": 64}


def prepare(folder: Path, case: str, seed: int) -> tuple[Path, Path]:
    """The model and its sidecar, made unless they are there."""
    model = folder / f"{case}-{seed}"
    sidecar = folder / f"fisher-{case}-{seed}"
    if not model.exists():
        CASES[case](model, seed)
    if not sidecar.exists():
        data = DataOptions(f"{model}-calibration.jsonl", max_length=MAX_LENGTH[case])
        kinds = Settings(kind="diagonal,factored,kronecker", labels=LABELS[case])
        estimate_fisher(str(model), data, sidecar, settings=kinds)
    return model, sidecar


def results(
    model: Path, sidecar: Path, case: str, row: str, keeps: list[float]
) -> Iterator[dict[str, Any]]:
    """For every share and allocation."""
    name, settings = ROWS[row]
    method = find_method(FACTORIZATION, name)
    chosen = Refined(method, method.parse(settings))
    with ExitStack() as opened, tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary) / "terms"
        scratch.mkdir()
        plans = {
            keep: plan_factorize(
                opened, str(model), str(sidecar), chosen, Budget(keep, allocate="auto"),
                "low-rank", (), (), 1 << 40, False, False,
            )
            for keep in keeps
        }  # fmt: skip
        plan = plans[keeps[0]]
        spectra = decompose_all(plan, scratch, "cpu", 1, lambda count: None)
        cut = KeptTerms(plan, scratch, spectra, "cpu")
        validation, test = (
            remembering(OriginalsJudge(
                plan, DataOptions(f"{model}-{split}.jsonl", max_length=MAX_LENGTH[case]), 32,
                "cpu", False,
            ))
            for split in ("validation", "test")
        )  # fmt: skip
        yield {"keep": 1.0, "allocate": "original", **test.of_original()}
        for keep, one in plans.items():
            candidates = one.budget.candidates(spectra, plan.shapes, plan.others)
            measured: dict[str, dict[str, Any]] = {
                allocation: test.measure(factorized_rows(plan, ranks, cut))
                for allocation, ranks in candidates.items()
            }
            best, _ = best_allocation(plan, candidates, cut, validation, lambda count: None)
            measured["auto"] = measured[best] | {"chosen": best}
            for allocation, metrics in measured.items():
                yield {"keep": keep, "allocate": allocation, **metrics}
        cut.discard()


class Remembered(nn.Module):
    """A model that runs once on every batch."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.found: dict[bytes, Any] = {}

    def forward(self, **inputs: Tensor) -> Any:
        key = inputs["input_ids"].numpy().tobytes()
        if key not in self.found:
            self.found[key] = self.module(**inputs)
        return self.found[key]


def remembering(judge: OriginalsJudge) -> OriginalsJudge:
    """The original's predictions are the same for every candidate."""
    judge.original = replace(judge.original, module=Remembered(judge.original.module))
    return judge


def table(rows: list[dict[str, Any]], case: str) -> str:
    """Means over seeds, and for the KL their spread; a line a method and allocation."""
    score = SCORES[case]
    groups: dict[tuple[str, str], dict[float, list[dict[str, Any]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in rows:
        if row["case"] == case:
            groups[row["method"], row["allocate"]][row["keep"]].append(row)
    keeps = sorted({row["keep"] for row in rows} - {1.0}, reverse=True)
    cells = " | ".join(f"KL, loss, {score} at {keep:g}" for keep in keeps)
    lines = [f"| {case} | ranks | {cells} |", "|---" * (len(keeps) + 2) + "|"]
    for (method, allocation), by_keep in groups.items():
        if allocation == "original":
            continue
        shown = [_cell(by_keep[keep], score) for keep in keeps]
        lines.append(f"| {method} | {allocation} | {' | '.join(shown)} |")
    original = [row for row in rows if row["case"] == case and row["allocate"] == "original"]
    figures = [mean(row[name] for row in original) for name in ("loss", score)]
    lines.append(f"\nThe original: loss {figures[0]:.3f}, {score} {figures[1]:.4g}.")
    return "\n".join(lines)


def _cell(rows: list[dict[str, Any]], score: str) -> str:
    if not rows:
        return ""
    kls = [row["kl"] for row in rows]
    spread = f" ± {stdev(kls):.3f}" if len(kls) > 1 else ""
    figures = [mean(row[name] for row in rows) for name in ("loss", score)]
    return f"{mean(kls):.3f}{spread}, {figures[0]:.3f}, {figures[1]:.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--keeps", default="0.7,0.5,0.3")
    parser.add_argument("--methods", default=",".join(ROWS))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    options.folder.mkdir(parents=True, exist_ok=True)
    keeps = [float(keep) for keep in options.keeps.split(",")]
    rows: list[dict[str, Any]] = []
    log = options.folder / "quality.jsonl"
    for case in options.cases.split(","):
        for seed in map(int, options.seeds.split(",")):
            model, sidecar = prepare(options.folder, case, seed)
            for method in options.methods.split(","):
                for result in results(model, sidecar, case, method, keeps):
                    rows.append({"case": case, "seed": seed, "method": method, **result})
                    with log.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
        print(table(rows, case), flush=True)


if __name__ == "__main__":
    main()
