"""A matrix of a checkpoint: a tensor on disk, or one expert's part of a stack."""

from dataclasses import dataclass

from torch import Tensor

from fishertool.checkpoint.header import TensorInfo
from fishertool.checkpoint.reader import Checkpoint
from fishertool.models.layers import Layer


@dataclass(frozen=True)
class Matrix:
    layer: Layer
    start: int
    stop: int
    """Its rows on disk."""
    shape: tuple[int, int]
    """[out, in]"""
    dtype: str
    expert: int | None = None

    @property
    def name(self) -> str:
        """Of the tensor."""
        return self.layer.name

    @property
    def key(self) -> str:
        return self.name if self.expert is None else f"{self.name}[{self.expert}]"

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def turned(self) -> bool:
        return self.layer.turned

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def info(self) -> TensorInfo:
        """Of its rows on disk, as a tensor of their own."""
        return TensorInfo(self.key, self.dtype, self.shape[::-1] if self.turned else self.shape)

    @property
    def first(self) -> int:
        """Of its elements among the tensor's."""
        return (self.expert or 0) * self.elements

    def of(self, tensor: Tensor) -> Tensor:
        """Its part of the tensor."""
        return tensor if self.expert is None else tensor[self.expert]

    def upright(self, rows: Tensor) -> Tensor:
        """From the rows on disk to [out, in], or back."""
        return rows.T if self.turned else rows


def matrices_of(checkpoint: Checkpoint, layer: Layer) -> list[Matrix]:
    """The one that a tensor is, or those of a stack of experts."""
    info = checkpoint.info(layer.name)
    rows, width = info.shape[-2:]
    shape = (width, rows) if layer.turned else (rows, width)
    if layer.kind != "experts":
        return [Matrix(layer, 0, rows, shape, info.dtype)]
    return [
        Matrix(layer, expert * rows, (expert + 1) * rows, shape, info.dtype, expert)
        for expert in range(info.shape[0])
    ]
