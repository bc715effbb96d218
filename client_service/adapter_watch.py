"""Tells at little cost whether adapters are as they were: between two tokens, and during a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from shared.errors import AdapterError
from shared.skeleton import RemoteTensor

Switches = tuple[object, ...]
"""What PEFT's layers keep in plain attributes, and the modes of blocks."""


class AdapterWatch:
    """The adapters of one model; its layers are listed anew where PEFT has put others.

    Args:
        model: The family's, around which PEFT's is.
        blocks: The trunk's.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self._model, self._blocks = model, blocks
        self._listed: Switches | None = None
        self._layers: list[Any] = []
        self._tensors: list[torch.Tensor] = []

    def switches(self) -> Switches:
        """What says which adapters are computed with, and how."""
        known = tuple(getattr(self._model, "peft_config", None) or ())
        if known != self._listed:
            self.list_anew()
        modes = tuple(block.training for block in self._blocks)
        return (
            known,
            modes,
            *(
                (
                    tuple(layer.active_adapters),
                    layer.disable_adapters,
                    tuple(layer.__dict__.get("scaling", {}).items()),
                )
                for layer in self._layers
            ),
        )

    def writes(self) -> tuple[tuple[int, int], ...]:
        """Which tensors the trunk's blocks have here, and torch's count of writes into each."""
        return tuple((id(tensor), tensor._version) for tensor in self._tensors)

    def list_anew(self) -> None:
        """Finds PEFT's layers, and the tensors in the trunk's blocks."""
        self._listed = tuple(getattr(self._model, "peft_config", None) or ())
        adapted = BaseTunerLayer | AuxiliaryTrainingWrapper
        self._layers = [m for m in self._model.modules() if isinstance(m, adapted)]
        self._tensors = [
            tensor
            for block in self._blocks
            for tensor in (*block.parameters(), *block.buffers())
            if not isinstance(tensor, RemoteTensor)
        ]


def check_same(before: Switches, now: Switches) -> None:
    """Refuses a call whose adapters somebody else has switched meanwhile.

    Raises:
        AdapterError: If they differ.
    """
    if before != now:
        raise AdapterError(
            "adapters, their scaling or the model's mode were changed by another thread during "
            "this call, which would have been computed with both: accepted are calls with "
            "adapter_names=, or a lock around switching"
        )
