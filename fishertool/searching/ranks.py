"""The choice among allocations: put each one's products into the model, measure, keep the best."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from math import inf, isnan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fishertool.calibration import DataOptions
from fishertool.evaluation.measure import HIGHER_IS_BETTER, check_measured
from fishertool.factorization.rank import Ranks, total
from fishertool.models.loading import LoadedModel, load_model
from fishertool.models.names import parameters_by_disk_name
from fishertool.models.tasks import task_of
from fishertool.progress import Advance
from fishertool.searching.judge import Judge
from fishertool.surgery.factorize_plan import FactorizePlan
from fishertool.surgery.factorize_terms import Cutter
from fishertool.surgery.factorize_write import factorized_rows
from fishertool.surgery.matrix import Matrix

CRITERIA = ("kl", "mean_cosine")
"""How near predictions, or vectors, are to the original's; every measured task has one."""


class OriginalsJudge(Judge):
    """Measures models against the original, on data that neither the Fisher nor the ranks saw."""

    def __init__(
        self,
        plan: FactorizePlan,
        options: DataOptions,
        batch_size: int,
        device: str,
        trust_remote_code: bool,
    ):
        self._checkpoint = checkpoint = plan.checkpoint
        task = task_of(checkpoint.config(), checkpoint.folder)
        options = check_measured(task, options)
        self.original = load_model(checkpoint, task, device, trust_remote_code)
        super().__init__(task, options, self.original, batch_size, device, trust_remote_code)

    def of_original(self) -> dict[str, float]:
        return self.of(self.original)

    def of_written(self, folder: Path) -> dict[str, float]:
        return self.of_folder(folder, self.original)

    @torch.no_grad()
    def measure(self, rows: Iterable[tuple[Matrix, Tensor]]) -> dict[str, float]:
        """Of the model with these rows on disk in the place of its own. Low-rank layers are measured
        as their products: the same function, but for rounding."""
        for matrix, values in rows:
            matrix.of(self._weights[matrix.name]).copy_(values)
        return self.of(self._changed, self.original)

    @cached_property
    def _changed(self) -> LoadedModel:
        return load_model(self._checkpoint, self.task, self.device, self.trust_remote_code)

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        return parameters_by_disk_name(self._changed.pretrained, self._checkpoint)[0]


def best_allocation(
    plan: FactorizePlan,
    candidates: Mapping[str, Ranks],
    cut: Cutter,
    judge: OriginalsJudge,
    advance: Advance,
) -> tuple[str, dict[str, Any]]:
    """The candidate that stays nearest to the original, and for the report all that was measured
    and the criterion: the first of CRITERIA that was."""
    rows: list[dict[str, Any]] = []
    for name, ranks in candidates.items():
        metrics = judge.measure(factorized_rows(plan, ranks, cut))
        rows.append({"allocate": name, "parameters": total(plan.shapes, ranks), **metrics})
        advance(1)
    criterion = next(one for one in CRITERIA if one in rows[0])
    sign = -1 if HIGHER_IS_BETTER[criterion] else 1
    best = min(rows, key=lambda row: inf if isnan(row[criterion]) else sign * row[criterion])
    return best["allocate"], {"candidates": rows, "chosen_by": criterion}
