"""BLAS and LAPACK of scipy, for what torch lacks: products that read half of a triangular matrix, and
eigenvectors of which only some are wanted.

By the table that scipy offers compiled code; its own functions hold the interpreter while they work.
"""

import ctypes
from functools import cache
from typing import Any, Literal

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

LETTERS = {torch.float32: "s", torch.float64: "d"}
UPPER, LOWER = b"L", b"U"
"""These libraries read by columns, by which the upper half is the lower one."""
Argument = bytes | int | float | Tensor


def triangular_product(lower: Tensor, matrix: Tensor) -> Tensor:
    """lower^T matrix, of a `lower` [side, side] with zeros above the diagonal and a matrix
    [side, column]."""
    if not _served(matrix):
        return lower.T @ matrix
    product, lower = matrix.clone(memory_format=torch.contiguous_format), lower.contiguous()
    side, columns = matrix.shape
    call(
        "blas", LETTERS[matrix.dtype] + "trmm", b"R", LOWER, b"T", b"N", columns, side,
        matrix.new_ones(()), lower, side, product, columns,
    )  # fmt: skip
    return product


def _served(matrix: Tensor) -> bool:
    """Not with several threads: theirs and those of torch would wait for one another's cores."""
    alone = matrix.device.type == "cpu" and torch.get_num_threads() == 1
    return alone and matrix.dtype in LETTERS and matrix.numel() > 0


def call(library: Literal["blas", "lapack"], name: str, *arguments: Argument) -> None:
    """A routine; tensors by their memory, other numbers as 32-bit integers and float64."""
    _routine(library, name)(*map(_pointer, arguments))


def _pointer(argument: Argument) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, bytes):
        return ctypes.c_char_p(argument)
    if isinstance(argument, int):
        return ctypes.byref(ctypes.c_int(argument))
    return ctypes.byref(ctypes.c_double(argument))


@cache
def _routine(library: str, name: str) -> Any:
    from scipy.linalg import cython_blas, cython_lapack

    threadpool_limits(torch.get_num_threads(), "blas")  # from here on it is loaded, and has threads
    capsule = {"blas": cython_blas, "lapack": cython_lapack}[library].__pyx_capi__[name]
    describe, find = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    describe.restype, describe.argtypes = ctypes.c_char_p, [ctypes.py_object]
    find.restype, find.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return ctypes.CFUNCTYPE(None)(find(capsule, describe(capsule)))
