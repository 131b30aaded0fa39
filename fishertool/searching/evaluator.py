"""Merge by a recipe and measure what comes out, in memory or from a scratch folder."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fishertool.calibration import DataOptions
from fishertool.checkpoint.reader import open_checkpoint
from fishertool.checkpoint.stream import Piece
from fishertool.errors import UsageError
from fishertool.evaluation.measure import check_measured, load, measure, metrics_of, prepare
from fishertool.models.loading import LoadedModel, load_model
from fishertool.models.names import parameters_by_disk_name
from fishertool.models.tasks import task_of
from fishertool.recipe.inputs import normalised
from fishertool.recipe.resolve import Resolver
from fishertool.recipe.schema import Recipe
from fishertool.recipe.settings import Scalar
from fishertool.recipe.space import Space, fitting
from fishertool.registry import MERGING, find_method, suggest
from fishertool.searching.objectives import Objective, values_of
from fishertool.surgery.merge_pass import Passed, merge_pass
from fishertool.surgery.merge_plan import MergePlan, plan_merge
from fishertool.surgery.merge_write import write_merge


class Evaluation(NamedTuple):
    """One merge, measured."""

    values: list[float]
    """Of every objective, in its own units."""
    distance: float | None
    """Mean of abs(theta - theta_0), if that is finite."""
    predicted_loss: list[float] | None
    """Of each model, where every model has a Fisher, if they are finite."""


CANDIDATE = ".candidate-"


@dataclass(frozen=True)
class Running:
    """How merges are made and run: nothing of it changes what is measured."""

    batch_size: int
    threads: int
    device: str
    trust_remote_code: bool
    allow_nonfinite: bool
    max_shard_bytes: int
    scratch: Path
    """In which a merge is written and loaded from, if it cannot be put into a model in memory."""
    in_memory: bool


class Evaluator:
    """Measures the merges of a space; what they have in common is opened and loaded once."""

    def __init__(
        self, opened: ExitStack, space: Space, objectives: Sequence[Objective], running: Running
    ) -> None:
        self.space, self.objectives, self._running = space, objectives, running
        self._methods = {name: find_method(MERGING, name) for name in space.methods}
        self._datasets = list(dict.fromkeys(one.data for one in objectives if one.data))
        self._opened = opened
        self._plans: dict[tuple[str, str | None], MergePlan] = {}
        self._told: dict[str, None] = {}
        self._loaded: Subject | None = None

    def recipe(self, point: Mapping[str, Scalar]) -> Recipe:
        """The recipe at a point, as `fishertool merge --config` takes it."""
        found = self.space.recipe(point)
        method = find_method(MERGING, found.method)
        others = {name: other for name, other in self._methods.items() if name != found.method}
        return normalised(fitting(found, method, others), method)

    def plan(self, point: Mapping[str, Scalar]) -> MergePlan:
        """What the merge at a point will do, from headers.

        Points of one method and dtype share all but their settings. Raises FishertoolError for what
        cannot be merged.
        """
        recipe = self.recipe(point)
        method = find_method(MERGING, recipe.method)
        kind = method.name, recipe.dtype
        if kind in self._plans:
            return self._plans[kind].with_settings(Resolver(recipe, method))
        running = self._running
        plan = plan_merge(
            self._opened, recipe, method, running.max_shard_bytes, running.allow_nonfinite,
            running.trust_remote_code,
        )  # fmt: skip
        self._plans[kind] = plan
        self._told |= dict.fromkeys([*recipe.notes, *plan.warnings])
        return plan

    def evaluate(self, point: Mapping[str, Scalar]) -> Evaluation:
        """Merge at a point and measure every objective.

        Raises FishertoolError where the merge or an objective fails.
        """
        plan = self.plan(point)
        measured: dict[DataOptions, dict[str, float]] = {}
        if not self._datasets:
            passed = self._pass(plan)
        elif self._running.in_memory and self._subject(plan).takes(plan):
            subject = self._subject(plan)
            passed = self._pass(plan, subject.weights)
            measured = self._measure(subject.model, subject)
        else:
            passed, measured = self._in_a_folder(plan)
        free = {
            "distance": passed.distance,
            "sparsity": passed.sparsity,
            "size": plan.layout.nbytes,
            "predicted_loss": passed.predicted_loss,
        }
        values = values_of(self.objectives, measured, free, plan.inputs.listed)
        return Evaluation(values, _finite(passed.distance), _finite(passed.predicted_loss))

    def predict(self, point: Mapping[str, Scalar]) -> list[float]:
        """Of each model the predicted increase of its loss, by a merge that nobody measures."""
        predicted: list[float] | None = _finite(self._pass(self.plan(point)).predicted_loss)
        if predicted is None:
            raise UsageError(
                "a predicted loss needs a fisher with a diagonal for each model, and finite weights"
            )
        return predicted

    def check(self, plan: MergePlan) -> list[dict[str, Any]]:
        """Load the first model and the data, and tell what is measured on.

        Raises UsageError for an objective that merges such as this one do not tell.
        """
        references = plan.inputs.listed
        for one in self.objectives:
            if one.metric in ("distance", "sparsity") and None in plan.inputs.bases:
                raise UsageError(f"{one.name}: needs a base_model, and methods that take one")
            if one.metric == "predicted_loss" and not plan.predicts:
                raise UsageError(f"{one.name}: needs a fisher with a diagonal for each model")
            if one.model is not None and one.model not in references:
                raise UsageError(f"{one.name}: no model {suggest(one.model, references)}")
            if one.data is not None:
                offered = metrics_of(self._subject(plan).task, one.data)
                if one.metric not in offered:
                    raise UsageError(
                        f"{one.name}: is not measured here: {suggest(one.metric, offered)}"
                    )
        return (
            [data.describe() for data in self._subject(plan).data.values()]
            if self._datasets
            else []
        )

    def warnings(self) -> list[str]:
        """Of the recipe and its models, of the data, and of what was measured so far."""
        return list(self._told)

    def _subject(self, plan: MergePlan) -> "Subject":
        if self._loaded is None:
            self._loaded = Subject(plan, self._datasets, self._running)
            self._told |= dict.fromkeys(self._loaded.warnings())
        return self._loaded

    def _pass(self, plan: MergePlan, into: Mapping[str, Tensor] | None = None) -> Passed:
        @torch.no_grad()  # of each thread by itself
        def put(piece: Piece, values: Tensor) -> None:
            if into is not None and piece.name in into:
                weight = into[piece.name]
                rows = weight[piece.start : piece.stop] if weight.dim() else weight
                rows.copy_(values.reshape(rows.shape))

        return merge_pass(plan, put, self._running.threads, lambda _: None, to_base=True)

    def _in_a_folder(self, plan: MergePlan) -> tuple[Passed, dict[DataOptions, dict[str, float]]]:
        subject, threads = self._subject(plan), self._running.threads
        with _new_folder(self._running.scratch) as folder:
            written = write_merge(plan, folder, threads, lambda _: None, to_base=True)
            return written.passed, self._measure(subject.load(folder), subject)

    def _measure(
        self, model: LoadedModel, subject: "Subject"
    ) -> dict[DataOptions, dict[str, float]]:
        return {
            options: measure(
                model, subject.task, data,
                batch_size=self._running.batch_size, warn=self._told.setdefault,
            )
            for options, data in subject.prepared.items()
        }  # fmt: skip


@contextmanager
def _new_folder(parent: Path) -> Iterator[Path]:
    """A folder in another, which is made if it is not there; both as before in the end."""
    made = not parent.exists()
    parent.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(prefix=CANDIDATE, dir=parent) as folder:
            yield Path(folder)
    finally:
        if made:
            with suppress(OSError):  # another worker's is in it
                parent.rmdir()


def _finite(figures: Any) -> Any:
    """A figure or a list of them; None where one is not finite, as of weights that are not."""
    if figures is None:
        return None
    return (
        figures if all(map(isfinite, figures if isinstance(figures, list) else [figures])) else None
    )


class Subject:
    """A model whose weights are replaced by those of every merge, and the data to measure it on."""

    def __init__(self, plan: MergePlan, datasets: Sequence[DataOptions], running: Running) -> None:
        first = plan.first
        self.task = task_of(first.config(), first.folder)
        self._running = running
        resolved = {options: check_measured(self.task, options) for options in datasets}
        scales = {options.scale for options in resolved.values()}
        if len(scales) > 1:
            raise UsageError(f"objectives: scale must be one for all data, not {scales}")
        self._scale = scales.pop()
        self.model = self.load(first.folder)
        with open_checkpoint(first.folder) as checkpoint:
            self.weights, buffers = parameters_by_disk_name(self.model.pretrained, checkpoint)
        self._has_buffers = bool(buffers)
        tokenizer = plan.vocabulary.tokenizer or self.model.tokenizer
        reading = replace(self.model, tokenizer=tokenizer)
        self.data = {
            options: load(self.task, found, reading) for options, found in resolved.items()
        }
        self.prepared = {options: prepare(self.task, data) for options, data in self.data.items()}

    def warnings(self) -> list[str]:
        """Of the model and the data."""
        of_data = [told for data in self.data.values() for told in data.warnings()]
        return [*self.model.warnings, *of_data]

    def load(self, folder: Path) -> LoadedModel:
        running = self._running
        with open_checkpoint(folder) as checkpoint:
            return load_model(
                checkpoint, self.task, running.device, running.trust_remote_code, self._scale
            )

    def takes(self, plan: MergePlan) -> bool:
        """Whether the merge differs from the model in nothing but the values of its parameters."""
        first = plan.first
        stored = all(
            name in first and first.info(name).dtype == target.info.dtype
            for name, target in plan.targets.items()
        )
        same_config = plan.config == first.config() and plan.vocabulary.tokenizer is None
        return stored and same_config and not self._has_buffers
