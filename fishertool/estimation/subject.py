"""What an estimate is of: a model, perhaps with an adapter, on some data."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from fishertool import calibration, hub
from fishertool.calibration import CalibrationData, DataOptions, Example, check_data_source
from fishertool.calibration.data import probes
from fishertool.checkpoint.header import TensorInfo
from fishertool.checkpoint.reader import Checkpoint, open_checkpoint
from fishertool.errors import InputError, UsageError, some
from fishertool.estimation.settings import Settings, resolve_labels
from fishertool.estimation.workers import Workers
from fishertool.fisher.batches import Batch
from fishertool.fisher.header import FisherHeader
from fishertool.fisher.labels import Labels
from fishertool.models.adapters import Adapter, open_adapter
from fishertool.models.layers import Layer, layers_of
from fishertool.models.loading import LoadedModel, load_model
from fishertool.models.names import parameters_by_disk_name
from fishertool.models.sentence import transformer_folder
from fishertool.models.sharding import shard
from fishertool.models.tasks import Task, collate, task_of
from fishertool.models.vectors import choose
from fishertool.registry import suggest
from fishertool.report import Files, data_files, public_name
from fishertool.selection import select

ADAPTER_FISHERS = ("merged", "adapter")


@dataclass(frozen=True)
class Source:
    """Where it comes from, as the command line says it."""

    model: str
    task: str = "auto"
    adapter: str | None = None
    adapter_fisher: str = "merged"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Subject:
    """What is known from headers and flags."""

    source: Source
    checkpoint: Checkpoint
    adapter: Adapter | None
    tensors: Checkpoint
    """Whose tensors the Fisher is of: the model's, or the adapter's own."""
    task: Task
    data: DataOptions
    wanted: list[str]

    @property
    def name(self) -> str:
        parts = (self.source.model, self.source.adapter)
        return "+".join(public_name(part) for part in parts if part)

    def fingerprint(self) -> str:
        """Of the weights that the Fisher is of."""
        if self.adapter is not None and self.tensors is self.checkpoint:
            return self.adapter.fingerprint_on(self.checkpoint)
        return self.tensors.fingerprint()

    def infos(self) -> list[TensorInfo]:
        return [self.tensors.info(name) for name in self.wanted]

    def layers(self) -> Mapping[str, Layer] | None:
        """The linear ones that the Fisher is of; None of an adapter's own, which all are."""
        if self.tensors is not self.checkpoint:
            return None
        return layers_of(self.checkpoint, self.source.trust_remote_code)

    def files(self) -> list[Files]:
        """All that was read, with digests."""
        found = [Files.of(public_name(self.source.model), "model", self.checkpoint.digests())]
        if self.source.adapter and self.adapter:
            name = public_name(self.source.adapter)
            found.append(Files.of(name, "adapter", self.adapter.tensors.digests()))
        return [*found, *data_files(self.data.data)]


@dataclass(frozen=True)
class LoadedSubject:
    subject: Subject
    model: LoadedModel
    parameters: dict[str, Tensor]
    """The wanted ones, by name on disk."""
    buffers: list[str]
    labels: Labels
    texts: CalibrationData
    warnings: list[str]

    @property
    def module(self) -> nn.Module:
        return self.model.module

    @property
    def probe(self) -> int:
        """The number of an example that is none of the data, to try the model on."""
        return len(self.texts.examples)

    @property
    def longer(self) -> int | None:
        """That of another such one, beside which the first is padded; None where all are as long."""
        return self.probe + 1 if len(self._examples) > self.probe + 1 else None

    @cached_property
    def _examples(self) -> list[Example]:
        short, longer = probes(self.texts.examples)
        return [*self.texts.examples, short, *([] if longer is None else [longer])]

    def batch(self, examples: Sequence[int]) -> Batch:
        device = str(self.model.device)
        return collate(self.subject.task, self._examples, examples, self.model.pad_id, device)

    def header(self, settings: Settings) -> FisherHeader:
        subject = self.subject
        return FisherHeader(
            kind="",
            labels=self.labels,
            task=subject.task.name,
            model=subject.name,
            fingerprint=subject.fingerprint(),
            examples=len(self.texts.examples),
            tokens=self.texts.tokens,
            token_ids_sha256=self.texts.fingerprint(),
            seed=subject.data.seed,
            draws=settings.draws,
            estimator=settings.estimator,
            group=settings.group,
            scale=self.model.scale,
            without=[name for name in self.buffers if name in subject.wanted],
        )


def find_subject(opened: ExitStack, source: Source, data: DataOptions) -> Subject:
    """Open the checkpoints and hold the flags against them; headers are all that is read.

    Raises InputError for data that are no file that can be read.
    """
    if source.adapter_fisher not in ADAPTER_FISHERS:
        raise UsageError(f"--adapter-fisher {suggest(source.adapter_fisher, ADAPTER_FISHERS)}")
    if source.adapter is None and source.adapter_fisher != "merged":
        raise UsageError("--adapter-fisher is for --adapter")
    check_data_source(data)
    folder = transformer_folder(hub.resolve(source.model))
    checkpoint = opened.enter_context(open_checkpoint(folder))
    adapter = None
    if source.adapter is not None:
        adapter = opened.enter_context(open_adapter(hub.resolve(source.adapter)))
    own = adapter is not None and source.adapter_fisher == "adapter"
    tensors = adapter.tensors if adapter is not None and own else checkpoint
    task = task_of(checkpoint.config(), checkpoint.folder, source.task)
    data = task.form.resolve(data, task.name)
    wanted = select(tensors, source.include, source.exclude)
    return Subject(source, checkpoint, adapter, tensors, task, data, wanted)


def load_subject(
    subject: Subject,
    settings: Settings,
    workers: Workers,
    device_map: str | None,
    check_finite: bool,
) -> LoadedSubject:
    """Load the model, put the adapter in its place, and read the data."""
    checkpoint, task, data = subject.checkpoint, subject.task, subject.data
    model = load_model(
        checkpoint,
        task,
        workers.loads_on,
        subject.source.trust_remote_code,
        data.scale,
        watch_experts=True,
        device_map=device_map,
    )
    warnings = list(model.warnings)
    if check_finite and (broken := model.nonfinite()):
        raise InputError(
            f"{checkpoint.folder}: {some(broken)} has NaN or Inf; repair it, or go on with "
            "--allow-nonfinite"
        )
    named, buffers = parameters_by_disk_name(model.pretrained, checkpoint)
    if (adapter := subject.adapter) is not None:
        adapter = adapter.fitted_to(model.pretrained)
        if settings.fsdp:
            raise UsageError("--adapter and --fsdp: merge the adapter first, or leave one out")
        if subject.tensors is checkpoint:
            adapter.merge_into(model.pretrained)
            warnings.append(f"{public_name(subject.source.adapter or '')} is merged into the model")
        else:
            named, buffers = adapter.attach(model.pretrained), []
    if settings.fsdp:
        named = dict(shard(model, named, workers.device, workers.shards))
    parameters = {name: named[name] for name in subject.wanted if name in named}
    if not parameters:
        raise UsageError("--include and --exclude leave no parameter")
    labels = resolve_labels(settings, task, len(model.labels or ()))
    texts = calibration.load(
        data,
        model.tokenizer,
        model.max_length,
        model.labels,
        task.form,
        need_labels=task.has_labels
        and (labels == "empirical" or data.label_column != DataOptions.label_column),
    )
    if data.select is not None:
        texts = workers.first_one(choose(texts, data, model))
    warnings += texts.warnings()
    return LoadedSubject(subject, model, parameters, buffers, labels, texts, warnings)
