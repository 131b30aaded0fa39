"""What a checkpoint predicts, and how its data becomes batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fishertool.calibration import Example
from fishertool.errors import InputError, UsageError
from fishertool.fisher.estimate import Batch
from fishertool.registry import suggest


@dataclass(frozen=True)
class Task:
    name: str
    architecture_suffixes: tuple[str, ...]
    auto_class: str
    """The transformers class that loads it."""
    has_labels: bool
    """Whether a target is one label a text, rather than the text's own next tokens."""
    targets: Callable[[Sequence[Example], Tensor, Tensor], tuple[Tensor, Tensor]]
    """(examples, ids, mask) -> targets and scored, as Batch describes them."""


def _class_targets(examples: Sequence[Example], ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    labels = [0 if example.label is None else example.label for example in examples]
    return torch.tensor(labels), torch.ones(len(examples), dtype=torch.bool)


def _next_tokens(examples: Sequence[Example], ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    scored = mask.bool()
    scored[:, :-1] &= scored[:, 1:].clone()
    scored[:, -1] = False
    return ids.roll(-1, dims=1), scored


TASKS = {
    task.name: task
    for task in (
        Task(
            "sequence-classification",
            ("ForSequenceClassification",),
            "AutoModelForSequenceClassification",
            True,
            _class_targets,
        ),
        Task(
            "causal-lm",
            ("ForCausalLM", "LMHeadModel"),
            "AutoModelForCausalLM",
            False,
            _next_tokens,
        ),
    )
}


def task_of(config: dict[str, Any], folder: Any, asked: str = "auto") -> Task:
    """The task asked for, or the one config.json's architecture was made for."""
    if asked != "auto":
        if asked not in TASKS:
            raise UsageError(f"--task {suggest(asked, TASKS)}")
        return TASKS[asked]
    architectures = config.get("architectures") or []
    for task in TASKS.values():
        if any(name.endswith(task.architecture_suffixes) for name in architectures):
            return task
    raise InputError(
        f"{folder}: no task follows from its architecture ({', '.join(architectures) or 'none given'})"
        f"; tasks so far: {', '.join(TASKS)}"
    )


def collate(
    task: Task, examples: Sequence[Example], indices: Sequence[int], pad_id: int, device: str
) -> Batch:
    """Pad on the right to the longest; inputs and targets are [example, time] (targets of a
    classifier [example])."""
    chosen = [examples[index] for index in indices]
    longest = max(example.length for example in chosen)
    inputs = {
        name: torch.tensor(
            [
                ids + [pad_id if name == "input_ids" else 0] * (longest - len(ids))
                for ids in (example.inputs[name] for example in chosen)
            ]
        )
        for name in chosen[0].inputs
    }
    lengths = torch.tensor([example.length for example in chosen])
    mask = (torch.arange(longest) < lengths.unsqueeze(1)).long()
    targets, scored = task.targets(chosen, inputs["input_ids"], mask)
    inputs["attention_mask"] = mask
    return Batch(
        {name: tensor.to(device) for name, tensor in inputs.items()},
        targets.to(device),
        scored.to(device),
        indices,
    )
