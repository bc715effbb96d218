"""A cache whose next token is written where there is room for it, for the family's own forward.

Dimension letters: N rows, H heads, S columns, E head dimension.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers.cache_utils import CacheLayerMixin


class NextToken(Protocol):
    """What has room for one more token in every block."""

    @property
    def column(self) -> int:
        """Where the token is written."""

    def write(
        self, index: int, keys_NHSE: torch.Tensor, values_NHSE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes a block's new column; returns its keys and values up to there."""


class NextTokenLayer(CacheLayerMixin):  # type: ignore[misc]
    """One block's place in it.

    Args:
        room: What is written to.
        index: Of the block.
    """

    is_sliding = False

    def __init__(self, room: NextToken, index: int) -> None:
        super().__init__()
        self._room, self._index = room, index
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Does nothing: the room has its tensors."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the new token of all rows."""
        return self._room.write(self._index, key_states, value_states)

    def get_seq_length(self) -> int:
        """Columns before the new one."""
        return self._room.column

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over all columns."""
        return self._room.column + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


def write_column(
    room_2NHSE: torch.Tensor, column: int, keys_NHSE: torch.Tensor, values_NHSE: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes one block's new column; returns its keys and values up to there."""
    keys, values = room_2NHSE.unbind()
    keys[:, :, column] = keys_NHSE[:, :, 0]
    values[:, :, column] = values_NHSE[:, :, 0]
    return keys[:, :, : column + 1], values[:, :, : column + 1]
