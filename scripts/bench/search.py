"""How much of the Pareto front the samplers of a search find in 30 evaluations: Markdown tables.

    OMP_NUM_THREADS=1 python scripts/bench/search.py synthetic --json search.json
    OMP_NUM_THREADS=1 python scripts/bench/search.py merges FOLDER

`synthetic` is two problems with known fronts in six dimensions, both objectives minimized: ZDT1
(Zitzler, Deb and Thiele 2000) with the hypervolume to (1.1, 6), at most 6.266, and DTLZ2 (Deb,
Thiele, Laumanns and Zitzler 2002) with two objectives to (1.1, 1.1), at most 0.425. All samplers
but `random` begin with the same 10 scrambled Sobol points of a seed, and see each value before the
next point; with `--batch 5` MM-MO proposes five at a time, as in its paper.
Optuna's are at their defaults but for NSGA-II, whose population is 10, not more than 30 allow.
`merges` is of real merges: see `search_merges.py`.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import optuna
import search_merges
import torch
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from torch import Tensor
from torch.quasirandom import SobolEngine

from fishertool.searching.mmmo import propose
from fishertool.searching.pareto import hypervolume

DIMENSIONS = 6
START = 10
EVALUATIONS = 30


@dataclass(frozen=True)
class Problem:
    losses: Callable[[Tensor], Tensor]
    """[point, dimension] -> [point, objective]"""
    reference: tuple[float, float]

    def dominated(self, points: Tensor) -> float:
        return hypervolume(-self.losses(points), -torch.tensor(self.reference))


def zdt1(x: Tensor) -> Tensor:
    first, g = x[:, 0], 1 + 9 * x[:, 1:].mean(-1)
    return torch.stack([first, g * (1 - (first / g).sqrt())], -1)


def dtlz2(x: Tensor) -> Tensor:
    angle, g = x[:, 0] * torch.pi / 2, (x[:, 1:] - 0.5).square().sum(-1)
    return torch.stack([(1 + g) * angle.cos(), (1 + g) * angle.sin()], -1)


PROBLEMS = {"ZDT1": Problem(zdt1, (1.1, 6.0)), "DTLZ2": Problem(dtlz2, (1.1, 1.1))}

MMMO: dict[str, dict[str, Any]] = {
    "mmmo": {},
    "mmmo, no recombination": {"recombine": False},
    "mmmo, no screening": {"screen": None},
    "mmmo, neither (gp)": {"recombine": False, "screen": None},
}
OPTUNA: dict[str, Callable[[int], BaseSampler]] = {
    "Optuna GPSampler": lambda seed: GPSampler(seed=seed),
    "Optuna TPE": lambda seed: TPESampler(seed=seed),
    "Optuna NSGA-II": lambda seed: NSGAIISampler(seed=seed, population_size=START),
    "random": lambda seed: RandomSampler(seed=seed),
}


def start_of(seed: int) -> Tensor:
    sobol = SobolEngine(DIMENSIONS, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    return sobol.draw(START, dtype=torch.float64)


def search_mmmo(problem: Problem, seed: int, batch: int, settings: dict[str, Any]) -> Tensor:
    points = start_of(seed)
    while (left := EVALUATIONS - len(points)) > 0:
        values = -problem.losses(points)
        new = propose(points, values, points[:0], min(batch, left), seed, **settings)
        points = torch.cat([points, new])
    return points


def search_optuna(problem: Problem, seed: int, sampler: BaseSampler) -> Tensor:
    names = [f"x{i}" for i in range(DIMENSIONS)]
    study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler)
    if not isinstance(sampler, RandomSampler):
        for point in start_of(seed).tolist():
            study.enqueue_trial(dict(zip(names, point, strict=True)))

    def losses(trial: optuna.Trial) -> tuple[float, ...]:
        point = [trial.suggest_float(name, 0, 1) for name in names]
        return tuple(problem.losses(torch.tensor([point], dtype=torch.float64))[0].tolist())

    study.optimize(losses, n_trials=EVALUATIONS)
    points = [[trial.params[name] for name in names] for trial in study.trials]
    return torch.tensor(points, dtype=torch.float64)


def search(name: str, problem: Problem, seed: int, batch: int) -> Tensor:
    if name in MMMO:
        return search_mmmo(problem, seed, batch, MMMO[name])
    return search_optuna(problem, seed, OPTUNA[name](seed))


def synthetic(args: argparse.Namespace) -> None:
    print("| sampler | " + " | ".join(f"{title} | seconds" for title in PROBLEMS) + " |")
    print("|---|" + "---:|" * (2 * len(PROBLEMS)))
    rows = []
    for name in args.samplers:
        row: dict[str, Any] = {"sampler": name}
        for title, problem in PROBLEMS.items():
            begin, found = time.perf_counter(), []
            for seed in range(args.first_seed, args.first_seed + args.seeds):
                found.append(problem.dominated(search(name, problem, seed, args.batch)))
            row[title] = {"hypervolumes": found, "seconds": time.perf_counter() - begin}
        print(line_of(row, args.seeds), flush=True)
        rows.append(row)
    if args.json:
        args.json.write_text(json.dumps({"batch": args.batch, "samplers": rows}, indent=1) + "\n")


def line_of(row: dict[str, Any], seeds: int) -> str:
    cells = [row["sampler"]]
    for title in PROBLEMS:
        found = row[title]["hypervolumes"]
        spread = f" ± {stdev(found):.3f}" if seeds > 1 else ""
        cells += [f"{mean(found):.3f}{spread}", f"{row[title]['seconds'] / seeds:.1f}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(required=True)
    part = parts.add_parser("synthetic")
    part.add_argument("--seeds", type=int, default=10)
    part.add_argument("--first-seed", type=int, default=0)
    part.add_argument("--batch", type=int, default=1)
    names = [*MMMO, *OPTUNA]
    part.add_argument("--samplers", nargs="+", default=names, choices=names, metavar="NAME")
    part.add_argument("--json", type=Path, metavar="FILE")
    part.set_defaults(run=synthetic)
    part = parts.add_parser("merges")
    search_merges.add_arguments(part)
    part.set_defaults(run=search_merges.merges)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    args.run(args)


if __name__ == "__main__":
    main()
