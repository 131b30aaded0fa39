"""LoRA adapters as peft saves them: merged into the base's weights, or beside them.

y = W x + scale B A x with A [rank, in], B [out, rank], and scale = alpha / rank, or
alpha / sqrt(rank) with rank stabilisation. Sources: Hu et al. 2021, arXiv 2106.09685; Kalajdzievski
2023, arXiv 2312.03732.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fishertool.checkpoint.reader import Checkpoint, load_json, open_checkpoint
from fishertool.errors import InputError, some

CONFIG = "adapter_config.json"
STEM = "adapter_model"
NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
UNDERSTOOD = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "target_modules",
    "task_type", "use_rslora",
}  # fmt: skip
"""Options that are honoured, or whose effect is all in the file's tensors; others must be off."""
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal", None)
"""Ways to initialise that leave the base's weights as they are."""


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to one linear layer."""

    module: str
    """The layer's name in the model."""
    down: str
    up: str
    """Names in the adapter's file of A and B."""
    scale: float
    turned: bool
    """Whether the layer's weight is [in, out]."""


class Adapted(nn.Module):
    """y = base(x) + scale B A x."""

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor, scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        self.down, self.up = (
            nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            for weight in (down, up)
        )
        like = next(base.parameters())
        self.down.weight = nn.Parameter(down.to(like))
        self.up.weight = nn.Parameter(up.to(like))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.scale * self.up(self.down(x))
        return y


@dataclass(frozen=True)
class Adapter:
    """An open adapter."""

    tensors: Checkpoint
    layers: Sequence[LowRank]

    def check(self, model: nn.Module) -> None:
        """Raises InputError for layers the model lacks, or has in other shapes."""
        modules = dict(model.named_modules())
        wrong = []
        for one in self.layers:
            weight = getattr(modules.get(one.module), "weight", None)
            shape = self.tensors.info(one.up).shape[0], self.tensors.info(one.down).shape[1]
            if weight is None or tuple(weight.shape) != (shape[::-1] if one.turned else shape):
                wrong.append(one.module)
        if wrong:
            raise InputError(
                f"{self.tensors.folder}: the model has no layer of that name and shape for "
                f"{some(wrong)}; is it another base's?"
            )

    def merge_into(self, model: nn.Module) -> None:
        """W += scale B A, in float32, then in the weight's own dtype."""
        for one in self.layers:
            weight = model.get_submodule(one.module).get_parameter("weight")
            added = one.scale * self.tensors[one.up].float() @ self.tensors[one.down].float()
            added = (added.T if one.turned else added).to(weight.device)
            with torch.no_grad():
                weight.copy_(weight.float() + added)

    def attach(self, model: nn.Module) -> dict[str, Tensor]:
        """Put A and B beside their layers, unmerged; the file's names -> the parameters there."""
        parameters: dict[str, Tensor] = {}
        for one in self.layers:
            parent, _, own = one.module.rpartition(".")
            base = model.get_submodule(one.module)
            adapted = Adapted(base, self.tensors[one.down], self.tensors[one.up], one.scale)
            setattr(model.get_submodule(parent), own, adapted)
            parameters |= {one.down: adapted.down.weight, one.up: adapted.up.weight}
        return {name: parameters[name] for name in self.tensors}


@contextmanager
def open_adapter(folder: Path) -> Iterator[Adapter]:
    """An adapter's tensors, and what they add to which layers.

    Raises InputError, by name, for an option or a tensor that is not understood (DoRA, modules
    saved whole, embeddings), and for ranks that are not those of the file.
    """
    config = load_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{folder / CONFIG}: peft_type {config.get('peft_type')}; LORA is served")
    foreign = {
        name
        for name, value in config.items()
        if name not in UNDERSTOOD and value and (name, value) != ("bias", "none")
    }
    if config.get("init_lora_weights", True) not in KEEPS_BASE:
        foreign.add("init_lora_weights")  # the base that it was trained on is not the one on disk
    if foreign:
        options = some(sorted(f"{name} {config[name]!r}" for name in foreign))
        raise InputError(f"{folder / CONFIG}: {options}: not served; merge the adapter with peft")
    with open_checkpoint(folder, stem=STEM) as tensors:
        yield Adapter(tensors, _low_ranks(tensors, config))


def _low_ranks(tensors: Checkpoint, config: Mapping[str, Any]) -> list[LowRank]:
    sides: dict[str, dict[str, str]] = {}
    unknown = []
    for name in tensors:
        match = NAME.fullmatch(name)
        if match is None or len(tensors.info(name).shape) != 2:
            unknown.append(name)
        else:
            sides.setdefault(match[1], {})[match[2]] = name
    unknown += [name for pair in sides.values() if len(pair) == 1 for name in pair.values()]
    if unknown:
        raise InputError(f"{tensors.folder}: {some(unknown)}: not a linear layer's pair A and B")
    found = []
    for module, pair in sides.items():
        rank = _of(config.get("rank_pattern"), module, config["r"])
        alpha = _of(config.get("alpha_pattern"), module, config["lora_alpha"])
        shapes = tensors.info(pair["A"]).shape, tensors.info(pair["B"]).shape
        if (shapes[0][0], shapes[1][1]) != (rank, rank):
            raise InputError(
                f"{tensors.where(pair['A'])} is {list(shapes[0])}, but {CONFIG} gives rank {rank}"
            )
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        turned = bool(config.get("fan_in_fan_out"))
        found.append(LowRank(module, pair["A"], pair["B"], scale, turned))
    return found


def _of(pattern: Mapping[str, Any] | None, module: str, default: float) -> float:
    """A pattern's value for a module: the first key that ends its name, as peft reads them."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return float(value)
    return default
