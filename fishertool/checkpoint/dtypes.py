"""The dtypes of a safetensors file, by the names its header gives them."""

import torch
from torch import Tensor

BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}

TORCH = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}

E4M3_ROUNDS_DOWN = 464
"""The largest number nearer to F8_E4M3's largest, 448, than to what would be the next."""

NAMES = {dtype: name for name, dtype in TORCH.items()}

FLOATING = frozenset(name for name, dtype in TORCH.items() if dtype.is_floating_point)

COMPUTED = ("F64", "F32", "F16", "BF16")
"""Those that linear algebra is done with, in themselves or in a wider one."""


def torch_name(dtype: str) -> str:
    """The dtype as config.json writes it.

    >>> torch_name("BF16")
    'bfloat16'
    """
    return str(TORCH[dtype]).removeprefix("torch.")


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
