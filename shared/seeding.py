"""Random draws that depend on a key alone, whatever else the process has drawn.

Dropout in torch draws from the process-wide default generator, so a keyed draw takes that generator
for itself: it is seeded from the key, and what it was before is put back afterwards.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_generator_lock = threading.RLock()


def seed_from(*key: int | str) -> int:
    """Returns a 63-bit seed that any change of the key changes."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@contextmanager
def keyed_generator(*key: int | str, device: torch.device | None = None) -> Iterator[None]:
    """Seeds the default generator from a key for the length of the block.

    One thread at a time: the generator belongs to the process.

    Args:
        *key: What the draws depend on.
        device: A CUDA device whose generator is keyed too.
    """
    devices = [device] if device is not None and device.type == "cuda" else []
    with _generator_lock, torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed_from(*key))
        yield
