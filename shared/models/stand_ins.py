"""What stands where a part has no module of its own, and the container that keeps global names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class AbsentEmbedding(nn.Module):
    """Stands for the token embedding in the trunk and the top; may be hooked, never called."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Refuses: a part without an embedding takes hidden states.

        Raises:
            TypeError: Always.
        """
        raise TypeError("this part takes hidden states (inputs_embeds), not token ids")


class ZeroEmbedding(nn.Module):
    """Stands for GPT-2's position embedding outside the bottom: adds nothing."""

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Returns a zero of no dimensions, which never promotes bfloat16 to float32."""
        return torch.zeros((), device=position_ids.device)


class GlobalLayers(nn.ModuleList):
    """A list of blocks whose names are their indices in the whole model.

    Hugging Face's forward walks it by position (Llama slices it), while checkpoints and PEFT see
    the names, so ``h.10`` is ``h.10`` in the top as it is in the whole model.
    """

    def __init__(self, named_layers: Iterable[tuple[str, nn.Module]]) -> None:
        nn.Module.__init__(self)
        for name, layer in named_layers:
            self.add_module(name, layer)

    def __getitem__(self, index: int | slice) -> Any:
        """Returns the block at a position, or the list of blocks in a slice of positions."""
        return list(self._modules.values())[index]
