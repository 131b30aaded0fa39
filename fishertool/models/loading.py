"""Load a model and its tokenizer, or stop: never with weights that are not in the checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fishertool.checkpoint.dtypes import FLOATING
from fishertool.checkpoint.reader import Checkpoint
from fishertool.errors import InputError, UsageError, some
from fishertool.models.tasks import Task

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")


@dataclass(frozen=True)
class LoadedModel:
    module: nn.Module
    tokenizer: Any
    pad_id: int
    labels: dict[str, int] | None
    """Class names -> ids, for a classifier."""
    max_length: int | None
    """Positions the model has, where it says so."""


def load_model(
    checkpoint: Checkpoint, task: Task, device: str = "cpu", trust_remote_code: bool = False
) -> LoadedModel:
    """Load in eval mode, in the stored dtype (float16 as float32: its squares would underflow).

    Raises InputError if transformers finds a tensor missing, of another shape, or left over.
    """
    import transformers

    config = checkpoint.config()
    _quieten(transformers)
    half = any(checkpoint.info(name).dtype == "F16" for name in checkpoint)
    try:
        module, found = getattr(transformers, task.auto_class).from_pretrained(
            checkpoint.folder,
            dtype=torch.float32 if half else "auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, by name
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    except (ValueError, KeyError, OSError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{checkpoint.folder}: transformers cannot load it: {reason}") from error
    missing = sorted(found["missing_keys"])
    mismatched = sorted(
        f"{name} ({list(on_disk)} on disk, {list(wanted)} in the model)"
        for name, on_disk, wanted in found["mismatched_keys"]
    )
    left_over = sorted(
        name
        for name in found["unexpected_keys"]
        if name not in checkpoint or checkpoint.info(name).dtype in FLOATING
    )
    for names, fault in (
        (missing, "lacks tensors the model needs"),
        (mismatched, "has tensors of another shape than the model"),
        (left_over, "has tensors the model does not use"),
    ):
        if names:
            raise InputError(
                f"{checkpoint.folder}: {fault} as {type(module).__name__}: {some(names)}; "
                "check config.json's architectures, or give --task"
            )
    tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code)
    pad_id = next(
        (
            token
            for token in (
                tokenizer.pad_token_id,
                module.config.pad_token_id,
                tokenizer.eos_token_id,
            )
            if token is not None
        ),
        0,
    )
    module.config.pad_token_id = pad_id  # classifiers on decoders find the last token by it
    vocabulary = module.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocabulary:
        raise InputError(
            f"{checkpoint.folder}: the tokenizer has {len(tokenizer)} tokens, "
            f"the model embeds {vocabulary}; use the tokenizer it was trained with"
        )
    labels = {str(name): int(id_) for id_, name in module.config.id2label.items()}
    return LoadedModel(
        module.eval().to(device),
        tokenizer,
        pad_id,
        labels if task.has_labels else None,
        config.get("max_position_embeddings") or config.get("n_positions"),
    )


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The folder's own tokenizer."""
    import transformers

    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise InputError(f"{folder}: has no tokenizer files; copy them from the original model")
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (ValueError, KeyError, OSError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder}: its tokenizer cannot be loaded: {reason}") from error


def check_device(device: str) -> str:
    """The device to compute on; `auto` is the accelerator if there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: {str(error).splitlines()[0]}") from error
    return device


def _quieten(transformers: Any) -> None:
    """What it warns of, this project checks; its progress bars are not ours."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
