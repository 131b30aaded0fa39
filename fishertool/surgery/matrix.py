"""A matrix of a checkpoint: a tensor on disk, or one expert's part of a stack."""

from dataclasses import dataclass

from torch import Tensor

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

    def upright(self, rows: Tensor) -> Tensor:
        """From the rows on disk to [out, in], or back."""
        return rows.T if self.turned else rows
