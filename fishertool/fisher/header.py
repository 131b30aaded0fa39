"""What a Fisher sidecar says of itself, kept as JSON in its safetensors metadata."""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor

from fishertool.errors import InputError

KEY = "fishertool.fisher"
FORMAT = 1


@dataclass(frozen=True)
class TensorStatistics:
    """Sums over one stored tensor, in float64, so that means and norms need no pass over the file."""

    elements: int
    total: float
    squares: float
    """Sum of squared entries."""


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
    statistics: dict[str, TensorStatistics] = field(default_factory=dict)
    without: list[str] = field(default_factory=list)
    """Floating-point tensors of the checkpoint that are no parameters (buffers): no Fisher exists."""

    def to_metadata(self) -> dict[str, str]:
        return {KEY: json.dumps(asdict(self), allow_nan=False, sort_keys=True)}

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
            return cls(**{**content, "statistics": statistics})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{where}: not a Fisher sidecar ({error!r})") from error


def statistics_of(fisher: Tensor) -> TensorStatistics:
    values = fisher.to(torch.float64)
    return TensorStatistics(values.numel(), float(values.sum()), float(values.square().sum()))
