"""What a search makes large or small: metrics of data, and figures that cost no evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any, Literal

from fishertool.calibration import DataOptions
from fishertool.errors import InputError
from fishertool.evaluation.measure import HIGHER_IS_BETTER, OF_TWO
from fishertool.recipe.document import Value
from fishertool.recipe.settings import scalar

FREE = {"distance": False, "sparsity": True, "size": False, "predicted_loss": False}
"""What a merge tells without data, and whether more of it is better: the mean of
abs(theta - theta_0) over weights, the share of weights that are the base's, bytes, and the sum over
the models (or one, `model`) of the predicted increase of their losses in nats an example."""
KEYS = ("metric", "direction", "name", "reference", "model")
LEAST = {"max_length": 2, "in_batch_negatives": 2, "seed": 0}
"""Of whole numbers, as the flags have it; of the others 1."""
DIRECTIONS = {"maximize": True, "minimize": False}


@dataclass(frozen=True)
class Objective:
    name: str
    metric: str
    maximize: bool
    data: DataOptions | None
    """What it is measured on; None for one of FREE."""
    model: str | None = None
    """Whose predicted loss, as the recipe names it."""
    reference: float | None = None
    """The worst value that counts for the hypervolume, in its own units."""

    @property
    def sign(self) -> int:
        """What makes larger better."""
        return 1 if self.maximize else -1

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        return "maximize" if self.maximize else "minimize"


def read_objectives(value: Value) -> list[Objective]:
    """Objectives from a search's document. Raises UsageError, naming the place, for what is wrong."""
    found = [_parse(item) for item in value.items()]
    names = [objective.name for objective in found]
    for item, name in zip(value.items(), names, strict=True):
        if names.count(name) > 1:
            raise item.error(f"two objectives are called {name!r}; give one of them a name")
    given = [objective.reference is not None for objective in found]
    if any(given) and not all(given):
        raise value.error("give a reference to every objective, or to none")
    return found


def _parse(value: Value) -> Objective:
    data_keys = tuple(field.name for field in fields(DataOptions))
    given = value.keys([*KEYS, *data_keys, *(key.replace("_", "-") for key in data_keys)])
    keys = {key.replace("-", "_"): item for key, item in given.items()}
    if len(keys) < len(given):
        raise value.error("a key is there twice, with - and with _")
    if "metric" not in keys:
        raise value.error("an objective needs a metric")
    offered = [*(metric for metric in HIGHER_IS_BETTER if metric not in OF_TWO), *FREE]
    metric = Value(keys["metric"].text().replace("-", "_"), value.file, keys["metric"].place)
    word = metric.word(offered)
    maximize = (HIGHER_IS_BETTER | FREE)[word]
    if "direction" in keys:
        maximize = DIRECTIONS[keys["direction"].word(DIRECTIONS)]
    options = {name: keys[name] for name in data_keys if name in keys}
    if word in FREE and options:
        raise value.error(f"{word} is not measured on data; leave out {', '.join(options)}")
    if word not in FREE and "data" not in options:
        raise value.error(f"{word} needs data, the file or data set it is measured on")
    if "model" in keys and word != "predicted_loss":
        raise keys["model"].error("is for predicted_loss, which each model has")
    data = None if word in FREE else _data_options(options)
    model = keys["model"].text() if "model" in keys else None
    of = data.data.rpartition("/")[2].rpartition(".")[0] or data.data if data else model
    return Objective(
        keys["name"].text() if "name" in keys else f"{word} of {of}" if of else word,
        word,
        maximize,
        data,
        model,
        _number(keys["reference"]) if "reference" in keys else None,
    )


def _data_options(given: Mapping[str, Value]) -> DataOptions:
    """Each value by the type its flag has."""
    types = {field.name: str(field.type) for field in fields(DataOptions)}
    found: dict[str, Any] = {}
    for name, value in given.items():
        if "bool" in types[name]:
            found[name] = value.flag()
        elif "int" in types[name]:
            found[name] = value.whole(LEAST.get(name, 1))
        elif "float" in types[name]:
            found[name] = _number(value)
        else:
            found[name] = value.text()
    return DataOptions(**found)


def _number(value: Value) -> float:
    found = scalar(value.content)
    if isinstance(found, str | bool) or found is None:
        raise value.wrong("a finite number")
    return float(found)


def values_of(
    objectives: Sequence[Objective],
    measured: Mapping[DataOptions, Mapping[str, float]],
    free: Mapping[str, Any],
    models: Sequence[str],
) -> list[float]:
    """The value of every objective of one merge, each in its own units.

    measured  metrics by the data they are of
    free      the figures of FREE; `predicted_loss` one a model
    models    as the recipe names them

    Raises InputError for a value that is no finite number.
    """
    found = []
    for objective in objectives:
        if objective.data is not None:
            value = measured[objective.data][objective.metric]
        elif objective.metric == "predicted_loss":
            losses = free["predicted_loss"]
            value = (
                sum(losses) if objective.model is None else losses[models.index(objective.model)]
            )
        else:
            value = free[objective.metric]
        if value is None or not isfinite(value):
            raise InputError(f"{objective.name} is {'not told' if value is None else value}")
        found.append(float(value))
    return found
