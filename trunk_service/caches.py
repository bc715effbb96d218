"""A tenant's key/value caches for generation, by id, accounted in bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig

from shared.errors import ProtocolError, ResourceExhaustedError
from trunk_service.budget import ByteBudget
from trunk_service.packed_rows import PackedRows, capacity
from trunk_service.requests import CacheEdit


@dataclass(frozen=True)
class _Shape:
    """Rows and tokens of a cache, and of those tokens how many its windowed blocks still keep."""

    rows: int = 0
    tokens: int = 0
    kept: int = 0


class KeyValueCaches:
    """Caches of one session.

    Blocks with a sliding window keep tokens that have left it until the next crop, as transformers
    does for assisted generation, which crops. They are accounted like the others.

    Args:
        config: The trunk part's configuration.
        itemsize: Bytes of one cached number.
        budget: The session's byte budget.
    """

    def __init__(self, config: PreTrainedConfig, itemsize: int, budget: ByteBudget) -> None:
        self._config = config
        self._budget = budget
        self._caches: dict[str, DynamicCache] = {}
        self._packed: dict[str, PackedRows] = {}
        self._reserved: dict[str, int] = {}
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        self._token_bytes = 2 * config.num_hidden_layers * heads * head_dim * itemsize
        layers: list[Any] = DynamicCache(config=config).layers
        self._window = min((la.sliding_window for la in layers if la.is_sliding), default=None)

    def __contains__(self, cache_id: str) -> bool:
        return cache_id in self._caches or cache_id in self._packed

    def __len__(self) -> int:
        return len(self._caches)

    @property
    def can_pack(self) -> bool:
        """Whether every block keeps every token."""
        return self._window is None

    def tokens(self, cache_id: str, edits: list[CacheEdit], blocks: range | None = None) -> int:
        """Tokens in a cache once the edits are applied; 0 for a new one.

        Args:
            cache_id: Of the cache.
            edits: That would come first.
            blocks: Positions of those that go on with it; None for all. Others may be a forward
                ahead or behind.

        Raises:
            ProtocolError: If an edit does not fit the cache, or the blocks do not go together.
        """
        shape = self._shape_after(cache_id, edits)
        cache = self._caches.get(cache_id)
        if cache is None or cache_id in self._packed:
            return shape.tokens
        asked = range(len(cache.layers)) if edits or blocks is None else blocks
        counts = {int(cache.get_seq_length(block)) for block in asked}
        if edits:
            counts.discard(0)  # of blocks that the client leaves out
        if len(counts) > 1:
            raise ProtocolError(
                f"cache {cache_id} has {min(counts)} tokens in some blocks and {max(counts)} in "
                f"others: a forward did not go through all of them"
            )
        return shape.tokens if edits else counts.pop()

    def open(self, cache_id: str, edits: list[CacheEdit], batch: int, tokens: int) -> DynamicCache:
        """Reserves room for ``tokens`` more, applies the edits and returns the cache.

        Raises:
            ProtocolError: If an edit or the batch size does not fit the cache.
            ResourceExhaustedError: If the budget is spent; nothing was changed.
        """
        shape = self._shape_after(cache_id, edits)
        if shape.rows not in (0, batch):
            raise ProtocolError(
                f"cache {cache_id} has {shape.rows} rows, hidden_states have {batch}"
            )
        return self._open(cache_id, edits, batch * (shape.tokens + tokens) * self._token_bytes)

    def pack(self, cache_id: str, edits: list[CacheEdit], batch: int) -> PackedRows | None:
        """Reserves room for one more token, applies the edits and returns the cache, packed.

        Returns:
            The rows, to be appended one token; None if the cache has no tokens yet or other rows
            than the batch.

        Raises:
            ProtocolError: If an edit does not fit the cache.
            ResourceExhaustedError: If the budget is spent; nothing was changed.
        """
        shape = self._shape_after(cache_id, edits)
        if not shape.tokens or shape.rows != batch:
            return None
        needed = batch * capacity(shape.tokens + 1) * self._token_bytes
        packed = None if edits else self._packed.get(cache_id)
        if packed is not None and needed == self._reserved[cache_id]:
            return packed
        # Held twice while it is copied into more room.
        copied = self._reserved.get(cache_id, 0)
        self._budget.reserve(copied)
        try:
            if packed is None:
                packed = PackedRows(self._open(cache_id, edits, needed))
                self._packed[cache_id] = packed
            else:
                self._reserve(cache_id, needed)
                packed.make_room()
        finally:
            self._budget.release(copied)
        return packed

    def drop(self, cache_id: str) -> None:
        """Frees a cache; one that is not there is ignored."""
        if (packed := self._packed.pop(cache_id, None)) is not None:
            packed.leave()
        self._caches.pop(cache_id, None)
        self._budget.release(self._reserved.pop(cache_id, 0))

    def drop_all(self) -> None:
        """Frees every cache."""
        for cache_id in list(self._reserved):
            self.drop(cache_id)

    def _open(self, cache_id: str, edits: list[CacheEdit], needed: int) -> DynamicCache:
        """Reserves so many bytes in all, then applies the edits."""
        held = self._reserved.get(cache_id, 0)
        self._reserve(cache_id, max(needed, held))
        if (packed := self._packed.pop(cache_id, None)) is not None:
            packed.unpack()
        if cache_id not in self._caches:
            self._caches[cache_id] = DynamicCache(config=self._config)
            self._caches[cache_id].activate_past_recording()
        cache = self._caches[cache_id]
        for edit in edits:
            _apply(cache, edit)
        self._reserve(cache_id, needed)
        return cache

    def _reserve(self, cache_id: str, needed: int) -> None:
        """Reserves so many bytes for a cache, or gives back what it has more."""
        extra = needed - self._reserved.get(cache_id, 0)
        if extra > 0:
            self._budget.reserve(extra)
        else:
            self._budget.release(-extra)
        self._reserved[cache_id] = needed

    def _shape_after(self, cache_id: str, edits: list[CacheEdit]) -> _Shape:
        if (packed := self._packed.get(cache_id)) is not None:
            shape = _Shape(packed.rows, packed.tokens, packed.tokens)
        else:
            shape = _shape(self._caches.get(cache_id))
        for edit in edits:
            shape = _edited_shape(cache_id, edit, shape, self._window)
            needed = shape.rows * shape.tokens * self._token_bytes
            grown = needed - self._reserved.get(cache_id, 0)
            if grown > 0 and not self._budget.fits(grown):
                raise ResourceExhaustedError(
                    f"cache {cache_id}: an edit to {shape.rows} rows of {shape.tokens} tokens "
                    f"does not fit"
                )
        return shape


def _shape(cache: DynamicCache | None) -> _Shape:
    if cache is None or not cache.get_seq_length():
        return _Shape()
    keys: list[Any] = [layer.keys for layer in cache.layers]
    kept = min(int(k.shape[-2]) for k in keys if k is not None)
    return _Shape(int(keys[0].shape[0]), cache.get_seq_length(), kept)


def _edited_shape(cache_id: str, edit: CacheEdit, shape: _Shape, window: int | None) -> _Shape:
    rows, tokens = shape.rows, shape.tokens
    if edit.reset:
        return _Shape()
    if edit.reorder is not None:
        if not edit.reorder:
            raise ProtocolError(f"cache {cache_id}: a reorder to no rows")
        if tokens and any(index >= rows for index in edit.reorder):
            raise ProtocolError(f"cache {cache_id} has {rows} rows; {edit.reorder} names others")
        return replace(shape, rows=len(edit.reorder)) if tokens else shape
    if edit.remove_tokens is not None:
        return _cropped_shape(cache_id, edit.remove_tokens, shape, window)
    if edit.repeats:
        return replace(shape, rows=rows * edit.repeats)
    raise ProtocolError(f"cache {cache_id}: an edit that says nothing")


def _cropped_shape(cache_id: str, count: int, shape: _Shape, window: int | None) -> _Shape:
    tokens, kept = shape.tokens - count, shape.kept - count
    if tokens < 0:
        raise ProtocolError(f"cache {cache_id} has {shape.tokens} tokens, not {count}")
    if window is not None and kept < min(tokens, window - 1):
        # A crop forgets what has left the window, so that a second one may not reach behind it.
        raise ProtocolError(
            f"cache {cache_id}: {count} tokens cannot be removed, blocks with a sliding window of "
            f"{window} keep only the last {shape.kept} of {shape.tokens}"
        )
    if window is not None and count and shape.tokens >= window:
        kept = min(kept, window - 1)
    return _Shape(shape.rows, tokens, kept)


def _apply(cache: DynamicCache, edit: CacheEdit) -> None:
    if edit.reset:
        cache.reset()
    elif edit.reorder is not None:
        cache.reorder_cache(torch.tensor(edit.reorder, dtype=torch.int64))
    elif edit.remove_tokens:
        cache.crop(-edit.remove_tokens)
    elif edit.repeats:
        cache.batch_repeat_interleave(edit.repeats)
