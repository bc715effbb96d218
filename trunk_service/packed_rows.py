"""The keys and values of one cache in one tensor that has room for more tokens.

A ``DynamicCache`` copies itself in every block for every token. While a cache is only extended by
one token after the other, alone or together with those of others (see
:mod:`trunk_service.stacked_rows`), it is kept like this instead: one write per token.

Dimension letters: L blocks, B batch, H heads, S tokens, E head dimension; 2 stands for keys and
values.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from trunk_service.next_token import NextTokenLayer, write_column

_ROOM = 64
_numbers = itertools.count()


def capacity(tokens: int) -> int:
    """Tokens that there is room for where so many are."""
    return -(-tokens // _ROOM) * _ROOM


class PackedRows:
    """Rows of a cache, packed.

    Args:
        cache: What is packed; it holds no tensors of its own any more.
    """

    def __init__(self, cache: DynamicCache) -> None:
        self.number = next(_numbers)
        """Where these rows come among others."""
        self._cache = cache
        layers: list[Any] = cache.layers
        self.tokens = int(layers[0].keys.shape[-2])
        rows, heads, _, width = layers[0].keys.shape
        shape = (len(layers), 2, rows, heads, capacity(self.tokens + 1), width)
        self._room_L2BHSE: torch.Tensor = layers[0].keys.new_zeros(shape)
        for layer, past_2BHSE in zip(layers, self.past, strict=True):
            past_2BHSE[0], past_2BHSE[1] = layer.keys, layer.values
            layer.keys, layer.values = past_2BHSE  # one block's own tensors are gone at a time
        self.on_leave: Callable[[], None] | None = None
        """Called when the rows are unpacked or freed: whoever has a copy drops it."""

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return int(self._room_L2BHSE.shape[2])

    @property
    def past(self) -> torch.Tensor:
        """The keys and values of all tokens so far."""
        return self._room_L2BHSE[..., : self.tokens, :]

    def make_room(self) -> None:
        """Makes room for one more token."""
        full = self._room_L2BHSE.shape[-2]
        if self.tokens == full:
            *outer, _, width = self._room_L2BHSE.shape
            grown = self._room_L2BHSE.new_zeros((*outer, capacity(full + 1), width))
            grown[..., :full, :] = self._room_L2BHSE
            self._room_L2BHSE = grown
            self._show()  # else the cache would keep the old one

    def append(self, new_L2BHE: torch.Tensor) -> None:
        """Adds one token, for which there must be room."""
        self._room_L2BHSE[..., self.tokens, :] = new_L2BHE
        self.tokens += 1

    @property
    def column(self) -> int:
        """Where the next token is written."""
        return self.tokens

    def extended(self) -> Cache:
        """A cache for a forward of one token more of these rows alone; :meth:`commit` keeps it."""
        self.leave()
        layers = self._room_L2BHSE.shape[0]
        return Cache(layers=[NextTokenLayer(self, index) for index in range(layers)])

    def write(
        self, index: int, keys_NHSE: torch.Tensor, values_NHSE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes a block's next token, for which there must be room; returns it with the past."""
        return write_column(self._room_L2BHSE[index], self.tokens, keys_NHSE, values_NHSE)

    def commit(self) -> None:
        """Keeps the token that was written."""
        self.tokens += 1

    def unpack(self) -> DynamicCache:
        """Returns the cache with all tokens in it; these rows are not to be used any more."""
        self.leave()
        self._show()
        return self._cache

    def leave(self) -> None:
        """Tells whoever has a copy of the rows that they are gone."""
        left, self.on_leave = self.on_leave, None
        if left is not None:
            left()

    def _show(self) -> None:
        """Makes the cache's tensors views of these."""
        layers: list[Any] = self._cache.layers
        for layer, (keys_BHSE, values_BHSE) in zip(layers, self.past, strict=True):
            layer.keys, layer.values = keys_BHSE, values_BHSE
