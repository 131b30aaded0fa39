"""What an adapter of low rank does to a matrix.

y = W x + scale B A x with A [rank, in], B [out, rank], and scale = alpha / rank, or
alpha / sqrt(rank) with rank stabilisation. DoRA gives each output's row of W + scale B A a length
of its own. Sources: Hu et al. 2021, arXiv 2106.09685; Kalajdzievski 2023, arXiv 2312.03732; Liu et
al. 2024, arXiv 2402.09353.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fishertool.checkpoint.reader import Checkpoint


@dataclass(frozen=True)
class LoraPair:
    """What an adapter adds to one matrix."""

    tensors: Checkpoint
    """The adapter's."""
    down: str
    up: str
    """Names in the adapter's file of A and B."""
    scale: float
    turned: bool
    """Whether the matrix is [in, out], as an embedding's is."""
    magnitude: str | None = None
    """Name of the lengths of the outputs' rows, [out], if the adapter is a DoRA."""

    @property
    def embedding(self) -> bool:
        return self.down.endswith(".lora_embedding_A")

    @property
    def shape(self) -> tuple[int, int]:
        """That of the matrix."""
        out, width = self.tensors.info(self.up).shape[0], self.tensors.info(self.down).shape[1]
        return (width, out) if self.turned else (out, width)

    def add_to(self, rows: Tensor, start: int) -> Tensor:
        """Rows of the matrix from row `start` on + the same rows of scale B A, or of its transpose."""
        stop = start + len(rows)
        down = self.tensors.read(self.down).to(rows.dtype)
        if self.turned:
            up = self.tensors.read(self.up).to(rows.dtype)
            return rows + self.scale * (down[:, start:stop].T @ up.T)
        up = self.tensors.read(self.up, start, stop).to(rows.dtype)
        return rows + self.scale * (up @ down)

    def stretch(self, rows: Tensor, start: int, column_norms: Tensor | None) -> Tensor:
        """Give what `add_to` returned the lengths of a DoRA.

        Where the outputs are the columns, `column_norms` are those of the whole sum.
        """
        if self.magnitude is None:
            return rows
        lengths = self.tensors.read(self.magnitude).to(rows.dtype).flatten()
        if column_norms is not None:
            return rows * (lengths / column_norms)
        norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
        return rows * (lengths[start : start + len(rows)] / norms).unsqueeze(1)
