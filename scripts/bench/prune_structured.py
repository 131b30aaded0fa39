"""Neurons left out of every feed-forward layer: what it costs in quality, and what it saves.

    python scripts/bench/prune_structured.py FOLDER [--cases classifier,embedder] [--seeds 0,1,2]
        [--sparsities 0.3,0.5] [--methods fisher,obs,magnitude] [--examples 320] [--texts 200]
        [--repeats 15] [--threads 1]

The models and texts are those of prune_quality.py, which makes them in FOLDER. Neurons are chosen
by the Fisher of a mask (`fisher`), with a refit in mind (`obs`), and by magnitude, on training texts;
the loss is that of test texts, with the layers that join the neurons as they are
(`none`), scaled (`mask`), refitted (`joint`), and as has the least loss on a fifth of the examples,
held out of all else (`auto`); beside it KL to the dense classifier, or the mean
cosine to the dense embedder's vectors. Parameters and floating-point operations are counted, and
times taken, of what the first method wrote, loaded again: the median of one forward pass of texts
of 48 tokens, dense and small in turn (`--repeats 0`: none of these). One JSON line a result, in
FOLDER/structured.jsonl, and a Markdown table of means over seeds.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import transformers
from factorize_cases import CASES
from prune_quality import LENGTH, SCORES, embedder
from torch.utils.flop_counter import FlopCounterMode

from fishertool.calibration import DataOptions
from fishertool.estimation.settings import Settings
from fishertool.evaluation.measure import check_measured, load, measure, prepare
from fishertool.memory import keep_freed_memory
from fishertool.models.loading import load_model
from fishertool.surgery.prune_trial import open_trial, plan_trial
from fishertool.surgery.shrink import Outcome, run_shrink
from fishertool.surgery.shrink_plan import ShrinkPlan, ShrinkRecipe, plan_shrink
from fishertool.surgery.shrink_write import write_shrunk

BATCHES = (1, 32)
HELD_OUT = 0.2
NEAR = {"classifier": "kl", "embedder": "mean_cosine"}


def results(case: str, seed: int, sparsity: float, options: Any) -> list[dict[str, Any]]:
    model = options.folder / f"{case}-{seed}"
    if not model.exists():
        {**CASES, "embedder": embedder}[case](model, seed)
    data = DataOptions(
        f"{model}-calibration.jsonl", max_length=LENGTH, num_examples=options.examples
    )
    test = DataOptions(f"{model}-test.jsonl", max_length=LENGTH, num_examples=options.texts)
    found: list[dict[str, Any]] = []
    methods = options.methods.split(",")
    for method in methods:
        with ExitStack() as opened:
            recipe = ShrinkRecipe("neurons", sparsity, method, "auto")
            plan = plan_shrink(opened, str(model), recipe, 1 << 40, True)
            joins = [block.join.name for block in plan.units.blocks]
            asked = plan_trial(opened, str(model), "auto", data, Settings(), HELD_OUT, False)
            trial = open_trial(opened, asked, joins, "cpu", True)
            loaded = trial.calibration.model
            task = trial.calibration.subject.task
            dense = load_model(plan.checkpoint, task)
            texts = prepare(task, load(task, check_measured(task, test), loaded))
            tried: list[dict[str, Any]] = []

            def loss() -> float:
                tried.append(measure(loaded, task, texts, against=dense))  # noqa: B023
                return trial.loss()  # noqa: B023

            outcome = run_shrink(plan, trial.calibration, loss, seed)
            by_way = dict(zip(outcome.losses, tried, strict=True))
            by_way["auto"] = {**by_way[outcome.compensate], "chosen": outcome.compensate}
            found += [{"method": method, "compensate": way, **by_way[way]} for way in by_way]
            if method == methods[0] and options.repeats:
                found.append({"method": "size", "compensate": "", **sizes(plan, outcome, options)})
    return found


def sizes(plan: ShrinkPlan, outcome: Outcome, options: Any) -> dict[str, float]:
    """Of both models' bodies, loaded from their folders."""
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        write_shrunk(plan, outcome, {}, Path(scratch))
        models = {
            "dense": transformers.AutoModel.from_pretrained(plan.checkpoint.folder).eval(),
            "small": transformers.AutoModel.from_pretrained(scratch).eval(),
        }
    found: dict[str, float] = {}
    for name, model in models.items():
        found[f"{name}_parameters"] = sum(one.numel() for one in model.parameters())
    with torch.inference_mode():
        for batch in BATCHES:
            ids = torch.randint(1000, 20000, (batch, LENGTH))
            seconds = defaultdict(list)
            for turn in range(options.repeats + 1):
                for name, model in models.items():
                    start = time.perf_counter()
                    model(input_ids=ids)
                    if turn:  # the first warms up
                        seconds[name].append(time.perf_counter() - start)
            for name, model in models.items():
                found[f"{name}_ms_{batch}"] = 1000 * median(seconds[name])
                if batch == 1:
                    with FlopCounterMode(display=False) as counter:
                        model(input_ids=ids)
                    found[f"{name}_flops"] = counter.get_total_flops()
    return found


def table(found: list[dict[str, Any]], case: str) -> str:
    cells: dict[tuple[str, str], dict[float, list[dict[str, Any]]]] = {}
    for one in found:
        if one["case"] == case:
            cells.setdefault((one["method"], one["compensate"]), {}).setdefault(
                one["sparsity"], []
            ).append(one)
    sparsities = sorted({sparsity for cell in cells.values() for sparsity in cell})
    near, score = NEAR[case], SCORES[case]
    lines = [
        f"| loss / {score} / {near} | {' | '.join(map(str, sparsities))} |",
        "|---" * (1 + len(sparsities)) + "|",
    ]
    for (method, way), cell in cells.items():
        if method == "size" or (way == "dense" and len(lines) > 2):
            continue
        shown = [
            f"{mean(one['loss'] for one in cell[sparsity]):.3f} / "
            f"{mean(one[score] for one in cell[sparsity]):.3f} / "
            f"{mean(one[near] for one in cell[sparsity]):.3f}"
            for sparsity in sparsities
        ]
        lines.append(f"| {way if way == 'dense' else f'{method}, {way}'} | {' | '.join(shown)} |")
    kinds = ("parameters", "flops", *(f"ms_{batch}" for batch in BATCHES))
    for kind in kinds if ("size", "") in cells else ():
        shown = []
        for sparsity in sparsities:
            several = cells["size", ""][sparsity]
            small = mean(one[f"small_{kind}"] for one in several)
            of_dense = small / mean(one[f"dense_{kind}"] for one in several)
            shown.append(f"{small:.4g} ({of_dense:.2f} x dense)")
        lines.append(f"| {kind} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", default="classifier,embedder")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--sparsities", default="0.3,0.5")
    parser.add_argument("--methods", default="fisher,obs,magnitude")
    parser.add_argument("--examples", type=int, default=320)
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    options.folder.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    for case in options.cases.split(","):
        for seed in map(int, options.seeds.split(",")):
            for sparsity in map(float, options.sparsities.split(",")):
                for one in results(case, seed, sparsity, options):
                    found.append({"case": case, "seed": seed, "sparsity": sparsity, **one})
                    with (options.folder / "structured.jsonl").open("a", encoding="utf-8") as file:
                        file.write(json.dumps(found[-1]) + "\n")
        print(table(found, case), flush=True)


if __name__ == "__main__":
    main()
