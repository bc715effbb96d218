"""The random generators of this process, as tensors and JSON.

Nothing of the client's loop draws from Python's or NumPy's, but a caller's data may.
"""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch

_CPU, _CUDA = "torch", "cuda."


def random_tensors() -> dict[str, torch.Tensor]:
    """Copies the states of torch's generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {_CPU: torch.get_rng_state()} | {f"{_CUDA}{i}": s for i, s in enumerate(cuda)}


def random_facts() -> dict[str, Any]:
    """Copies the states of Python's and NumPy's generators, for JSON."""
    drawn: Any = numpy.random.get_state(legacy=True)
    kind, keys, *rest = drawn
    return {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest]}


def restore_random(tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Puts all generators where they were; CUDA's only if there are as many devices."""
    restore_torch(tensors)
    version, internal, gauss = facts["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = facts["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))


def restore_torch(tensors: dict[str, torch.Tensor]) -> None:
    """Puts torch's generators where they were; CUDA's only if there are as many devices."""
    torch.set_rng_state(tensors[_CPU])
    cuda = [tensors[f"{_CUDA}{i}"] for i in range(len(tensors) - 1)]
    if cuda and torch.cuda.device_count() == len(cuda):
        torch.cuda.set_rng_state_all(cuda)
