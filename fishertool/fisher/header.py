"""What a Fisher sidecar says of itself, kept as JSON in its safetensors metadata."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor

from fishertool.errors import InputError

KEY = "fishertool.fisher"
FORMAT = 2
ROUNDING = torch.finfo(torch.float32).eps ** 2
"""Of all weights' total, the share below which a weight's is of nothing but rounding: that of the
biases of keys, say, which add the same to every score of a softmax."""
PIECE_ELEMENTS = 1 << 15
"""Added up at a time: few enough to stay in cache, and for torch to use one thread, so that sums do
not depend on how many there are."""


@dataclass(frozen=True)
class TensorStatistics:
    """Sums over the diagonal of one weight's Fisher, in float64, so that means and norms need no
    pass over the file; 0 where the kind does not tell (a bank, whose header is written first)."""

    elements: int
    total: float = 0.0
    squares: float = 0.0
    """Sum of squared entries."""
    standard_error: float | None = None
    """Of `total`, from its spread over examples; None for fewer than two."""


@dataclass(frozen=True)
class FisherHeader:
    kind: str
    labels: str
    task: str
    model: str
    """Hub id or folder name of the checkpoint."""
    fingerprint: str
    """Of the checkpoint (names, shapes, sampled bytes): a sidecar fits only its own model."""
    examples: int
    tokens: int
    token_ids_sha256: str
    seed: int
    draws: int = 1
    unit: str = "example"
    estimator: str = "exact"
    format: int = FORMAT
    scale: float | None = None
    """What an embedding model's cosines are multiplied by."""
    group: int = 1
    """Examples whose mean gradient is one member of a bank."""
    leaders: dict[str, str] = field(default_factory=dict)
    """Weight -> the weight under whose name its input moment is stored: they share their input."""
    transposed: list[str] = field(default_factory=list)
    """Weights stored as [in, out]."""
    statistics: dict[str, TensorStatistics] = field(default_factory=dict)
    """By weight, of all that the sidecar tells about."""
    without: list[str] = field(default_factory=list)
    """Floating-point tensors of the checkpoint that this kind has nothing about: buffers, and for a
    Kronecker factor or input moment whatever is no linear layer's weight."""

    def to_metadata(self) -> dict[str, str]:
        """Sums that overflow, which --allow-nonfinite lets through, stand as NaN and Infinity."""
        return {KEY: json.dumps(asdict(self), sort_keys=True)}

    @classmethod
    def from_metadata(cls, metadata: Any, where: str) -> Self:
        """Raises InputError, with `where` in front, if it is no header this version can read."""
        try:
            content = json.loads(metadata[KEY])
            if content["format"] != FORMAT:
                raise InputError(
                    f"{where}: Fisher format {content['format']}, this version reads {FORMAT}; "
                    "estimate it again"
                )
            statistics = {
                name: TensorStatistics(**values) for name, values in content["statistics"].items()
            }
            known = {item.name for item in fields(cls)}
            if set(content) != known:
                raise KeyError(*(known ^ set(content)))
            for name, kind in (("leaders", dict), ("transposed", list), ("without", list)):
                if not isinstance(content[name], kind):
                    raise TypeError(name)
            return cls(**{**content, "statistics": statistics})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{where}: not a Fisher sidecar ({error!r})") from error


def statistics_of(fisher: Tensor, standard_error: float | None = None) -> TensorStatistics:
    sums = fisher.new_zeros(2, dtype=torch.float64)
    for piece in torch.split(fisher.reshape(-1), PIECE_ELEMENTS):
        values = piece.to(torch.float64)
        sums += torch.stack([values.sum(), values.square().sum()])
    total, squares = sums.tolist()
    return TensorStatistics(fisher.numel(), total, squares, standard_error)


def relative_errors(statistics: Mapping[str, TensorStatistics]) -> dict[str, float]:
    """By weight, the standard error of its total as a share of it, where it is known; without the
    weights whose total is of rounding alone, and tells of the batches, not of the examples."""
    least = ROUNDING * sum(one.total for one in statistics.values())
    return {
        name: one.standard_error / one.total
        for name, one in statistics.items()
        if one.standard_error is not None and one.total > least
    }
