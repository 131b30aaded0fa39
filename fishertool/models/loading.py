"""Load a model and its tokenizer, or stop: never with weights that are not in the checkpoint."""

import importlib.util
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fishertool.checkpoint.dtypes import COMPUTED, TORCH, all_finite
from fishertool.checkpoint.header import TensorInfo
from fishertool.checkpoint.reader import Checkpoint
from fishertool.checkpoint.stored import FLOATING
from fishertool.errors import InputError, UsageError, some
from fishertool.models.architectures import fits_decoder
from fishertool.models.buffers import is_old_buffer
from fishertool.models.low_rank_layers import table_length
from fishertool.models.sentence import pipeline_of
from fishertool.models.sentence_scorer import SCALE, SentenceScorer
from fishertool.models.tasks import Task
from fishertool.registry import suggest

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
POSITION_TABLES = ("position_embeddings", "embed_positions")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")


@dataclass(frozen=True)
class LoadedModel:
    module: nn.Module
    """Gives logits for a batch of the task."""
    tokenizer: Any
    pad_id: int
    labels: dict[str, int] | None
    """Class names -> ids, for a classifier."""
    max_length: int | None
    """Positions the model has, where it says so."""
    warnings: Sequence[str] = ()

    @property
    def device(self) -> torch.device:
        """Of the input embeddings, where inputs go; other weights may lie on other devices."""
        device: torch.device = self.pretrained.get_input_embeddings().weight.device  # type: ignore[operator]
        return device

    @property
    def devices(self) -> list[str]:
        """All that have weights."""
        return sorted({str(parameter.device) for parameter in self.module.parameters()})

    @property
    def scale(self) -> float | None:
        """Of an embedding model's cosines."""
        return self.module.scale if isinstance(self.module, SentenceScorer) else None

    @property
    def pretrained(self) -> nn.Module:
        """The transformers model, whose parameters the checkpoint names: `module`, or in it."""
        return self.module.transformer if isinstance(self.module, SentenceScorer) else self.module

    def nonfinite(self) -> list[str]:
        """Parameters with a NaN or an infinity, by their names in memory."""
        return [
            name
            for name, parameter in self.pretrained.named_parameters()
            if not parameter.is_meta and not all_finite(parameter.detach())
        ]


def load_model(
    checkpoint: Checkpoint,
    task: Task,
    device: str = "cpu",
    trust_remote_code: bool = False,
    scale: float | None = None,
    watch_experts: bool = False,
    device_map: str | None = None,
) -> LoadedModel:
    """Load in eval mode, in the dtype that the tensors have on disk, whatever config.json says of it
    (float16 as float32: its squares would underflow).

    `scale` is that of an embedding model's scores. With `watch_experts`, experts run one after
    another, so that each one's products can be seen. With `device_map`, one of DEVICE_MAPS, the
    layers go to several devices, in place of `device`; on device "meta" the weights have no values,
    if accelerate is there, which transformers needs for that.
    Raises InputError, naming task and architecture, if transformers finds a tensor missing, of
    another shape, or left over; for one that the device map has no device for; and for a model
    without a table of token embeddings.
    """
    import transformers

    config = checkpoint.config()
    if not fits_decoder(task.name, config):
        raise InputError(
            f"{checkpoint.folder}: {_architecture(config)} does not fit --task {task.name}"
        )
    quieten(transformers)
    if device == "meta":
        device, device_map = ("meta", "meta") if has_accelerate() else ("cpu", None)
    dtype = _dtype(checkpoint)
    one_by_one = watch_experts or dtype == torch.float64  # which no grouped product takes
    try:
        module, found = getattr(transformers, _class_name(task, config)).from_pretrained(
            checkpoint.folder,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, by name
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            device_map=device_map,
            **({"experts_implementation": "eager"} if one_by_one else {}),
        )
    except (ValueError, KeyError, OSError, RuntimeError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        if "Unrecognized configuration class" in reason:  # and a list of all that it recognizes
            reason = f"{_architecture(config)} does not fit --task {task.name}"
        raise InputError(f"{checkpoint.folder}: transformers cannot load it: {reason}") from error
    for fault in faults_of(checkpoint, type(module).__name__, found):
        doubt = f"config.json says {_architecture(config)}, which may not fit --task {task.name}"
        if type(module).__name__ in (config.get("architectures") or []):
            doubt = "config.json may be that of other weights"
        raise InputError(f"{checkpoint.folder}: {fault}; {doubt}")
    off = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if off and device != "meta":
        raise InputError(
            f"{checkpoint.folder}: the devices of --device-map have no room for {some(off)}, and "
            "offloaded weights are not served; shard the model over processes with --fsdp"
        )
    tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code)
    pad_id = next(
        (
            token
            for token in (
                tokenizer.pad_token_id,
                getattr(module.config, "pad_token_id", None),
                tokenizer.eos_token_id,
            )
            if token is not None
        ),
        0,
    )
    module.config.pad_token_id = pad_id  # classifiers on decoders find the last token by it
    module.config.use_cache = False  # RWKV writes its state over what a backward pass needs
    vocabulary = _embedded(module, checkpoint.folder)
    if len(tokenizer) > vocabulary:
        raise InputError(
            f"{checkpoint.folder}: the tokenizer has {len(tokenizer)} tokens, "
            f"the model embeds {vocabulary}; use the tokenizer it was trained with"
        )
    labels = {str(name): int(id_) for id_, name in module.config.id2label.items()}
    loaded = LoadedModel(
        module.eval() if device_map is not None else module.eval().to(device),
        tokenizer,
        pad_id,
        labels if task.has_labels else None,
        _positions(module, config),
    )
    return loaded if task.name != "embedding" else _scorer(loaded, checkpoint.folder, scale)


def faults_of(checkpoint: Checkpoint, model: str, found: Mapping[str, Any]) -> list[str]:
    """What transformers' loading info says is wrong with a checkpoint as this model; by name."""
    missing = sorted(found["missing_keys"])
    mismatched = sorted(
        f"{name} ({list(on_disk)} on disk, {list(wanted)} in the model)"
        for name, on_disk, wanted in found["mismatched_keys"]
    )
    left_over = sorted(
        name
        for name in found["unexpected_keys"]
        if name not in checkpoint or _is_weight(checkpoint.info(name))
    )
    faults = (
        (missing, "lacks tensors the model needs"),
        (mismatched, "has tensors of another shape than the model"),
        (left_over, "has tensors the model does not use"),
    )
    return [f"{fault} as {model}: {some(names)}" for names, fault in faults if names]


def _scorer(loaded: LoadedModel, folder: Path, scale: float | None) -> LoadedModel:
    """The same with the modules behind the transformer, and their limit on texts."""
    pipeline = pipeline_of(folder)
    scorer = SentenceScorer(loaded.pretrained, pipeline, SCALE if scale is None else scale)
    scorer.eval().steps.to(loaded.device)
    limits = [loaded.max_length, pipeline and pipeline.max_length()]
    no_pooling = (
        f"{folder.name}: no modules.json says how tokens become one vector; taking their mean"
    )
    return replace(
        loaded,
        module=scorer,
        max_length=min((limit for limit in limits if limit), default=None),
        warnings=[no_pooling] if pipeline is None else pipeline.warnings(),
    )


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    """That of most stored numbers, which config.json need not name; float32 where any are float16."""
    elements: Counter[str] = Counter()
    for info in checkpoint.infos().values():
        if info.dtype in COMPUTED:
            elements[info.dtype] += info.elements
    if not elements or "F16" in elements:
        return torch.float32
    return TORCH[elements.most_common(1)[0][0]]


def _is_weight(info: TensorInfo) -> bool:
    return info.dtype in FLOATING and not is_old_buffer(info.name, info.shape)


def _positions(module: nn.Module, config: Mapping[str, Any]) -> int | None:
    """How many tokens a text may have, where the model says so. Positions begin behind that of
    padding, where their table has one, as RoBERTa's does."""
    limits = [config.get("max_position_embeddings") or config.get("n_positions")]
    for name, layer in module.named_modules():
        padding = getattr(layer, "padding_idx", None)
        stored = next(layer.parameters(), None) is not None  # sines as M2M100's know no end
        if padding is not None and stored and name.endswith(POSITION_TABLES):
            limits.append(table_length(layer) - padding - 1)
    return min((limit for limit in limits if limit), default=None)


def _embedded(module: Any, folder: Path) -> int:
    """How many tokens the model has embeddings of."""
    try:
        return table_length(module.get_input_embeddings())
    except (AttributeError, NotImplementedError) as error:
        raise InputError(
            f"{folder}: a {type(module).__name__} has no table of token embeddings that "
            "transformers knows of; such models are not served"
        ) from error


def _class_name(task: Task, config: Mapping[str, Any]) -> str:
    """An encoder alone, as T5EncoderModel, is no AutoModel of its configuration."""
    name = _architecture(config)
    alone = task.auto_class == "AutoModel" and name.endswith("EncoderModel")
    return name if alone else task.auto_class


def _architecture(config: Mapping[str, Any]) -> str:
    return ", ".join(config.get("architectures") or ["a model of no architecture"])


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The folder's own tokenizer."""
    import transformers

    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise InputError(f"{folder}: has no tokenizer files; copy them from the original model")
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # a hostile file, or custom code, may raise anything
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder}: its tokenizer cannot be loaded: {reason}") from error


def check_device(device: str) -> str:
    """The device to compute on; `auto` is the accelerator if there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"--device {device}: is none of auto, cpu, cuda and cuda:N")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: {str(error).splitlines()[0]}") from error
    return device


def check_spreading(device_map: str | None, fsdp: bool) -> None:
    """Raises UsageError for a device map that is not known, or without the package it needs."""
    if device_map is not None and device_map not in DEVICE_MAPS:
        raise UsageError(f"--device-map {suggest(device_map, DEVICE_MAPS)}")
    if (fsdp or device_map is not None) and not has_accelerate():
        flag = "--fsdp" if fsdp else "--device-map"
        raise UsageError(f"{flag} needs the package accelerate: pip install 'fishertool[large]'")


def has_accelerate() -> bool:
    return importlib.util.find_spec("accelerate") is not None


def quieten(transformers: Any) -> None:
    """What it warns of, this project checks; its progress bars are not ours."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
