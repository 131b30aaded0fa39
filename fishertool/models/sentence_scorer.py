"""Embedding models: a transformer and the modules behind it that make a text one vector."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fishertool.checkpoint.json_files import load_json
from fishertool.checkpoint.reader import open_checkpoint
from fishertool.errors import InputError
from fishertool.models.sentence import Pipeline

SCALE = 20.0
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid")


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
