"""LoRA adapters as peft saves them: merged into the base's weights, or beside them."""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fishertool.checkpoint.dtypes import NAMES, compute_dtype
from fishertool.checkpoint.reader import Checkpoint, open_checkpoint
from fishertool.checkpoint.stored import FLOATING
from fishertool.errors import InputError, some
from fishertool.models.adapter_options import CONFIG, STEM, rank_and_scale, read_options
from fishertool.models.lora import LoraPair
from fishertool.models.low_rank_layers import is_conv1d

PREFIX = "base_model.model."
PART = re.compile(r"(.+)\.lora_(?:embedding_)?(A|B|magnitude_vector)(?:\.(weight|bias))?")
WRAPPERS = re.compile(r"\.(base_layer|modules_to_save)(?=\.)")


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
    """An open adapter; its keys are names of the model's parameters."""

    tensors: Checkpoint
    layers: dict[str, LoraPair]
    replaced: Mapping[str, str]
    """Parameters saved whole (biases, heads, embeddings) -> names in the adapter's file."""
    added: Mapping[str, tuple[str, float]]
    """Biases -> name in the file and scale of what is added to them."""

    @property
    def names(self) -> set[str]:
        """All parameters that it changes."""
        return {*self.layers, *self.replaced, *self.added}

    def fitted_to(self, model: nn.Module) -> "Adapter":
        """The same, by the model's own names and the way its layers hold their weights.

        Names may lack the base model's prefix, or have it where the model has none. Raises
        InputError for parameters the model lacks, has in other shapes, or ties to others.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        modules = dict(model.named_modules())
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        own = {}
        for name in self.names:
            spellings = (name, prefix + name, name.removeprefix(prefix))
            own[name] = next((one for one in spellings if one in parameters), name)
        fitted = self.renamed(own)
        for name, one in fitted.layers.items():
            module = modules.get(name.removesuffix(".weight"))
            fitted.layers[name] = replace(one, turned=is_turned(module))
        fitted.check({name: tuple(parameter.shape) for name, parameter in parameters.items()})
        tied: dict[int, list[str]] = defaultdict(list)
        for name, parameter in parameters.items():
            tied[id(parameter)].append(name)
        for name in fitted.names:
            ties = tied[id(parameters[name])]
            if parameters[name].dim() > 1 and len(ties) > 1 and not fitted._replaces_alike(ties):
                raise InputError(
                    f"{self.tensors.folder}: changes {name}, but the model ties {some(ties)}; "
                    "merge the adapter with peft, and save the result with tie_word_embeddings false"
                )
        return fitted

    def _replaces_alike(self, names: list[str]) -> bool:
        if any(name in self.layers or name not in self.replaced for name in names):
            return False
        first, *others = (self.tensors[self.replaced[name]] for name in names)
        return all(torch.equal(first, other) for other in others)

    def renamed(self, names: Mapping[str, str]) -> "Adapter":
        return replace(
            self,
            layers={names[name]: one for name, one in self.layers.items()},
            replaced={names[name]: stored for name, stored in self.replaced.items()},
            added={names[name]: stored for name, stored in self.added.items()},
        )

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises InputError for what it changes and is not there in that shape."""
        wrong = []
        for name in sorted(self.names):
            stored = [
                one for one in (self.replaced.get(name), *self.added.get(name, ())[:1]) if one
            ]
            wanted = [self.tensors.info(one).shape for one in stored]
            if name in self.layers:
                wanted.append(self.layers[name].shape)
            if any(shapes.get(name) != shape for shape in wanted):
                found = f"{list(shapes[name])} there" if name in shapes else "not there"
                wrong.append(f"{name} ({list(wanted[0])} here, {found})")
        if wrong:
            raise InputError(
                f"{self.tensors.folder}: the model has no parameter of that name and shape for "
                f"{some(wrong)}; is it another base's, or of one with another head?"
            )

    def fingerprint_on(self, base: Checkpoint) -> str:
        """A SHA-256 that tells this adapter on this base from any other weights."""
        scales = {one.down: one.scale for one in self.layers.values()} | dict(self.added.values())
        parts = [base.fingerprint(), self.tensors.fingerprint(), json.dumps(sorted(scales.items()))]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def merge_into(self, model: nn.Module) -> None:
        """Change the parameters of a model it was fitted to: in float32, then in their own dtype."""
        for name in self.names:
            parameter = model.get_parameter(name)
            values = self.summed(name, parameter.cpu().to(compute_dtype(NAMES[parameter.dtype])))
            if (one := self.layers.get(name)) is not None:
                norms = torch.linalg.vector_norm(values, dim=0) if one.turned else None
                values = one.stretch(values, 0, norms)
            with torch.no_grad():
                parameter.copy_(values)

    def summed(self, name: str, rows: Tensor, start: int = 0) -> Tensor:
        """A parameter's rows from row `start` on, with all that the adapter does but a DoRA's lengths."""
        stop = start + len(rows)
        if (stored := self.replaced.get(name)) is not None:
            rows = self.tensors.read(stored, start, stop).to(rows.dtype)
        if name in self.added:
            stored, scale = self.added[name]
            rows = rows + scale * self.tensors.read(stored, start, stop).to(rows.dtype)
        return self.layers[name].add_to(rows, start) if name in self.layers else rows

    def attach(self, model: nn.Module) -> dict[str, Tensor]:
        """Put A and B beside their layers, unmerged; the file's names -> the parameters there.

        Raises InputError, by name, for what is more than A and B of linear layers.
        """
        pairs = {
            name
            for one in self.layers.values()
            if not one.embedding and one.magnitude is None
            for name in (one.down, one.up)
        }
        if more := [name for name in self.tensors if name not in pairs]:
            raise InputError(
                f"{self.tensors.folder}: {some(more)}: not a linear layer's pair A and B, which "
                "is all that --adapter-fisher adapter is of; the merged model's Fisher is served"
            )
        parameters: dict[str, Tensor] = {}
        for weight, one in self.layers.items():
            module = weight.removesuffix(".weight")
            parent, _, own = module.rpartition(".")
            base = model.get_submodule(module)
            adapted = Adapted(base, self.tensors[one.down], self.tensors[one.up], one.scale)
            setattr(model.get_submodule(parent), own, adapted)
            parameters |= {one.down: adapted.down.weight, one.up: adapted.up.weight}
        return {name: parameters[name] for name in self.tensors}


def is_turned(module: nn.Module | None) -> bool:
    """Whether a layer's weight is [in, out]: an embedding's, and that of GPT-2's linear layers."""
    return isinstance(module, nn.Embedding) or is_conv1d(module)


@contextmanager
def open_adapter(folder: Path) -> Iterator[Adapter]:
    """An adapter's tensors, and what they do to which parameters.

    Raises InputError, by name, for a folder that is none, for an option or a tensor that is not
    understood, and for shapes that are not those of a pair of its rank.
    """
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder}: is no adapter; it has no {CONFIG}")
    config = read_options(folder / CONFIG)
    with open_checkpoint(folder, stem=STEM) as tensors:
        yield _parse(tensors, config)


def _parse(tensors: Checkpoint, config: Mapping[str, Any]) -> Adapter:
    parts: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    added: dict[str, tuple[str, float]] = {}
    unknown = []
    for name in tensors:
        own = name.removeprefix(PREFIX)
        match = PART.fullmatch(own)
        if own == name or tensors.info(name).dtype not in FLOATING:
            unknown.append(name)
        elif match and match[3] == "bias":
            scale = rank_and_scale(match[1], config)[1]
            added[f"{match[1]}.bias"] = name, scale
        elif match:
            parts.setdefault(match[1], {})[match[2]] = name
        elif "lora_" in own or "token_adapter" in own:
            unknown.append(name)
        elif (
            ".original_module." not in own
        ):  # the base's, which peft leaves in place of bias copies
            replaced.setdefault(WRAPPERS.sub("", own), name)
    layers = {}
    for module, names in parts.items():
        dimensions = {part: len(tensors.info(name).shape) for part, name in names.items()}
        dimensions.pop("magnitude_vector", None)
        if dimensions != {"A": 2, "B": 2}:
            unknown += names.values()
            continue
        layers[f"{module}.weight"] = _low_rank(tensors, module, names, config)
    if unknown:
        raise InputError(
            f"{tensors.folder}: {some(unknown)}: not a linear layer's pair A and B, nor a tensor "
            "saved whole"
        )
    return Adapter(tensors, layers, replaced, added)


def _low_rank(
    tensors: Checkpoint, module: str, names: Mapping[str, str], config: Mapping[str, Any]
) -> LoraPair:
    rank, scale = rank_and_scale(module, config)
    down, up = tensors.info(names["A"]).shape, tensors.info(names["B"]).shape
    if (down[0], up[1]) != (rank, rank):
        raise InputError(
            f"{tensors.where(names['A'])} is {list(down)}, but {CONFIG} gives rank {rank}"
        )
    magnitude = names.get("magnitude_vector")
    if bool(config.get("use_dora")) != (magnitude is not None):
        raise InputError(
            f"{tensors.where(names['A'])}: {CONFIG} says use_dora {bool(config.get('use_dora'))}, "
            "its magnitudes in the file say otherwise"
        )
    if magnitude is not None and tensors.info(magnitude).elements != up[0]:
        raise InputError(
            f"{tensors.where(magnitude)} is {list(tensors.info(magnitude).shape)} for {up[0]} outputs"
        )
    turned = bool(config.get("fan_in_fan_out")) or names["A"].endswith("lora_embedding_A")
    return LoraPair(tensors, names["A"], names["B"], scale, turned, magnitude)
