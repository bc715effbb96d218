"""A tenant's key/value caches for generation, by id, accounted in bytes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig

from shared.errors import ProtocolError, ResourceExhaustedError
from trunk_service.budget import ByteBudget
from trunk_service.requests import CacheEdit


class KeyValueCaches:
    """Caches of one session.

    Args:
        config: The trunk part's configuration.
        itemsize: Bytes of one cached number.
        budget: The session's byte budget.
    """

    def __init__(self, config: PreTrainedConfig, itemsize: int, budget: ByteBudget) -> None:
        self._config = config
        self._budget = budget
        self._caches: dict[str, DynamicCache] = {}
        self._reserved: dict[str, int] = {}
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        self._token_bytes = 2 * config.num_hidden_layers * heads * head_dim * itemsize

    def __len__(self) -> int:
        return len(self._caches)

    def tokens(self, cache_id: str, edits: list[CacheEdit]) -> int:
        """Tokens in a cache once the edits are applied; 0 for a new one.

        Raises:
            ProtocolError: If an edit does not fit the cache.
        """
        _, tokens = self._shape_after(cache_id, edits)
        return tokens

    def open(self, cache_id: str, edits: list[CacheEdit], batch: int, tokens: int) -> DynamicCache:
        """Reserves room for ``tokens`` more, applies the edits and returns the cache.

        Raises:
            ProtocolError: If an edit or the batch size does not fit the cache.
            ResourceExhaustedError: If the budget is spent; nothing was changed.
        """
        rows, kept = self._shape_after(cache_id, edits)
        if rows not in (0, batch):
            raise ProtocolError(f"cache {cache_id} has {rows} rows, hidden_states have {batch}")
        needed = batch * (kept + tokens) * self._token_bytes
        extra = needed - self._reserved.get(cache_id, 0)
        if extra > 0:
            self._budget.reserve(extra)
            self._reserved[cache_id] = needed
        cache = self._caches.setdefault(cache_id, DynamicCache(config=self._config))
        for edit in edits:
            _apply(cache, edit)
        if extra < 0:
            self._budget.release(-extra)
            self._reserved[cache_id] = needed
        return cache

    def drop(self, cache_id: str) -> None:
        """Frees a cache; one that is not there is ignored."""
        self._caches.pop(cache_id, None)
        self._budget.release(self._reserved.pop(cache_id, 0))

    def drop_all(self) -> None:
        """Frees every cache."""
        for cache_id in list(self._reserved):
            self.drop(cache_id)

    def _shape_after(self, cache_id: str, edits: list[CacheEdit]) -> tuple[int, int]:
        rows, tokens = _shape(self._caches.get(cache_id))
        for edit in edits:
            rows, tokens = _edited_shape(cache_id, edit, rows, tokens)
            grown = rows * tokens * self._token_bytes - self._reserved.get(cache_id, 0)
            if grown > 0 and not self._budget.fits(grown):
                raise ResourceExhaustedError(
                    f"cache {cache_id}: an edit to {rows} rows of {tokens} tokens does not fit"
                )
        return rows, tokens


def _shape(cache: DynamicCache | None) -> tuple[int, int]:
    if cache is None or not cache.get_seq_length():
        return 0, 0
    keys: Any = cache.layers[0].keys
    return int(keys.shape[0]), int(keys.shape[-2])


def _edited_shape(cache_id: str, edit: CacheEdit, rows: int, tokens: int) -> tuple[int, int]:
    if edit.reset:
        return 0, 0
    if edit.reorder is not None:
        if not edit.reorder:
            raise ProtocolError(f"cache {cache_id}: a reorder to no rows")
        if tokens and any(index >= rows for index in edit.reorder):
            raise ProtocolError(f"cache {cache_id} has {rows} rows; {edit.reorder} names others")
        return (len(edit.reorder), tokens) if tokens else (rows, tokens)
    if edit.remove_tokens is not None:
        if edit.remove_tokens > tokens:
            raise ProtocolError(f"cache {cache_id} has {tokens} tokens, not {edit.remove_tokens}")
        return rows, tokens - edit.remove_tokens
    if edit.repeats:
        return rows * edit.repeats, tokens
    raise ProtocolError(f"cache {cache_id}: an edit that says nothing")


def _apply(cache: DynamicCache, edit: CacheEdit) -> None:
    if edit.reset:
        cache.reset()
    elif edit.reorder is not None:
        cache.reorder_cache(torch.tensor(edit.reorder, dtype=torch.int64))
    elif edit.remove_tokens:
        cache.crop(-edit.remove_tokens)
    elif edit.repeats:
        cache.batch_repeat_interleave(edit.repeats)
