"""Recovery: the factors that were written, trained for some steps, in their place."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fishertool import calibration
from fishertool.calibration import CalibrationData, DataOptions
from fishertool.checkpoint.digest import FileDigest
from fishertool.checkpoint.dtypes import TORCH
from fishertool.checkpoint.layout import Layout
from fishertool.checkpoint.reader import Checkpoint, open_checkpoint
from fishertool.checkpoint.stream import pieces
from fishertool.checkpoint.writer import CheckpointWriter
from fishertool.errors import UsageError
from fishertool.models.loading import load_model
from fishertool.models.names import parameters_by_disk_name
from fishertool.models.recovery import Recovery, check_trained, recover
from fishertool.models.tasks import task_of

FACTORS = (".down", ".up")


@dataclass(frozen=True)
class Finetuning:
    """How factors are trained. Raises UsageError for numbers out of range."""

    steps: int
    data: DataOptions
    learning_rate: float = 3e-4
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"--finetune-steps {self.steps} is not at least 1")
        if not 0 < self.learning_rate < float("inf"):
            raise UsageError(f"--learning-rate {self.learning_rate:g} is not above 0")


def training_data(
    checkpoint: Checkpoint, how: Finetuning, trust_remote_code: bool
) -> CalibrationData:
    """What the factors of this model are to be trained on; its weights are not read.

    Raises InputError for data that cannot be read, or without labels.
    """
    task = task_of(checkpoint.config(), checkpoint.folder)
    model = load_model(checkpoint, task, "meta", trust_remote_code)
    return calibration.load(
        task.form.resolve(how.data, task.name),
        model.tokenizer,
        model.max_length,
        model.labels,
        task.form,
        need_labels=task.has_labels,
    )


def recover_factors(
    folder: Path,
    layout: Layout,
    how: Finetuning,
    texts: CalibrationData,
    device: str,
    trust_remote_code: bool,
    advance: Callable[[int], None],
) -> tuple[list[FileDigest], Recovery]:
    """Train the factors of the low-rank checkpoint in `folder`, and write them over the old ones.

    Raises InputError for data without labels, and where the loss, or a factor as it is stored, is
    not finite.
    """
    trained = folder / "trained"
    trained.mkdir()
    with open_checkpoint(folder) as written:
        task = task_of(written.config(), folder)
        model = load_model(written, task, device, trust_remote_code)
        parameters, _ = parameters_by_disk_name(model.pretrained, written)
        done = recover(
            model, task, texts,
            steps=how.steps, learning_rate=how.learning_rate, batch_size=how.batch_size,
            seed=how.data.seed, advance=advance,
        )  # fmt: skip
        with CheckpointWriter(trained, layout) as writer, torch.no_grad():
            factors = {name for name in parameters if name.rpartition(".")[0].endswith(FACTORS)}
            for tensor in layout.tensors:
                if tensor.name in factors:
                    values = parameters[tensor.name].to("cpu", TORCH[tensor.dtype])
                    check_trained(tensor.name, values)
                    writer.write(tensor.name, values)
                    continue
                for piece in pieces([tensor]):
                    values = written.read(piece.name, piece.start, piece.stop)
                    writer.write(piece.name, values, piece.start)
            digests = writer.finish()
    for path in trained.iterdir():
        path.replace(folder / path.name)
    trained.rmdir()
    return digests, done
