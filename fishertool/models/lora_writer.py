"""The difference between a model and its base, written as a LoRA adapter that peft reads."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fishertool.checkpoint.companions import write_json
from fishertool.checkpoint.digest import FileDigest
from fishertool.checkpoint.dtypes import TORCH, all_finite, representable
from fishertool.checkpoint.layout import ONE_FILE
from fishertool.checkpoint.source import TensorSource
from fishertool.checkpoint.writer import write_tensors
from fishertool.errors import InputError
from fishertool.models.adapter_options import CONFIG, STEM
from fishertool.models.adapters import PREFIX, is_turned
from fishertool.models.low_rank_layers import is_conv1d
from fishertool.models.names import empty_model, names_on_disk

PEFT_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "MTModel": "SEQ_2_SEQ_LM",
    "Model": "FEATURE_EXTRACTION",
}
"""How an architecture's name ends -> what peft calls its task."""
ROUNDING = 1e-6
"""Of a weight: what differs from the base's by no more was merged from weights like it."""


def low_rank_difference(merged: Tensor, base: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best A, B of a rank for merged - base ~ B A, and the share of its energy they keep.

    merged, base [out, in] -> A [rank, in], B [out, rank], each with sqrt(S) of U S V^T, in float32;
    the rank is at most min(out, in). Energy is the sum of squares; of no difference, all is kept.
    Source: Eckart and Young 1936; the singular vectors are those of the smaller Gram matrix.
    """
    difference = merged.double() - base.double()
    rank = min(rank, *difference.shape)
    wide = difference if difference.shape[0] <= difference.shape[1] else difference.T
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    energies = values.clamp(min=0).flip(0)
    total = energies.sum()
    left = vectors.flip(1)[:, :rank]
    roots = energies[:rank].sqrt().sqrt()
    inverse = torch.where(roots > 0, 1 / roots, 0)
    short, long = left * roots, inverse[:, None] * (left.T @ wide)
    up, down = (short, long) if wide is difference else (long.T, short.T)
    kept = float(energies[:rank].sum() / total) if total > 0 else 1.0
    return down.float().contiguous(), up.float().contiguous(), kept


@dataclass(frozen=True)
class _Place:
    """What an adapter can do to a parameter."""

    whole: str | None
    """The module that would hold it whole."""
    low_rank: bool
    turned: bool


class LoraWriter:
    """Takes a model tensor by tensor, and holds what differs from the base until `write`.

    Linear layers of the body are approximated by `rank`; their biases, norms, embeddings and heads
    are saved whole. Raises InputError for a base whose architecture transformers does not have.
    """

    def __init__(self, base: TensorSource, base_name: str, rank: int, revision: str | None = None):
        """`base_name` is what peft loads the base by: a folder, or a Hub id with its revision."""
        module = empty_model(base)
        if module is None:
            raise InputError(
                f"{base.folder}: which of its tensors are linear layers cannot be told: its "
                "architecture is not in transformers; merge without --as-lora"
            )
        self.base, self.base_name, self.rank = base, base_name, rank
        self.revision = revision
        self._buffers = {name for name, _ in module.named_buffers()}
        self._parameters = dict(module.named_parameters(remove_duplicate=False))
        self._places = _places(module, self._parameters)
        self._stored = names_on_disk(module, base)
        self._parameter_of: dict[str, str] = {}
        for parameter, name in self._stored.items():
            self._parameter_of.setdefault(name, parameter)
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}
        self._whole: dict[str, Tensor] = {}
        self._turned = False

    @property
    def parameters(self) -> int:
        """Numbers that the adapter holds so far."""
        held = [*self._whole.values(), *(side for pair in self._pairs.values() for side in pair)]
        return sum(tensor.numel() for tensor in held)

    @property
    def most_bytes(self) -> int:
        """Of what it writes where every tensor differs from the base's, but for the file's header."""
        found = 0
        for parameter, place in self._places.items():
            if parameter not in self._stored:
                continue
            info = self.base.info(self._stored[parameter])
            rank = min(self.rank, *info.shape) if place.low_rank else 0
            found += 4 * rank * sum(info.shape) if place.low_rank else info.nbytes
        return found

    def cannot_hold(self, names: Iterable[str]) -> list[str]:
        """Weights of these that no adapter has room for, as parts of what is fused on load."""
        return [name for name in names if not self._place_of(name) and name not in self._buffers]

    def _place_of(self, name: str) -> _Place | None:
        place = self._places.get(self._parameter_of.get(name, ""))
        return place if place is not None and (place.whole or place.low_rank) else None

    def add(self, name: str, merged: Tensor) -> dict[str, Any]:
        """Take a tensor by its name on disk, shaped as the base's; what became of it, for a report.

        Raises InputError for one that differs and that no adapter can hold.
        """
        info = self.base.info(name)
        stored = self.base.read(name).reshape(info.shape)
        if torch.allclose(merged, stored.to(merged.dtype), rtol=ROUNDING, atol=0):
            return {"action": "as-base"}
        parameter = self._parameter_of.get(name, "")
        place = self._place_of(name)
        if place is None:
            raise InputError(
                f"{self.base.where(name)}: the merge's differs, and it belongs to no layer that an "
                "adapter can hold; merge without --as-lora"
            )
        if not place.low_rank:
            held = representable(merged, TORCH[info.dtype]).to(TORCH[info.dtype])
            if all_finite(merged) and not all_finite(held):
                raise InputError(
                    f"{self.base.where(name)}: the merge's does not fit {info.dtype}; lower the "
                    "weights, or merge without --as-lora"
                )
            if torch.equal(held, stored):
                return {"action": "as-base"}
            self._whole[parameter] = held
            return {"action": "whole"}
        pair = (merged.T, stored.T) if place.turned else (merged, stored)
        down, up, kept = low_rank_difference(*pair, self.rank)
        self._pairs[parameter.removesuffix(".weight")] = down, up
        self._turned |= place.turned
        return {"action": "low-rank", "rank": len(down), "energy_kept": kept}

    def write(self, folder: Path) -> list[FileDigest]:
        """Write adapter_model.safetensors and adapter_config.json.

        Raises InputError where no linear layer differs: peft has no adapter without one.
        """
        if not self._pairs:
            raise InputError(
                f"{self.base.folder}: no linear layer of the merge differs from it; an adapter "
                "needs one"
            )
        tensors, modules = self._tensors()
        _, digests = write_tensors(folder, STEM, {}, tensors, ONE_FILE)
        write_json(folder / CONFIG, self._config(modules, tensors))
        return digests

    def _tensors(self) -> tuple[dict[str, Tensor], list[str]]:
        """By name in the adapter's file; and the modules that are saved whole, with all they have."""
        tensors = {}
        for module, (down, up) in self._pairs.items():
            tensors[f"{PREFIX}{module}.lora_A.weight"] = down
            tensors[f"{PREFIX}{module}.lora_B.weight"] = up
        changed = {id(self._parameters[name]): value for name, value in self._whole.items()}
        modules: set[str] = set()
        for parameter, held in self._parameters.items():
            owner = parameter.rpartition(".")[0]
            if id(held) in changed and owner in self._pairs:
                tensors[f"{PREFIX}{owner}.base_layer.bias"] = changed[id(held)]
            elif id(held) in changed:
                modules.add(self._places[parameter].whole or owner)
        for parameter in self._held_by(modules):
            value = changed.get(id(self._parameters[parameter]))
            tensors[PREFIX + parameter] = self._of_base(parameter) if value is None else value
        return tensors, sorted(modules)

    def _held_by(self, modules: set[str]) -> list[str]:
        """Parameters of modules; those that hold what is tied to them join the modules."""
        while True:
            prefixes = tuple(f"{module}." for module in modules)
            held = dict.fromkeys(name for name in self._parameters if name.startswith(prefixes))
            shared = {id(self._parameters[name]) for name in held}
            more = {
                self._places[name].whole or name.rpartition(".")[0]
                for name, parameter in self._parameters.items()
                if id(parameter) in shared and name not in held
            }
            if not more:
                return list(held)
            modules |= more

    def _of_base(self, parameter: str) -> Tensor:
        if parameter not in self._stored:
            raise InputError(
                f"{self.base.folder}: has no tensor {parameter}, which an adapter must hold whole"
            )
        stored = self._stored[parameter]
        return self.base.read(stored).reshape(self.base.info(stored).shape)

    def _config(self, modules: list[str], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        ranks = {module: len(down) for module, (down, _) in self._pairs.items()}
        lower = {module: rank for module, rank in ranks.items() if rank != self.rank}
        name = (self.base.config().get("architectures") or [""])[0]
        tasks = [task for suffix, task in PEFT_TASKS.items() if name.endswith(suffix)]
        biases = any(tensor.endswith(".base_layer.bias") for tensor in tensors)
        return {
            "peft_type": "LORA",
            "task_type": tasks[0] if tasks else None,
            "base_model_name_or_path": self.base_name,
            "revision": self.revision,
            "r": self.rank,
            "lora_alpha": self.rank,
            "lora_dropout": 0.0,
            "rank_pattern": lower,
            "alpha_pattern": lower,
            "target_modules": sorted(ranks),
            "modules_to_save": modules or None,
            "bias": "lora_only" if biases else "none",
            "fan_in_fan_out": self._turned,
            "use_rslora": False,
            "use_dora": False,
            "init_lora_weights": True,
            "inference_mode": True,
        }


def _places(module: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, _Place]:
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    headed = any(name.startswith(prefix) for name in parameters)
    output = module.get_output_embeddings()  # type: ignore[operator]
    modules = dict(module.named_modules())
    places = {}
    for name in parameters:
        owner, _, own = name.rpartition(".")
        layer = modules[owner]
        head = layer is output or (headed and not name.startswith(prefix))
        leaf = not any(layer.children())
        linear = isinstance(layer, nn.Linear) or is_conv1d(layer)
        places[name] = _Place(
            name.partition(".")[0] if head else owner if leaf else None,
            linear and not head and own == "weight",
            is_turned(layer),
        )
    return places
