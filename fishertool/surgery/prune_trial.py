"""The model in memory while it is pruned: what is estimated on it anew, and its held-out loss."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fishertool.calibration import DataOptions
from fishertool.checkpoint.reader import Checkpoint
from fishertool.errors import InputError, UsageError
from fishertool.estimation.measuring import loss_of, split, write_statistics
from fishertool.estimation.settings import Settings, check_settings
from fishertool.estimation.subject import (
    LoadedSubject,
    Source,
    Subject,
    find_subject,
    load_subject,
)
from fishertool.estimation.workers import joined
from fishertool.models.names import parameters_by_disk_name
from fishertool.models.recovery import recover
from fishertool.progress import Advance, Track
from fishertool.report import Report
from fishertool.surgery.matrix import Matrix

UNMEASURED = "nothing was measured: --data measures the loss on examples held out of it"


@dataclass(frozen=True)
class Trial:
    """The loaded model, with its examples in two parts."""

    calibration: LoadedSubject
    held_out: LoadedSubject
    settings: Settings
    parameters: Mapping[str, Tensor]
    """All of the model's, by name on disk."""

    def part(self, matrix: Matrix) -> Tensor:
        """Of the model, as on disk."""
        return matrix.of(self.calibration.parameters[matrix.name])

    def put(self, matrix: Matrix, rows: Tensor) -> None:
        """Set a matrix's weights, which are as on disk."""
        with torch.no_grad():
            self.part(matrix).copy_(rows)

    def put_all(self, pruned: Checkpoint, matrices: Sequence[Matrix]) -> None:
        for matrix in matrices:
            self.put(matrix, pruned[matrix.key])

    def loss(self) -> float:
        """Of the held-out examples."""
        return loss_of(self.held_out)

    def recover(
        self,
        masks: Sequence[tuple[Tensor, Tensor]],
        steps: int,
        learning_rate: float,
        track: Track,
    ) -> dict[str, Any]:
        """Train the model on the calibration examples, weights, or parts of them, being zero where
        their mask is False. What it did, and the held-out loss."""
        subject = self.calibration.subject
        with track("Recovering", steps, "steps") as advance:
            done = recover(
                self.calibration.model,
                subject.task,
                self.calibration.texts,
                steps=steps,
                learning_rate=learning_rate,
                masks=masks,
                seed=subject.data.seed,
                advance=advance,
            )
        return {**asdict(done), "held_out_loss": self.loss()}

    def tell(
        self, report: Report, before: float, after: float, evaluation: Mapping[str, Any]
    ) -> None:
        """Fill in what was measured, and on what."""
        subject, texts = self.calibration.subject, self.calibration.texts
        report.summary |= {
            "loss_before": before, "loss_after": after, "loss_change": after - before,
        }  # fmt: skip
        about = {"labels": self.calibration.labels, "seed": subject.data.seed}
        report.calibration = texts.describe() | about
        held = {"held_out_examples": len(self.held_out.texts.examples)}
        report.evaluation = {**held, **evaluation}
        report.warnings += self.calibration.warnings

    def estimate(self, folder: Path, kinds: Sequence[str], advance: Advance) -> None:
        """Write the Fisher of the model as it is now, by the calibration examples."""
        settings = replace(self.settings, kind=",".join(kinds))
        write_statistics(self.calibration, settings, folder, advance)


@dataclass(frozen=True)
class TrialPlan:
    """What a trial will be, known from headers and flags."""

    subject: Subject
    settings: Settings
    held_out: float
    """Share of the examples that is only measured on."""


def plan_trial(
    opened: ExitStack,
    model: str,
    task: str,
    data: DataOptions,
    settings: Settings,
    held_out: float,
    trust_remote_code: bool,
) -> TrialPlan:
    """Raises UsageError for words that are not known, and a share out of range."""
    check_settings(settings)
    if not 0 < held_out < 1:
        raise UsageError(f"--held-out {held_out:g}: a share of the examples, above 0 and below 1")
    source = Source(model, task, trust_remote_code=trust_remote_code)
    subject = find_subject(opened, source, data)
    if settings.labels == "auto" and "rank-one" in settings.kinds and subject.task.has_labels:
        # One gradient an example, as with drawn labels, at a fraction of their noise.
        settings = replace(settings, labels="expected-signed")
    return TrialPlan(subject, settings, held_out)


def open_trial(
    opened: ExitStack, plan: TrialPlan, wanted: Sequence[str], device: str, check_finite: bool
) -> Trial:
    """Load the model and the data; `wanted` tensors are those that will change.

    Raises UsageError if either part of the examples were empty.
    """
    subject, settings = replace(plan.subject, wanted=list(wanted)), plan.settings
    workers = opened.enter_context(joined(None, device))
    loaded = load_subject(subject, settings, workers, None, check_finite)
    if not loaded.texts.labelled:
        data = subject.data
        raise InputError(
            f"{data.data}: has no column {data.label_column!r}, without which no loss is measured"
        )
    calibration, held = split(loaded, plan.held_out)
    if not calibration.texts.examples or not held.texts.examples:
        raise UsageError(
            f"--held-out {plan.held_out:g}: leaves {len(calibration.texts.examples)} examples of "
            f"{len(loaded.texts.examples)} to calibrate on and {len(held.texts.examples)} to "
            "measure; give more data"
        )
    parameters, _ = parameters_by_disk_name(loaded.model.pretrained, subject.checkpoint)
    return Trial(calibration, held, settings, parameters)
