"""What torch computes with, and in, for each dtype of a safetensors file."""

import torch
from torch import Tensor

from fishertool.checkpoint.stored import CONFIG_NAMES

TORCH: dict[str, torch.dtype] = {name: getattr(torch, word) for name, word in CONFIG_NAMES.items()}

E4M3_ROUNDS_DOWN = 464
"""The largest number nearer to F8_E4M3's largest, 448, than to what would be the next."""

NAMES = {dtype: name for name, dtype in TORCH.items()}

COMPUTED = ("F64", "F32", "F16", "BF16")
"""Those that linear algebra is done with, in themselves or in a wider one."""


def compute_dtype(dtype: str) -> torch.dtype:
    """What arithmetic on a stored dtype runs in: float32, and float64 for what is stored so."""
    return torch.float64 if dtype == "F64" else torch.float32


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    flat = tensor.reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def representable(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values, to be rounded to a dtype, with NaN for what it has no room for.

    Of the floating dtypes only F8_E4M3 needs that: torch would store 448, its largest number.
    """
    if dtype is not torch.float8_e4m3fn or values.dtype is dtype:
        return values
    wide = values.double()
    return torch.where(wide.abs() > E4M3_ROUNDS_DOWN, torch.nan, wide)


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # A sum is one pass without a temporary; only where it is not finite is each value looked at.
    if values.dtype not in (torch.bfloat16, torch.float64):
        values = values.float()  # the others have no room for a sum, or no sum
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())
