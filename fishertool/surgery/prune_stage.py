"""What the stages of a pruning have in common: the weights before it, and tensors kept on disk."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from fishertool.checkpoint.companions import write_json
from fishertool.checkpoint.dtypes import compute_dtype
from fishertool.checkpoint.header import TensorInfo
from fishertool.checkpoint.json_files import load_json
from fishertool.checkpoint.layout import ONE_FILE, lay_out
from fishertool.checkpoint.reader import Checkpoint
from fishertool.checkpoint.source import check_finite
from fishertool.checkpoint.writer import CheckpointWriter
from fishertool.errors import InputError
from fishertool.surgery.matrix import Matrix
from fishertool.surgery.prune_plan import PrunePlan, mask_name
from fishertool.surgery.prune_recipe import Recipe
from fishertool.surgery.prune_statistics import Statistics
from fishertool.surgery.prune_trial import Trial

STEM, NOTES = "tensors", "notes.json"


@dataclass
class Step:
    """The weights before a pruning, and what decides about them."""

    plan: PrunePlan
    recipe: Recipe
    statistics: Statistics | None
    before: Checkpoint | None
    """What the step before left; None for the model itself."""
    seed: int
    trial: Trial | None = None
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By matrix: predicted loss change, and the update it got."""
    counts: dict[str, Any] = field(default_factory=dict)
    """Blocks that got more damping, entries of the inverse diagonal out of bounds, and the matrices
    that a statistic which is zero told nothing about: pruned by magnitude, or not moved."""

    def weight(self, matrix: Matrix) -> Tensor:
        """[out, in], float32 or, stored so, float64."""
        if self.before is None:
            source, name = self.plan.checkpoint, matrix.name
            rows = source.read(name, matrix.start, matrix.stop)
        else:
            source, name = self.before, matrix.key
            rows = source[name]
        values = matrix.upright(rows).to(compute_dtype(matrix.dtype))
        if not self.plan.allow_nonfinite:
            check_finite(source, name, values)
        return values

    def pruned_before(self, matrix: Matrix) -> Tensor | None:
        """True where an earlier step pruned, [out, in]."""
        if self.before is None:
            return None
        return ~matrix.upright(self.before[mask_name(matrix.key)])


NO_ANSWER = (ValueError, LinAlgError)


def refusal(matrix: Matrix, error: Exception) -> InputError:
    """Of a matrix that a method or an update has no answer for, with what it raised."""
    if isinstance(error, LinAlgError):
        return InputError(
            f"{matrix.key}: its statistic is singular with so little damping; take more --damping"
        )
    return InputError(f"{matrix.key}: {error}; leave it out with --exclude")


def stored(
    folder: Path,
    infos: Iterable[TensorInfo],
    tensors: Callable[[], Iterator[tuple[str, Tensor]]],
    notes: Mapping[str, Any],
) -> dict[str, Any]:
    """Write tensors as they are made into `folder`, and the notes taken of them, which are returned;
    unless an earlier run has."""
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with CheckpointWriter(partial, lay_out(infos, ONE_FILE, stem=STEM)) as writer:
            for name, values in tensors():
                writer.write(name, values)
            writer.finish()
        write_json(partial / NOTES, notes)
        partial.rename(folder)
    return load_json(folder / NOTES)
