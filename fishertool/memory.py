"""How this process treats the memory that tensors and objects give back."""

import ctypes
import gc

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Let glibc reuse what is freed instead of returning it to the kernel.

    Returned, as it is by default, it comes back zeroed page by page for the next tensor of the
    same size, which was measured to double a merge's system time. Does nothing without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 256 << 20)


def look_for_cycles_seldom() -> None:
    """After ten thousand new objects instead of 700: imports and headers make them by the hundred
    thousand, and all of them stay. It was measured to be a tenth of the planning of a merge."""
    gc.set_threshold(10_000)
