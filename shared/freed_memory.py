"""What glibc's malloc does with memory that was freed; without effect on another C library.

torch's tensors on the CPU come from it. By default it gives a large block back to the system the
moment it is freed, and keeps small ones for later.
"""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_NEVER = -1
_SETTINGS = ("mmap_threshold", "mmap_max", "trim_threshold", "top_pad")


def return_freed_memory() -> None:
    """Gives memory that was freed back to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_freed_memory() -> None:
    """Makes this process use memory that was freed again, instead of giving it back.

    A training step frees and takes the same blocks as the one before. GPT-2's logits and their
    gradients alone are 0.4 GB in a batch of 4x128, and every page of it is cleared by the kernel
    when it is touched: 0.2 of 3.3 CPU seconds a step. The process stays about as large as it ever
    was. Blocks above 64 MiB are kept for the main thread only. Whoever sets one of malloc's
    variables for this (``MALLOC_TRIM_THRESHOLD_``, …, or in ``GLIBC_TUNABLES``) decides alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or _decided_by_environment():
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, _NEVER)


def _decided_by_environment() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return any(
        f"MALLOC_{name.upper()}_" in os.environ or f"glibc.malloc.{name}=" in tunables
        for name in _SETTINGS
    )
