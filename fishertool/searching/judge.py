"""What a choice among models is made by: each is measured on the same data, which are read once."""

from pathlib import Path

from fishertool.calibration import DataOptions
from fishertool.checkpoint.reader import open_checkpoint
from fishertool.evaluation.measure import load, measure, prepare
from fishertool.models.loading import LoadedModel, load_model
from fishertool.models.tasks import Task


class Judge:
    """Measures models of one task, on data that the model `reading` has the tokenizer for."""

    def __init__(
        self,
        task: Task,
        options: DataOptions,
        reading: LoadedModel,
        batch_size: int,
        device: str,
        trust_remote_code: bool,
    ):
        self.task, self.batch_size, self.device = task, batch_size, device
        self.trust_remote_code = trust_remote_code
        self.data = load(task, options, reading)
        self._prepared = prepare(task, self.data)
        self._told: list[str] = []

    def of(self, model: LoadedModel, against: LoadedModel | None = None) -> dict[str, float]:
        return measure(
            model, self.task, self._prepared, against=against,
            batch_size=self.batch_size, warn=self._told.append,
        )  # fmt: skip

    def of_folder(self, folder: Path, against: LoadedModel | None = None) -> dict[str, float]:
        """Of an output, loaded as its users load it."""
        with open_checkpoint(folder) as checkpoint:
            model = load_model(checkpoint, self.task, self.device, self.trust_remote_code)
        return self.of(model, against)

    def warnings(self) -> list[str]:
        """Of the data, and of what was measured so far."""
        return [*self.data.warnings(), *dict.fromkeys(self._told)]
