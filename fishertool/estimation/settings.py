"""What is to be estimated, and how; what does not go together is refused here."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import cast, get_args

from fishertool.errors import UsageError
from fishertool.fisher.estimate import Estimator
from fishertool.fisher.kinds import KINDS
from fishertool.fisher.labels import DRAWN, Labels
from fishertool.models.tasks import Task
from fishertool.registry import suggest

AUTO_EXPECTED_CLASSES = 8
"""`--labels auto` takes the exact mean over classes while it costs so few backward passes."""
BANK_DTYPES = {"bfloat16": "BF16", "float32": "F32"}
WITH_TRACES = ("diagonal", "factored")


@dataclass(frozen=True)
class Settings:
    """All that decides the numbers, besides the model and the data."""

    kind: str = "diagonal"
    """One or several of KINDS, with commas."""
    labels: str = "auto"
    draws: int = 1
    max_classes: int = 64
    """The most classes over which `expected` labels are summed."""
    estimator: str = "exact"
    group: int = 1
    """Examples whose mean is one gradient of a rank-one bank."""
    bank_dtype: str = "bfloat16"
    until_relative_error: float | None = None
    """Stop when every tensor's trace is known this well."""
    skip_nonfinite: bool = False
    batch_size: str = "auto"
    fsdp: bool = False
    """Shard the weights over the processes, all of whose batches make a unit of `signed`."""
    with_mean_gradient: bool = False
    """Adds the kind `mean-gradient`."""

    @property
    def kinds(self) -> list[str]:
        """In the order of KINDS."""
        asked = {one.strip() for one in self.kind.split(",")}
        if self.with_mean_gradient:
            asked.add("mean-gradient")
        return [one for one in KINDS if one in asked]

    @property
    def examples_a_batch(self) -> int | None:
        """None where micro-batches go by tokens."""
        return None if self.batch_size == "auto" else int(self.batch_size)


def check_settings(settings: Settings) -> None:
    """Raises UsageError for an unknown word, and for what does not go together."""
    for one in settings.kind.split(","):
        if one.strip() not in KINDS:
            raise UsageError(f"--kind {suggest(one.strip(), KINDS)}")
    for flag, value, known in (
        ("--labels", settings.labels, ("auto", *get_args(Labels))),
        ("--estimator", settings.estimator, get_args(Estimator)),
        ("--bank-dtype", settings.bank_dtype, tuple(BANK_DTYPES)),
    ):
        if value not in known:
            raise UsageError(f"{flag} {suggest(value, known)}")
    if settings.batch_size != "auto" and not (
        settings.batch_size.isdecimal() and int(settings.batch_size)
    ):
        raise UsageError(f"--batch-size {settings.batch_size!r}: auto, or a number of examples")
    kinds = settings.kinds
    if settings.labels != "auto" and set(kinds) == {"activation"}:
        raise UsageError(
            f"--labels {settings.labels}: --kind activation is of forward passes alone, which use "
            "none; leave it out"
        )
    if settings.labels != "auto":
        _check_draws(settings, settings.labels)
    if "rank-one" in kinds:
        _check_bank(settings)
    else:
        defaults = Settings()
        for flag in ("group", "bank_dtype"):
            if getattr(settings, flag) != getattr(defaults, flag):
                name = flag.replace("_", "-")
                raise UsageError(f"--{name} is for --kind rank-one, not {settings.kind}")
    if "mean-gradient" in kinds and settings.labels not in ("auto", "empirical"):
        raise UsageError(
            f"--labels {settings.labels}: a mean gradient is of the data's labels, for over those "
            "of the model it tends to zero; use empirical, or estimate it by itself"
        )
    if settings.estimator == "signed" and (other := _others(kinds, WITH_TRACES)):
        raise UsageError(f"--estimator signed estimates a diagonal or factored Fisher, not {other}")
    if settings.fsdp and settings.estimator != "signed":
        raise UsageError(
            "--fsdp needs --estimator signed: no process sees a layer's whole weights, by which "
            "examples are told apart"
        )
    if settings.until_relative_error is not None and not set(kinds) & set(WITH_TRACES):
        raise UsageError(
            "--until-relative-error goes by the traces of a diagonal or factored Fisher; "
            "add one to --kind"
        )


def _check_bank(settings: Settings) -> None:
    if settings.labels == "expected" or settings.draws > 1:
        raise UsageError(
            "--kind rank-one keeps one gradient an example: use --labels sampled or "
            "expected-signed with one draw, or empirical"
        )
    if settings.skip_nonfinite or settings.until_relative_error is not None:
        raise UsageError(
            "--kind rank-one writes a member an example, known before the run: "
            "--skip-nonfinite and --until-relative-error do not go with it"
        )


def _others(kinds: Collection[str], allowed: Collection[str]) -> str:
    return ", ".join(kind for kind in kinds if kind not in allowed)


def resolve_labels(settings: Settings, task: Task, classes: int) -> Labels:
    """What `auto` means for this task and number of classes.

    Raises UsageError for an exact mean that is out of reach, or over more classes than allowed;
    and for draws of labels that are not drawn.
    """
    if settings.labels == "expected" and not task.one_prediction:
        raise UsageError(
            f"--labels expected: a mean over every label of a {task.name} is out of reach; "
            "use expected-signed or sampled, its unbiased estimates"
        )
    if settings.labels == "expected" and classes > settings.max_classes:
        raise UsageError(
            f"--labels expected: takes {classes - 1} backward passes a batch for {classes} classes; "
            f"use expected-signed, its unbiased estimate by one, or --max-classes {classes}"
        )
    labels = settings.labels if settings.labels != "auto" else _auto_labels(settings, task, classes)
    _check_draws(settings, labels)
    return cast(Labels, labels)


def _auto_labels(settings: Settings, task: Task, classes: int) -> str:
    if not task.has_labels or "mean-gradient" in settings.kinds:
        return "empirical"
    few = task.one_prediction and classes <= AUTO_EXPECTED_CLASSES
    return "expected" if few and "rank-one" not in settings.kinds else "sampled"


def _check_draws(settings: Settings, labels: str) -> None:
    if settings.draws > 1 and labels not in DRAWN:
        raise UsageError(
            f"--draws {settings.draws}: labels are {labels}, and none is drawn; "
            f"use --labels {' or '.join(DRAWN)}"
        )
