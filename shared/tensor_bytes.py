"""The raw bytes of a tensor, as they are hashed and sent."""

from __future__ import annotations

import torch


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Returns the raw bytes of a tensor; a view where the tensor is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
