"""Names on disk <-> names in memory, as transformers itself translates them."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fishertool.checkpoint.dtypes import FLOATING
from fishertool.checkpoint.reader import Checkpoint
from fishertool.errors import InputError, some


def parameters_by_disk_name(
    module: nn.Module, checkpoint: Checkpoint
) -> tuple[dict[str, nn.Parameter], list[str]]:
    """Each floating-point tensor of the checkpoint with its parameter, and the names of buffers.

    Raises InputError, listing the names, if a parameter is not on disk under one name, or a
    tensor on disk is neither parameter nor buffer. Of tied names, the one on disk counts.
    """
    found: dict[str, nn.Parameter] = {}
    aliases: set[str] = set()
    lost: list[str] = []
    parameters: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        parameters.setdefault(id(parameter), (parameter, []))[1].append(name)
    for parameter, names in parameters.values():
        on_disk = [name for name in _disk_names(module, names) if name in checkpoint]
        if not on_disk or checkpoint.info(on_disk[0]).shape != tuple(parameter.shape):
            lost += names[:1]
            continue
        found[on_disk[0]] = parameter
        aliases.update(on_disk[1:])
    if lost:
        raise InputError(
            f"{checkpoint.folder}: has no tensor of the same name and shape for the model's "
            f"{some(lost)}; checkpoints whose tensors are fused or split on load are not served yet"
        )
    buffers = set(_disk_names(module, [name for name, _ in module.named_buffers()]))
    rest = [
        name
        for name in checkpoint
        if name not in found and name not in aliases and checkpoint.info(name).dtype in FLOATING
    ]
    ignored = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or []
    unknown = [
        name
        for name in rest
        if name not in buffers and not any(re.search(pattern, name) for pattern in ignored)
    ]
    if unknown:
        raise InputError(f"{checkpoint.folder}: the model has no parameter for {some(unknown)}")
    ordered = {name: found[name] for name in checkpoint if name in found}
    return ordered, rest


def _disk_names(module: nn.Module, names: Iterable[str]) -> list[str]:
    """The names these parameters may have on disk.

    First those that `save_pretrained` gives; then the same without the base model's prefix, for
    the checkpoint of a base model loaded into one with a head, and with it, for the reverse.
    """
    from transformers.core_model_loading import revert_weight_conversion

    nothing = torch.empty(0)
    saved: list[str] = []
    for in_memory in names:
        try:
            saved += revert_weight_conversion(module, {in_memory: nothing})
        except (IndexError, RuntimeError, ValueError):  # fused on load: no one name on disk
            saved.append(in_memory)
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    bare = [name.removeprefix(prefix) for name in saved if name.startswith(prefix)]
    return saved + bare + [prefix + name for name in saved]


def head_names(config: dict[str, Any], names: Iterable[str], folder: Any) -> list[str]:
    """Tensors outside the architecture's base model: a classifier, a language model's output layer.

    Empty for a base model alone. Raises InputError for an architecture transformers does not have.
    """
    import transformers

    architectures = config.get("architectures") or []
    model_class = getattr(transformers, architectures[0], None) if architectures else None
    if model_class is None:
        raise InputError(
            f"{folder}: its head cannot be told from its body: architecture "
            f"{', '.join(architectures) or 'not given'} is not in transformers"
        )
    prefix = f"{model_class.base_model_prefix}."
    names = list(names)
    if not any(name.startswith(prefix) for name in names):
        return []
    return [name for name in names if not name.startswith(prefix)]


def tied_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Tensors that are on disk twice though the architecture ties them: the copy -> the original.

    Only where their bytes agree; transformers loads them apart where they do not.
    """
    config = checkpoint.config()
    vocabulary = config.get("vocab_size")
    rows = [name for name in checkpoint if checkpoint.info(name).shape[:1] == (vocabulary,)]
    if len(rows) < 2 or not config.get("tie_word_embeddings", True):
        return {}
    import transformers

    architecture = (config.get("architectures") or [""])[0]
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        return {}
    parsed = transformers.AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    with torch.device("meta"):
        ties = model_class(parsed).all_tied_weights_keys
    return {
        copy: original
        for copy, original in ties.items()
        if copy in checkpoint
        and original in checkpoint
        and torch.equal(checkpoint[copy].view(torch.uint8), checkpoint[original].view(torch.uint8))
    }
