"""Which task a checkpoint was made for, by what its config.json says of its architecture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fishertool.errors import InputError, UsageError
from fishertool.models.sentence import pipeline_of
from fishertool.registry import suggest

ENDINGS = {
    "sequence-classification": ("ForSequenceClassification",),
    "token-classification": ("ForTokenClassification",),
    "masked-lm": ("ForMaskedLM",),
    "causal-lm": ("ForCausalLM", "LMHeadModel"),
    "sequence-to-sequence": ("ForConditionalGeneration", "MTModel"),
    "embedding": ("Model",),
}
"""Tasks, and how the names of their architectures end; the first that fits is the one."""


def task_name(config: Mapping[str, Any], folder: str | Path, asked: str = "auto") -> str:
    """The task that says how to load a checkpoint, whether or not its head can be scored.

    A sentence-transformers folder is an embedding model whatever its architecture, and so is a
    bare model without a head; else config.json's architecture tells.
    """
    if asked != "auto":
        if asked not in ENDINGS:
            raise UsageError(f"--task {suggest(asked, ENDINGS)}")
        return asked
    if pipeline_of(Path(folder)) is not None:
        return "embedding"
    architectures = config.get("architectures") or []
    for task, endings in ENDINGS.items():
        fits = any(name.endswith(endings) for name in architectures)
        if fits and fits_decoder(task, config):
            return task
    raise InputError(
        f"{folder}: no task follows from its architecture ({', '.join(architectures) or 'none given'})"
        f"; tasks so far: {', '.join(ENDINGS)}"
    )


def fits_decoder(task: str, config: Mapping[str, Any]) -> bool:
    """Whether the model has a decoder behind its encoder if the task needs one, and none if it
    cannot use one. Models of images and text are ForConditionalGeneration too, without."""
    alone = any(name.endswith("EncoderModel") for name in config.get("architectures") or [])
    both = bool(config.get("is_encoder_decoder")) and not alone
    needed = {"sequence-to-sequence": True, "embedding": False}
    return needed.get(task, both) == both
