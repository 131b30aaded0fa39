"""Our results beside mergekit 0.1.5's on the same inputs, and why some differ.

golden/mergekit.json is what scripts/bench/against_mergekit.py --golden writes; each case says
there in a few words what sets the two apart.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_driver import METHODS, merge
from torch import Tensor

from fishertool.merging.sce import Selected, sce

GOLDEN = json.loads((Path(__file__).parent / "golden/mergekit.json").read_text("utf-8"))
ROUNDING = 1e-6
# Where results differ by more than rounding, and by how much at most. Wherever nothing is listed
# the two agree.
DIFFERENT = {
    ("fine-tunes", "karcher"): 1e-4,  # an angle of 1e-4 is rounding in float32
    ("fine-tunes", "sce"): 1e-4,  # mergekit's weights are equal where the tau^2 sum to under 1e-6
    ("fine-tunes", "model-stock"): 2e-4,  # its cosines shrink where lengths are under 1e-3
    ("fine-tunes", "arcee-fusion"): 1e-3,  # its divergence is rounding, and so are its scores
    ("bfloat16", "breadcrumbs"): 8e-3,  # of the entries that tie, its sort decides
    ("bfloat16", "breadcrumbs-ties"): 8e-3,
    ("bfloat16", "sce"): 8e-3,
}


def of(case: dict[str, Any]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Models, base and mergekit's result."""
    stored = GOLDEN["inputs"][case["inputs"]]
    base, merged, *models = (
        torch.tensor(values).view(GOLDEN["shape"])
        for values in (stored["base"], case["merged"], *stored["models"])
    )
    return models[: case["models"]], base, merged


def cases(random: bool, inputs: str | None = None, method: str | None = None) -> list[Any]:
    return [
        pytest.param(case, id=f"{case['inputs']}-{case['method']}-{case['settings']}")
        for case in GOLDEN["cases"]
        if case["random"] is random
        and inputs in (None, case["inputs"])
        and method in (None, case["method"])
    ]


def ours(case: dict[str, Any]) -> Tensor:
    models, base, _ = of(case)
    origin = base if case["base"] else None
    return merge(case["method"], models, case["weights"], origin, **case["settings"])


def test_every_method_of_mergekits_is_compared() -> None:
    assert GOLDEN["mergekit"] == "0.1.5"
    ours_alone = {"fisher"}
    assert set(METHODS) - ours_alone == {case["method"] for case in GOLDEN["cases"]}


@pytest.mark.parametrize("case", cases(random=False))
def test_results_agree_but_for_what_is_listed(case: dict[str, Any]) -> None:
    _, _, theirs = of(case)
    bound = DIFFERENT.get((case["inputs"], case["method"]), ROUNDING)
    torch.testing.assert_close(
        ours(case), theirs, rtol=0, atol=bound, msg=lambda text: f"{text}\n{case['why']}"
    )


@pytest.mark.parametrize(("inputs", "method"), DIFFERENT)
def test_what_is_listed_differs(inputs: str, method: str) -> None:
    differences = [
        float((ours(case) - of(case)[2]).abs().max())
        for [case] in (one.values for one in cases(False, inputs, method))
    ]
    assert max(differences) > ROUNDING


@pytest.mark.parametrize("case", cases(False, "fine-tunes", "sce")[:1])
def test_mergekits_sce_weights_are_equal_for_fine_tunes(case: dict[str, Any]) -> None:
    assert not case["settings"]  # all is selected
    models, base, theirs = of(case)
    equal = sce(models, case["weights"], base, Selected(0.0, [1.0] * 3))
    torch.testing.assert_close(equal, theirs, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("case", cases(False, "fine-tunes", "model-stock"))
def test_mergekits_model_stock_stays_nearer_to_the_base(case: dict[str, Any]) -> None:
    _, base, theirs = of(case)
    assert float((theirs - base).norm()) < 0.9 * float((ours(case) - base).norm())


@pytest.mark.parametrize("case", cases(False, "fine-tunes", "arcee-fusion"))
def test_arcee_fusion_takes_other_entries_but_from_the_same_models(case: dict[str, Any]) -> None:
    (first, second), _, theirs = of(case)
    for merged in (ours(case), theirs):
        assert torch.minimum((merged - first).abs(), (merged - second).abs()).max() < ROUNDING


@pytest.mark.parametrize("case", cases(False, "bfloat16", "breadcrumbs"))
def test_breadcrumbs_differ_where_sizes_tie_with_one_that_is_kept(case: dict[str, Any]) -> None:
    models, base, theirs = of(case)
    unlike = (ours(case) - theirs).abs() > ROUNDING
    sizes = torch.stack([(model - base).abs() for model in models])
    for place in unlike.nonzero():
        row, column = place.tolist()
        tied = [(size == size[row, column]).sum() > 1 for size in sizes]
        assert any(tied)


@pytest.mark.parametrize("case", cases(random=True))
def test_a_kept_entry_is_divided_by_its_probability(case: dict[str, Any]) -> None:
    """mergekit scales all it keeps by one number, whatever brings the tensor to its L1 norm."""
    [model], base, theirs = of(case)
    vector = (model - base) * (1 if case["method"] == "della" else case["weights"][0])
    changed = vector.abs() > 1e-4 * vector.abs().max()
    mine, other = (
        (merged - base).double()[changed] / vector.double()[changed]
        for merged in (ours(case), theirs)
    )
    mine, other = mine[mine.abs() > 0.1], other[other.abs() > 0.1]
    assert 0 < len(mine) < int(changed.sum()) and 0 < len(other) < int(changed.sum())
    near = 0.05  # the change is a small part of the weight, which float32 rounds
    assert float((other - other.median()).abs().median()) < near
    if case["method"].startswith("dare"):
        assert float((mine - 2).abs().median()) < near
    else:
        assert mine.min() > 1 / 0.65 - near and mine.max() < 1 / 0.35 + near
        assert float(mine.max() - mine.min()) > 0.3
