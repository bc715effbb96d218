"""Tells at little cost whether adapters are as they were: between two tokens, and during a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from shared.adapters.structure import scaling_of
from shared.errors import AdapterError

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
        self._known: tuple[str, ...] = ()
        self._layers: list[Any] = []
        self.tensors: list[torch.Tensor] = []
        """Those of the trunk's blocks that are here, as they were looked at last."""
        self._samples: list[torch.Tensor] = []

    def switches(self) -> Switches:
        """What says which adapters are computed with, and how."""
        known = tuple(getattr(self._model, "peft_config", None) or ())
        if known != self._known:
            adapted = BaseTunerLayer | AuxiliaryTrainingWrapper
            self._layers = [m for m in self._model.modules() if isinstance(m, adapted)]
            self._known = known
        modes = tuple(block.training for block in self._blocks)
        states = (
            (
                tuple(layer.active_adapters),
                layer.disable_adapters,
                tuple(scaling_of(layer).items()),
            )
            for layer in self._layers
        )
        return known, modes, *states

    def look(self, tensors: Sequence[torch.Tensor]) -> None:
        """Takes the tensors of the trunk's blocks as they are now."""
        self.tensors = list(tensors)
        self._samples = [
            tensor.detach().view(-1)[place]
            for tensor in self.tensors
            if tensor.is_floating_point() and tensor.numel() and tensor.is_contiguous()
            for place in (0, tensor.numel() // 2, -1)
        ]

    def writes(self) -> tuple[object, ...]:
        """What writes into the tensors change: torch's counts, where they lie, and three numbers.

        Torch does not count what is written by way of ``.data``; such writes change every number.
        """
        numbers = torch.stack(self._samples).tolist() if self._samples else []
        return numbers, [(id(t), t._version, t.data_ptr()) for t in self.tensors]


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
