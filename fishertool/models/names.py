"""Names on disk <-> names in memory, as transformers itself translates them."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fishertool.checkpoint.contents import Contents
from fishertool.checkpoint.reader import Checkpoint
from fishertool.checkpoint.source import TensorSource
from fishertool.checkpoint.stored import FLOATING
from fishertool.errors import InputError, some
from fishertool.models.buffers import is_old_buffer
from fishertool.models.probes import Origin, origins


def parameters_by_disk_name(
    module: nn.Module, checkpoint: Checkpoint
) -> tuple[dict[str, Tensor], list[str]]:
    """Each floating-point tensor of the checkpoint with its parameter, and the names of buffers.

    Where transformers fuses on load (one expert's matrix becomes a slice of a stack), the tensor's
    part of the parameter: a view of it, shaped as on disk.

    Raises InputError, listing the names, if a parameter is not on disk in whole, or a tensor on
    disk is neither parameter nor buffer. Of tied names, the one on disk counts.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    on_disk = _origins_on_disk(module, checkpoint)
    found: dict[str, Tensor] = {}
    taken: dict[tuple[int, Origin], str] = {}
    covered: dict[int, int] = defaultdict(int)
    main = dict(module.named_parameters())
    for name, origin in sorted(on_disk.items(), key=lambda item: item[1].name not in main):
        if origin.name not in parameters:
            continue
        parameter = parameters[origin.name]
        place = id(parameter), replace(origin, name="")
        if checkpoint.info(name).shape == origin.shape and place not in taken:
            taken[place] = name
            found[name] = origin.of(parameter)
            covered[id(parameter)] += found[name].numel()
    computed = set(getattr(module, "_keys_to_ignore_on_save", None) or ())  # Marian's positions
    lost = [
        name
        for name, parameter in main.items()
        if covered[id(parameter)] != parameter.numel() and name not in computed
    ]
    if lost:
        raise InputError(
            f"{checkpoint.folder}: has no tensor of the same name and shape for the model's "
            f"{some(lost)}, nor parts that make it up; put together otherwise is not served yet"
        )
    aliases = {name for name, origin in on_disk.items() if origin.name in parameters}
    rest = [
        name
        for name in checkpoint
        if name not in aliases and checkpoint.info(name).dtype in FLOATING
    ]
    unknown = [
        name for name in rest if name not in on_disk and not _is_ignored(module, checkpoint, name)
    ]
    if unknown:
        raise InputError(f"{checkpoint.folder}: the model has no parameter for {some(unknown)}")
    ordered = {name: found[name] for name in checkpoint if name in found}
    _check_ends(ordered, checkpoint)
    return ordered, rest


def _is_ignored(module: nn.Module, checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor that the model has none for is no fault of the checkpoint."""
    patterns = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or []
    return is_old_buffer(name, checkpoint.info(name).shape) or any(
        re.search(pattern, name) for pattern in patterns
    )


def ignored_buffers(source: TensorSource) -> list[str]:
    """Tensors on disk that are no weights: buffers which the architecture now computes.

    None of an architecture that transformers does not have, and none that the model still saves.
    """
    found = [name for name in source if is_old_buffer(name, source.info(name).shape)]
    model = empty_model(source) if found else None
    if model is None:
        return []
    saved = origins_by_disk_name(model, model.state_dict(), source.folder)
    return [name for name in found if name not in saved]


def _origins_on_disk(module: nn.Module, checkpoint: TensorSource) -> dict[str, Origin]:
    """Names on disk -> where their tensors lie in the model."""
    tensors = {
        **dict(module.named_buffers()),
        **dict(module.named_parameters(remove_duplicate=False)),
    }
    names = origins_by_disk_name(module, tensors, checkpoint.folder)
    return {name: one for name, one in names.items() if one and name in checkpoint}


def origins_by_disk_name(
    module: nn.Module, tensors: Mapping[str, Tensor], folder: Any
) -> dict[str, Origin | None]:
    """All names that tensors of the model may have on disk -> where they lie; None where they are
    no view of one tensor.

    A name is that which `save_pretrained` gives; or the same without the base model's prefix, for
    the checkpoint of a base model loaded into one with a head, or with it, for the reverse.
    """
    try:
        saved = origins(module, tensors)
    except (IndexError, KeyError, RuntimeError, ValueError) as error:
        raise InputError(
            f"{folder}: transformers cannot tell how it saves a "
            f"{type(module).__name__}: {reason_of(error)}"
        ) from error
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    bare = {name.removeprefix(prefix): origin for name, origin in saved.items()}
    full = {prefix + name: origin for name, origin in saved.items()}
    return full | bare | saved


def _check_ends(views: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    """The first and last row of every part of a parameter, against the file: a wrong order shows."""
    wrong = []
    for name, view in views.items():
        rows = checkpoint.info(name).rows
        if isinstance(view, nn.Parameter) or not rows:
            continue
        for ours, row in ((0, 0), (-1, rows - 1)):
            stored = checkpoint.read(name, row, row + 1).flatten().to(view.dtype)
            loaded = view[(ours,) * max(view.dim() - 1, 1)].detach().flatten().cpu()
            if not torch.equal(stored.nan_to_num(), loaded.nan_to_num()):
                wrong.append(name)
                break
    if wrong:
        raise InputError(
            f"{checkpoint.folder}: {some(wrong)} did not arrive where transformers would save it "
            "from; its parts of the model cannot be told apart"
        )


def head_names(source: TensorSource) -> list[str]:
    """Tensors outside the architecture's base model: a classifier, a language model's output layer.

    Empty for a base model alone, and where the output layer is the embedding. Raises InputError
    for an architecture transformers does not have.
    """
    model_class = model_class_of(source)
    if model_class is None:
        raise InputError(
            f"{source.folder}: its head cannot be told from its body: architecture "
            f"{architecture_of(source) or 'not given'} is not in transformers"
        )
    prefix = f"{model_class.base_model_prefix}."
    if any(name.startswith(prefix) for name in source):
        return [name for name in source if not name.startswith(prefix)]
    return _output_names(source)


def _output_names(source: TensorSource) -> list[str]:
    """Of the output layer, where it is on disk and not tied: T5's models have no base model apart."""
    model: Any = empty_model(source)
    output = model.get_output_embeddings()
    if output is None:
        return []
    [layer] = [name for name, module in model.named_modules() if module is output]
    names = [f"{layer}.{own}" for own, _ in output.named_parameters()]
    ties = tied_names(source)
    return [name for name in names if name in source and name not in {*ties, *ties.values()}]


def architecture_of(source: TensorSource | Contents) -> str:
    """As config.json names it; empty where it does not."""
    first: str = (source.config().get("architectures") or [""])[0]
    return first


def model_class_of(source: TensorSource | Contents) -> Any:
    """The class of its architecture; None for one that transformers does not have."""
    import transformers

    # Any attribute of the package may be named: only a model is made of an untrusted config.
    found = getattr(transformers, architecture_of(source), None)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model else None


def empty_model(
    checkpoint: TensorSource,
    trust_remote_code: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> nn.Module | None:
    """The checkpoint's architecture on the meta device, without values; None for one that
    transformers does not have. `changes` are to fields of its config.json.

    Raises InputError with transformers' reason, and the error it is of as its cause.
    """
    import transformers

    model_class = model_class_of(checkpoint)
    if model_class is None:
        return None
    try:
        parsed = transformers.AutoConfig.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        if changes:  # made anew, which is when a configuration checks itself
            parsed = type(parsed).from_dict(checkpoint.config() | dict(changes))
        with torch.device("meta"):
            module: nn.Module = model_class(parsed)
    except Exception as error:  # a configuration may raise anything
        raise InputError(
            f"{checkpoint.folder}: transformers cannot make a {model_class.__name__} of its "
            f"config.json: {reason_of(error)}"
        ) from error
    return module


def reason_of(error: BaseException) -> str:
    """What was raised inside transformers, in one line that is not too long."""
    return " ".join(str(error.__cause__ or error).split())[:300]


def names_on_disk(module: nn.Module, checkpoint: TensorSource) -> dict[str, str]:
    """Names of parameters -> names of the tensors that hold each of them whole, as it is.

    Of tied parameters that are on disk under one name, each has that name.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    found = {
        origin.name: name
        for name, origin in _origins_on_disk(module, checkpoint).items()
        if origin.name in parameters
        and (origin.offset, origin.shape, origin.stride)
        == (0, tuple(parameters[origin.name].shape), parameters[origin.name].stride())
    }
    of_tied = {id(parameters[parameter]): name for parameter, name in found.items()}
    aliases = {
        parameter: of_tied[id(held)]
        for parameter, held in parameters.items()
        if parameter not in found and id(held) in of_tied
    }
    return found | aliases


def tied_names(source: TensorSource) -> dict[str, str]:
    """Tensors that are on disk twice though the architecture ties them: the copy -> the original.

    Only where their bytes agree; transformers loads them apart where they do not.
    """
    config = source.config()
    vocabulary = config.get("vocab_size")
    rows = [name for name in source if source.info(name).shape[:1] == (vocabulary,)]
    if len(rows) < 2 or not config.get("tie_word_embeddings", True):
        return {}
    model = empty_model(source)
    ties: Any = {} if model is None else model.all_tied_weights_keys
    return {
        copy: original
        for copy, original in ties.items()
        if copy in source
        and original in source
        and torch.equal(
            source.read(copy).view(torch.uint8), source.read(original).view(torch.uint8)
        )
    }
