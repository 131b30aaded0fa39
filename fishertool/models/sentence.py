"""Embedding models: a transformer and the modules behind it that make a text one vector."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fishertool.checkpoint.json_files import load_json, parse_json
from fishertool.checkpoint.reader import open_checkpoint
from fishertool.errors import InputError

SCALE = 20.0
PACKAGE = "sentence_transformers."
KINDS = ("Transformer", "Pooling", "Dense", "Normalize")
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid")


@dataclass(frozen=True)
class Pipeline:
    """A folder in the layout of sentence-transformers, by its modules.json."""

    folder: Path
    modules: list[tuple[str, Path]]
    """Kind, one of KINDS, and folder of each; the transformer is the first."""

    @property
    def transformer(self) -> Path:
        return self.modules[0][1]

    def folders_of(self, kind: str) -> list[Path]:
        return [folder for one, folder in self.modules if one == kind]

    def max_length(self) -> int | None:
        """Tokens a text may have."""
        return self._settings().get("max_seq_length")

    def warnings(self) -> list[str]:
        told = [
            f"{folder.name}: has a file of its own; its weights take part, but get no Fisher"
            for folder in self.folders_of("Dense")
        ]
        if self._settings().get("do_lower_case"):
            told.append("do_lower_case is left to the tokenizer")
        path = self.folder / "config_sentence_transformers.json"
        prompts = (load_json(path).get("prompts") if path.is_file() else None) or {}
        if names := [name for name, text in prompts.items() if text]:
            told.append(
                f"the model's prompts ({', '.join(names)}) are not added; where it wants them, "
                "put them into the data"
            )
        return told

    def _settings(self) -> dict[str, Any]:
        paths = sorted(self.transformer.glob("sentence_*_config.json"))
        return load_json(paths[0]) if paths else {}


def pipeline_of(folder: Path) -> Pipeline | None:
    """What modules.json in this folder says, or in the one above that has it for a transformer.

    Raises InputError for a module that is not served, by its name.
    """
    for top in (folder, folder.parent):
        path = top / "modules.json"
        if path.is_file():
            entries = _entries(path)
            if top == folder or (entries and top / entries[0][1] == folder):
                return Pipeline(top, _modules(path, entries))
    return None


def transformer_folder(folder: Path) -> Path:
    """Where the transformer's checkpoint lies: here, or in a folder that modules.json names."""
    pipeline = pipeline_of(folder)
    return folder if pipeline is None else pipeline.transformer


def weights_folder(folder: Path) -> Path:
    """The same for what reads only weights, to which modules that are not served do not matter."""
    return folder if any(folder.glob("model*.safetensors*")) else transformer_folder(folder)


class SentenceScorer(nn.Module):
    """A transformer and what follows it, as a model of which document belongs to a query.

    The texts of an example are a query q and documents d_0 ... d_k. With each made one vector,

        logits_k = scale * cos(q, d_k),    log p(d_0 | q) = logits_0 - log sum_k exp(logits_k)

    so log p of the positive d_0 is less the InfoNCE loss of this query. The gradient of that one
    term, through all of its texts, is what per-example means for an embedding model: an example's
    own copy of every document is encoded, so none is shared between the terms of a batch. Shapes:
    input_ids, attention_mask [example, text, time]; logits [example, document], float32 or wider.
    Source: van den Oord et al. 2018, arXiv 1807.03748; scale and cosine as sentence-transformers'.
    """

    def __init__(self, transformer: nn.Module, pipeline: Pipeline | None, scale: float):
        super().__init__()
        self.transformer = transformer
        self.scale = scale
        steps = [Pooling(["mean"])] if pipeline is None else map(_step, pipeline.modules[1:])
        self.steps = nn.ModuleList(steps)

    def encode(self, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Unit vectors [row, feature], float32 or wider, of texts [row, time]."""
        hidden = self.transformer(attention_mask=attention_mask, **inputs).last_hidden_state
        vectors: Tensor = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        for step in self.steps:
            vectors = step(vectors, attention_mask)
        return functional.normalize(vectors, dim=-1)

    def forward(self, input_ids: Tensor, **inputs: Tensor) -> SimpleNamespace:
        rows = {name: tensor.flatten(0, 1) for name, tensor in inputs.items()}
        vectors = self.encode(input_ids=input_ids.flatten(0, 1), **rows)
        vectors = vectors.reshape(*input_ids.shape[:2], -1)
        cosines = (vectors[:, :1] * vectors[:, 1:]).sum(-1)
        return SimpleNamespace(logits=self.scale * cosines)


class Pooling(nn.Module):
    """Vectors of tokens [row, time, feature] -> one of the text [row, feature]; the results of
    several modes stand one behind the other."""

    def __init__(self, modes: Sequence[str]):
        super().__init__()
        self.modes = modes

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        mask = mask.to(hidden.dtype)
        return torch.cat([MODES[mode](hidden, mask) for mode in self.modes], -1)


class Dense(nn.Module):
    def __init__(self, linear: nn.Linear, activation: nn.Module):
        super().__init__()
        self.linear, self.activation = linear, activation

    def forward(self, vectors: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = self.activation(self.linear(vectors))
        return y


class Normalize(nn.Module):
    def forward(self, vectors: Tensor, mask: Tensor) -> Tensor:
        return functional.normalize(vectors, dim=-1)


def _mean(hidden: Tensor, weights: Tensor) -> Tensor:
    return (hidden * weights.unsqueeze(-1)).sum(1) / weights.sum(1, keepdim=True)


MODES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": lambda hidden, mask: hidden[:, 0],
    "max": lambda hidden, mask: hidden.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf).amax(1),
    "mean": _mean,
    "mean_sqrt_len_tokens": lambda hidden, mask: (
        _mean(hidden, mask) * mask.sum(1, keepdim=True).sqrt()
    ),
    "weightedmean": lambda hidden, mask: _mean(hidden, mask * mask.cumsum(1)),
    "lasttoken": lambda hidden, mask: hidden[
        torch.arange(len(hidden), device=hidden.device), mask.sum(1).long() - 1
    ],
}
FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""How pooling modes are written before version 5, in the order in which they are concatenated."""


def _entries(path: Path) -> list[tuple[str, str]]:
    """Type and path of each module that modules.json lists."""
    try:
        return [(str(module["type"]), str(module["path"])) for module in parse_json(path)]
    except (TypeError, KeyError) as error:
        raise InputError(f"{path}: not a list of modules: {error!r}") from error


def _modules(path: Path, entries: Sequence[tuple[str, str]]) -> list[tuple[str, Path]]:
    modules = []
    for number, (name, place) in enumerate(entries):
        kind = name.rpartition(".")[2]
        if not name.startswith(PACKAGE) or kind not in KINDS or (kind == KINDS[0]) != (number == 0):
            raise InputError(
                f"{path}: module {number} is {name}, which is not served there; served are a "
                f"Transformer first, then {', '.join(KINDS[1:])}"
            )
        parts = PurePosixPath(place)
        if parts.is_absolute() or ".." in parts.parts:
            raise InputError(f"{path}: module {number} lies out of the folder, in {place!r}")
        modules.append((kind, path.parent / parts))
    if not any(kind == "Pooling" for kind, _ in modules):
        raise InputError(f"{path}: has no Pooling module, so a text has no vector")
    return modules


def _step(module: tuple[str, Path]) -> nn.Module:
    kind, folder = module
    if kind == "Normalize":
        return Normalize()
    settings = load_json(folder / "config.json")
    return _pooling(folder, settings) if kind == "Pooling" else _dense(folder, settings)


def _pooling(folder: Path, settings: dict[str, Any]) -> Pooling:
    given = settings.get("pooling_mode") or [
        mode for flag, mode in FLAGS.items() if settings.get(flag)
    ]
    modes = [given] if isinstance(given, str) else list(given)
    for mode in modes:
        if mode not in MODES:
            raise InputError(
                f"{folder / 'config.json'}: pooling mode {mode!r} is not served; served: "
                f"{', '.join(MODES)}"
            )
    return Pooling(modes or ["mean"])


def _dense(folder: Path, settings: dict[str, Any]) -> Dense:
    activation = str(settings.get("activation_function") or "torch.nn.Identity").rpartition(".")[2]
    odd = [
        name
        for name in ("module_input_name", "module_output_name")
        if settings.get(name) not in (None, "sentence_embedding")
    ]
    if activation not in ACTIVATIONS or settings.get("use_residual") or odd:
        raise InputError(
            f"{folder / 'config.json'}: only a plain Dense module is served, with one of the "
            f"activations {', '.join(ACTIVATIONS)}"
        )
    with open_checkpoint(folder) as checkpoint:
        tensors = {name.removeprefix("linear."): checkpoint[name].float() for name in checkpoint}
    if "weight" not in tensors or tensors["weight"].dim() != 2:
        raise InputError(f"{folder}: has no linear.weight")
    rows, width = tensors["weight"].shape
    linear = nn.Linear(width, rows, bias="bias" in tensors)
    try:
        linear.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(f"{folder}: is no linear layer: {' '.join(str(error).split())}") from error
    return Dense(linear, getattr(nn, activation)())
