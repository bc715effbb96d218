"""What a client sends of its adapters in the trunk's blocks when they have changed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shared.adapters.structure import Structure, Value


@dataclass(frozen=True)
class StatePush:
    """A change, or all there is."""

    version: int
    """Version of the client's adapters once the change is made."""
    since: int = 0
    """The version that is changed; 0 means that this is all there is."""
    structure: Structure | None = None
    """None leaves it."""
    values: tuple[Value, ...] = ()
    tensors: tuple[torch.Tensor, ...] = ()
    """Numbers of the values."""
