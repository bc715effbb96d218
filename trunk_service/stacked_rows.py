"""Caches of several sessions as one: every row at the end of its line, what is short padded before.

The new token of all rows has the same column, so it is written at once, and while the same rows
come again nothing but that column is. Rows of other lengths differ by what the mask hides.

Dimension letters: L blocks, N rows, H heads, S columns, E head dimension; 2 stands for keys and
values.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from trunk_service.budget import ByteBudget
from trunk_service.next_token import NextTokenLayer, write_column
from trunk_service.packed_rows import PackedRows

_ROOM = 32
# A session that leaves frees the stack on its own compute thread, perhaps while others are stacked.
_links = threading.Lock()


class StackedRows(Cache):  # type: ignore[misc]
    """A working copy of some packed rows, for the family's own forward.

    Args:
        members: The rows of each session; their tokens may differ in number.
        budget: What the copy is reserved from.

    Raises:
        ResourceExhaustedError: If the budget has no room for the copy.
    """

    def __init__(self, members: Sequence[PackedRows], budget: ByteBudget) -> None:
        for member in members:
            member.leave()  # an older copy is stale from here on
        past = [member.past for member in members]
        self.members = list(members)
        self.column = max(member.tokens for member in members)
        """Where the next token is written."""
        layers, _, _, heads, _, width = past[0].shape
        self._slices = _slices([member.rows for member in members])
        columns = self.column + _ROOM
        shape = (layers, 2, self._slices[-1].stop, heads, columns, width)
        self._nbytes = torch.Size(shape).numel() * past[0].element_size()
        budget.reserve(self._nbytes)
        self._budget: ByteBudget | None = budget
        # Zeros, not what the memory held: hidden numbers are multiplied too, by nothing.
        self._room_L2NHSE = past[0].new_zeros(shape)
        self._seen_NS = torch.zeros(shape[2], columns, dtype=torch.bool, device=past[0].device)
        for rows, tokens_L2BHSE in zip(self._slices, past, strict=True):
            start = self.column - tokens_L2BHSE.shape[-2]
            self._room_L2NHSE[:, :, rows, :, start : self.column] = tokens_L2BHSE
        with _links:
            for member in members:
                member.on_leave = self.free
        super().__init__(layers=[NextTokenLayer(self, index) for index in range(layers)])

    @property
    def rows(self) -> list[slice]:
        """Where each member's rows are."""
        return self._slices

    def serves(self, members: Sequence[PackedRows]) -> bool:
        """Whether this is a copy of just these rows, with room for one more token."""
        same = len(members) == len(self.members) and all(map(_is, members, self.members))
        return self._budget is not None and same and self.column < self._room_L2NHSE.shape[-2]

    def mask(self, seen: Sequence[torch.Tensor | None], dtype: torch.dtype) -> torch.Tensor:
        """What to add to the attention scores of the next token, [N, 1, 1, S].

        Args:
            seen: Of each member what its rows may look at, bool [B, S], the new token last; None
                for all of it.
            dtype: That attention is computed in.
        """
        upto = self.column + 1
        for rows, member, given in zip(self._slices, self.members, seen, strict=True):
            start = self.column - member.tokens
            self._seen_NS[rows, start:upto] = True if given is None else given
        hidden_NS = ~self._seen_NS[:, :upto]
        added_NS = torch.zeros(hidden_NS.shape, dtype=dtype, device=hidden_NS.device)
        return added_NS.masked_fill_(hidden_NS, torch.finfo(dtype).min)[:, None, None]

    def commit(self) -> None:
        """Gives every session its part of what the last forward wrote."""
        new_L2NHE = self._room_L2NHSE[..., self.column, :]
        for rows, member in zip(self._slices, self.members, strict=True):
            member.append(new_L2NHE[:, :, rows])
        self.column += 1

    def write(
        self, index: int, keys_NHSE: torch.Tensor, values_NHSE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes a block's new column; returns its keys and values up to there."""
        return write_column(self._room_L2NHSE[index], self.column, keys_NHSE, values_NHSE)

    def free(self) -> None:
        """Gives the memory back; the sessions' own rows are not touched."""
        with _links:
            if self._budget is None:
                return
            budget, self._budget = self._budget, None
            for member in self.members:
                if member.on_leave == self.free:
                    member.on_leave = None
            self.members = []
        self._room_L2NHSE = self._seen_NS = torch.empty(0)
        self.layers: list[Any] = []
        budget.release(self._nbytes)


def _slices(counts: Sequence[int]) -> list[slice]:
    ends = [sum(counts[: index + 1]) for index in range(len(counts))]
    return [slice(end - count, end) for count, end in zip(counts, ends, strict=True)]


def _is(one: object, other: object) -> bool:
    return one is other
