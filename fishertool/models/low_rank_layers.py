"""Low-rank modules: y = up(down(x)) in the place of a linear layer or an embedding."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from fishertool.models.low_rank import EMPTY


class LowRank(nn.Module, ABC):
    """W ~ up @ down."""

    weight: Tensor
    """Empty; of the dtype that the architecture's code asks a layer for."""
    down: nn.Linear | nn.Embedding
    up: nn.Linear

    def __init__(self, down: nn.Linear | nn.Embedding, up: nn.Linear):
        super().__init__()
        self.down, self.up = down, up
        self.register_buffer("weight", down.weight.new_empty(EMPTY))

    @property
    def rank(self) -> int:
        return self.up.in_features

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(self.down(x))
        return y

    def dense(self, dtype: torch.dtype) -> nn.Module:
        """The layer it stands for, with the product as its weight.

        Raises ValueError for factors that were wrapped, as by an adapter, and are more than weights.
        """
        if type(self.down) not in (nn.Linear, nn.Embedding) or type(self.up) is not nn.Linear:
            raise ValueError("factors with adapters on them have no product; merge these first")
        with torch.device("meta"):
            layer = self._layer()
        layer.weight = nn.Parameter(self._product().to(dtype).contiguous())
        if self.up.bias is not None:
            layer.bias = nn.Parameter(self.up.bias.detach().to(dtype))
        return layer

    @abstractmethod
    def _layer(self) -> nn.Module:
        """The dense layer, without values."""

    @abstractmethod
    def _product(self) -> Tensor:
        """Its weight."""


class LowRankLinear(LowRank):
    """x [..., in], down.weight [rank, in], up.weight [out, rank], up.bias [out]."""

    down: nn.Linear

    def __init__(self, down: nn.Linear, up: nn.Linear, turned: bool):
        super().__init__(down, up)
        self.turned = turned
        """Whether the dense layer is a Conv1D, whose weight is [in, out]."""

    @property
    def in_features(self) -> int:
        return self.down.in_features

    @property
    def out_features(self) -> int:
        return self.up.out_features

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias

    def _layer(self) -> nn.Module:
        from transformers.pytorch_utils import Conv1D

        if self.turned:
            layer: nn.Module = Conv1D(self.out_features, self.in_features)
            return layer
        return nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)

    def _product(self) -> Tensor:
        weight = product(self.up.weight.detach(), self.down.weight.detach())
        return weight.T if self.turned else weight


class LowRankEmbedding(LowRank):
    """x [...] of token ids, down.weight [vocabulary, rank], up.weight [width, rank]."""

    down: nn.Embedding

    @property
    def num_embeddings(self) -> int:
        return self.down.num_embeddings

    @property
    def embedding_dim(self) -> int:
        return self.up.out_features

    @property
    def padding_idx(self) -> int | None:
        return self.down.padding_idx

    def _layer(self) -> nn.Module:
        return nn.Embedding(self.num_embeddings, self.embedding_dim, padding_idx=self.padding_idx)

    def _product(self) -> Tensor:
        return product(self.down.weight.detach(), self.up.weight.detach().T)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, in float32 or wider."""
    wide = torch.promote_types(left.dtype, torch.float32)
    return left.to(wide) @ right.to(wide)


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is exactly y = W x + b: not a subclass, which may use W otherwise."""
    return type(layer) is nn.Linear or is_conv1d(layer)


def is_conv1d(layer: nn.Module | None) -> bool:
    """Whether a layer is GPT-2's linear layer, whose weight is [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return type(layer) is Conv1D


def token_table(model: Any) -> nn.Embedding | None:
    """A model's input embeddings, if all they do is look up rows: a subclass may scale them.

    Other embeddings are left alone, as there are architectures that read their weight.
    """
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return table if type(table) is nn.Embedding and table.max_norm is None else None


def table_length(layer: Any) -> int:
    """Of how many tokens a model's input embeddings have a row."""
    return layer.num_embeddings if isinstance(layer, LowRankEmbedding) else len(layer.weight)
