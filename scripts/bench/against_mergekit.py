"""Every merge method beside mergekit's on the same random tensors: a Markdown table.

    python -m venv mergekit && mergekit/bin/pip install mergekit==0.1.5
    PYTHONPATH=. mergekit/bin/python scripts/bench/against_mergekit.py
    PYTHONPATH=. mergekit/bin/python scripts/bench/against_mergekit.py --golden tests/golden/mergekit.json

The environment is mergekit's; of ours it needs the source and nothing but torch and numpy. The
models are a base plus changes a thousandth as large. `float32` is the largest difference of two
results in float32. `bfloat16` is for models stored so: how many of the results differ, and how
many of mergekit's and of ours are not what float64 rounds to.

`--golden` writes small inputs and mergekit's results for the test that compares ours with them.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from mergekit.merge_methods import get, merge_tensors
from torch import Tensor

from fishertool.merging.method import make_passes
from fishertool.registry import find_method

WEIGHTS = [0.5, 0.3, 0.4]
ROUNDING = "order of rounding"
VOTES = "votes that cancel elect either sign, by rounding"
TIES = "as above, and entries that tie with the last one kept are all kept"
DRAWS = "draws differ; kept entries are divided by their probability, not scaled to the L1 norm"
TABLE, GOLDEN = (256, 512), (6, 8)
FINE_TUNE = 1e-3
INPUTS = {
    "wide": (0.3, torch.float32),
    "fine-tunes": (1e-4, torch.float32),
    "bfloat16": (3e-3, torch.bfloat16),  # many entries are the base's, and many changes tie
}


@dataclass(frozen=True)
class Case:
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    models: int = 3
    base: bool = True
    why: str = ROUNDING
    """Of the float32 results."""


CASES = [
    Case("linear", base=False),
    Case("linear", {"normalize": False}, base=False),
    Case("slerp", {"t": 0.3}, 2, False),
    Case("nuslerp", {}, 2, False),
    Case("nuslerp", {}, 2),
    Case("nuslerp", {"nuslerp_flatten": False}, 2),
    Case("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, 2),
    Case("multislerp", {}, base=False),
    Case("multislerp"),
    Case("multislerp", {"normalize_weights": False}),
    Case("karcher", {}, base=False, why="its angles between near models are rounding in float32"),
    Case("task-arithmetic"),
    Case("task-arithmetic", {"normalize": True, "lambda": 0.7}),
    Case("ties", why=VOTES),
    Case("ties", {"density": 0.4}, why=TIES),
    Case("ties", {"density": 0.4, "normalize": False, "rescale": True}, why=TIES),
    Case("dare-linear"),
    Case("dare-ties", why=VOTES),
    Case("della", why=VOTES),
    Case("della-linear"),
    Case("dare-linear", {"density": 0.5}, 1, why=DRAWS),
    Case("dare-ties", {"density": 0.5}, 1, why=DRAWS),
    Case("della", {"density": 0.5}, 1, why=DRAWS),
    Case("della-linear", {"density": 0.5}, 1, why=DRAWS),
    Case("breadcrumbs", {"density": 0.5, "gamma": 0.1}, why="entries that tie are all kept"),
    Case("breadcrumbs-ties", {"density": 0.5, "gamma": 0.1}, why=TIES),
    Case("sce", why="weights are used at any scale, not only where they sum to more than 1e-6"),
    Case("sce", {"select_topk": 0.3}, why="as above, and entries that tie are all selected"),
    Case("model-stock", why="cosines at any scale, not shrunk for lengths below 1e-3"),
    Case("model-stock", {"filter_wise": True}, why="as above"),
    Case("nearswap", {"t": 0.0005}, 2, False),
    Case("arcee-fusion", {}, 2, False, why="exact quartiles; a divergence without cancellation"),
    Case("passthrough", {"scale": 0.7}, 1, False),
]


def inputs(shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """A base and three models, rounded to `dtype`, as float32."""
    generator = torch.Generator().manual_seed(0)
    base, *changes = (torch.randn(shape, generator=generator) for _ in range(4))
    models = [(base * (1 + scale * change)).to(dtype).float() for change in changes]
    return base.to(dtype).float(), models


def is_random(case: Case) -> bool:
    method = find_method("fishertool.merging", case.method)
    return "generators" in method.inputs and case.settings.get("density", 1.0) < 1


def weights_of(case: Case) -> list[float]:
    """Equal ones where mergekit takes none."""
    known = get(case.method.replace("-", "_")).spec.parameters
    named = any(parameter.name == "weight" for parameter in known)
    return WEIGHTS[: case.models] if named else [1.0] * case.models


def ours(case: Case, models: Sequence[Tensor], base: Tensor) -> Tensor:
    method = find_method("fishertool.merging", case.method)
    settings = method.parse(case.settings)
    weights = weights_of(case)
    origin = base if case.base else None
    arguments: dict[str, Any] = {}
    if method.whole is not None:
        passes = method.passes(weights, base.numel(), settings)
        arguments["whole"] = make_passes(passes, lambda: [(models, origin)])
    if "generators" in method.inputs:
        arguments["generators"] = [torch.Generator().manual_seed(i) for i in range(len(models))]
    if origin is not None and "base" in method.inputs:
        arguments["base"] = origin
    merged: Tensor = method.function(models, weights, **arguments, **settings)
    return merged


def mergekits(case: Case, models: Sequence[Tensor], base: Tensor) -> Tensor:
    name = case.method.replace("-", "_")
    first = 1 if case.base else 0
    parameters: dict[str, Any] = dict(case.settings)
    if any(parameter.name == "weight" for parameter in get(name).spec.parameters):
        parameters["weight"] = {first + i: weight for i, weight in enumerate(weights_of(case))}
    pair = find_method("fishertool.merging", case.method).models == 2 and case.method != "nuslerp"
    merged: Tensor = merge_tensors(
        [base, *models] if case.base else models,
        name,
        parameters=parameters,
        base_index=0 if case.base or pair else None,
    )
    return merged


def row(case: Case) -> str:
    title = case.method + (" (with a base)" if case.method[-5:] == "slerp" and case.base else "")
    given = ", ".join(f"{key} {value}" for key, value in case.settings.items())
    title += f": {given}" if given else ""
    if is_random(case):
        return f"| {title} | - | - | - | - | {case.why} |"
    base, models = inputs(TABLE, FINE_TUNE, torch.float32)
    models = models[: case.models]
    difference = float((ours(case, models, base) - mergekits(case, models, base)).abs().max())
    base, models = inputs(TABLE, FINE_TUNE, torch.bfloat16)
    models = models[: case.models]
    exact = ours(case, [model.double() for model in models], base.double()).bfloat16()
    mine = ours(case, models, base).bfloat16()
    theirs = mergekits(case, [model.bfloat16() for model in models], base.bfloat16())
    shares = [(a != b).double().mean() for a, b in ((mine, theirs), (theirs, exact), (mine, exact))]
    cells = " | ".join(f"{100 * float(share):.2f} %" for share in shares)
    return f"| {title} | {difference:.1e} | {cells} | {case.why} |"


def shortest(tensor: Tensor) -> list[float]:
    """Nine digits are enough for a float32."""
    return [float(f"{value:.9g}") for value in tensor.flatten().tolist()]


def golden() -> dict[str, Any]:
    found: dict[str, Any] = {
        "mergekit": version("mergekit"),
        "shape": GOLDEN,
        "inputs": {},
        "cases": [],
    }
    for name, (scale, dtype) in INPUTS.items():
        base, models = inputs(GOLDEN, scale, dtype)
        found["inputs"][name] = {"base": shortest(base), "models": list(map(shortest, models))}
        for case in CASES:
            torch.manual_seed(0)  # mergekit draws from the global generator
            merged = mergekits(case, models[: case.models], base)
            found["cases"].append(
                {
                    "method": case.method,
                    "settings": case.settings,
                    "inputs": name,
                    "models": case.models,
                    "weights": weights_of(case),
                    "base": case.base,
                    "random": is_random(case),
                    "why": case.why,
                    "merged": shortest(merged),
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--golden", type=Path, help="write mergekit's results on small inputs here")
    path = parser.parse_args().golden
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(golden()) + "\n", encoding="utf-8")
        return
    torch.manual_seed(0)
    print("| method | float32 | bfloat16: differ | mergekit off | ours off | why float32 differs |")
    print("|---|---|---|---|---|---|")
    for case in CASES:
        print(row(case))


if __name__ == "__main__":
    main()
