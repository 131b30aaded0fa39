"""What a checkpoint predicts, and how its data become batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fishertool.calibration import UNSCORED, Example, Form
from fishertool.calibration.forms import FORMS
from fishertool.errors import InputError
from fishertool.fisher.batches import Batch
from fishertool.models.architectures import task_name

LABELS = "labels"


@dataclass(frozen=True)
class Task:
    name: str
    auto_class: str
    """The transformers class that loads it."""
    form: Form
    """What its data look like."""
    has_labels: bool
    """Whether targets are classes of the model's head, from a label column."""
    one_prediction: bool
    """Whether an example is one choice among few, so that the mean over all of them is at hand."""
    targets: Callable[[Sequence[Example]], Tensor]
    """[example] or [example, time], UNSCORED where nothing is predicted."""


def _one_class(examples: Sequence[Example]) -> Tensor:
    return torch.tensor([0 if example.label is None else example.label for example in examples])


def _in_place(examples: Sequence[Example]) -> Tensor:
    """A target for every token of the text."""
    return _padded([list(one.targets or ()) for one in examples], UNSCORED, _time(examples))


def _next_tokens(examples: Sequence[Example]) -> Tensor:
    """The target of a token is scored at the token before it."""
    tokens = [
        example.inputs["input_ids"] if example.targets is None else list(example.targets)
        for example in examples
    ]
    targets = _padded(tokens, UNSCORED, _time(examples)).roll(-1, dims=1)
    targets[:, -1] = UNSCORED
    return targets


def _labels(examples: Sequence[Example]) -> Tensor:
    """The decoder's targets, [example, time]: among padding never as many columns as the encoder's
    input has, which is how tensors of the two are told apart."""
    labels = [example.inputs[LABELS] for example in examples]
    longest = max(map(len, labels))
    padded = len({(one.length, len(one.inputs[LABELS])) for one in examples}) > 1
    return _padded(labels, UNSCORED, longest + (padded and longest == _time(examples)))


def _the_positive(examples: Sequence[Example]) -> Tensor:
    return torch.zeros(len(examples), dtype=torch.long)


TASKS = {
    task.name: task
    for task in (
        Task(
            "sequence-classification",
            "AutoModelForSequenceClassification",
            FORMS["labelled texts"],
            has_labels=True,
            one_prediction=True,
            targets=_one_class,
        ),
        Task(
            "token-classification",
            "AutoModelForTokenClassification",
            FORMS["labelled words"],
            has_labels=True,
            one_prediction=False,
            targets=_in_place,
        ),
        Task(
            "masked-lm",
            "AutoModelForMaskedLM",
            FORMS["masked texts"],
            has_labels=False,
            one_prediction=False,
            targets=_in_place,
        ),
        Task(
            "causal-lm",
            "AutoModelForCausalLM",
            FORMS["texts"],
            has_labels=False,
            one_prediction=False,
            targets=_next_tokens,
        ),
        Task(
            "sequence-to-sequence",
            "AutoModelForSeq2SeqLM",
            FORMS["texts and targets"],
            has_labels=False,
            one_prediction=False,
            targets=_labels,
        ),
        Task(
            "embedding",
            "AutoModel",
            FORMS["queries"],
            has_labels=False,
            one_prediction=True,
            targets=_the_positive,
        ),
    )
}


def task_of(config: dict[str, Any], folder: str | Path, asked: str = "auto") -> Task:
    """The task asked for, or the one the checkpoint was made for, if its examples can be scored.

    Raises InputError for a head whose outputs are no probabilities of classes.
    """
    task = TASKS[task_name(config, folder, asked)]
    problem = config.get("problem_type") or ""
    if task.has_labels and len(config.get("id2label") or "01") < 2:
        problem = "regression"
    if task.has_labels and problem in ("regression", "multi_label_classification"):
        raise InputError(
            f"{folder}: its head is for {problem.replace('_', ' ')} (config.json), which is not "
            "served yet; served are models that choose one of several classes"
        )
    return task


def collate(
    task: Task, examples: Sequence[Example], indices: Sequence[int], pad_id: int, device: str
) -> Batch:
    """Pad on the right to the longest; inputs and targets are [example, time] (targets of one
    prediction [example]; inputs of queries [example, text, time], with as many texts each)."""
    chosen = [examples[index] for index in indices]
    texts = [text for example in chosen for text in example.texts]
    time = _time(chosen)
    inputs = {
        name: _padded([text[name] for text in texts], pad_id if name == "input_ids" else 0, time)
        for name in texts[0]
        if name != LABELS
    }
    inputs["attention_mask"] = _padded([[1] * len(text["input_ids"]) for text in texts], 0, time)
    if LABELS in texts[0]:
        inputs[LABELS] = _labels(chosen)
        inputs["decoder_attention_mask"] = (inputs[LABELS] != UNSCORED).long()
    if chosen[0].candidates:
        inputs = {
            name: tensor.reshape(len(chosen), -1, tensor.shape[1])
            for name, tensor in inputs.items()
        }
    targets = task.targets(chosen)
    return Batch(
        {name: tensor.to(device) for name, tensor in inputs.items()},
        targets.clamp(min=0).to(device),
        (targets != UNSCORED).to(device),
        indices,
        rows_each=len(chosen[0].texts),
    )


def _time(examples: Sequence[Example]) -> int:
    """Columns of the input."""
    return max(len(text["input_ids"]) for one in examples for text in one.texts)


def _padded(lists: Sequence[list[int]], fill: int, time: int) -> Tensor:
    return torch.tensor([ids + [fill] * (time - len(ids)) for ids in lists])
