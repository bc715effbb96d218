"""The place of the trunk's key/value cache in the client's own."""

from __future__ import annotations

import uuid
import weakref
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from client_service.calls import CacheEdit
from client_service.trunk_function import Computed, TrunkFunction


class RemoteCacheLayer(CacheLayerMixin):  # type: ignore[misc]
    """Stands in a ``DynamicCache`` at the hole; holds no keys, only what to tell the trunk.

    Reordering (beam search), cropping and repeating are sent along with the next forward, so they
    cost no message of their own. The trunk's cache is freed with this object.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, trunk: TrunkFunction) -> None:
        super().__init__()
        self.cache_id = uuid.uuid4().hex
        self.is_initialized = True
        self._tokens = 0
        self._edits: list[CacheEdit] = []
        self.skipped = False
        """A forward with gradients went past this cache, which so lacks its tokens."""
        self.history: list[Computed] = []
        """What it is filled from, if the trunk loses it."""
        self._trunk = trunk
        self._release_later()

    def begin_with(self, tokens: int) -> None:
        """Counts tokens of a prefix that come with the first forward."""
        self._tokens = tokens

    def renew(self) -> None:
        """Takes another id, under which it is filled anew."""
        self._finalizer()
        self.cache_id = uuid.uuid4().hex
        self._release_later()

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteCacheLayer:
        """A fork: a cache of its own, filled from the same history when it is used."""
        made = type(self)(self._trunk)
        made._tokens, made._edits = self._tokens, list(self._edits)
        made.skipped, made.history = self.skipped, list(self.history)
        return memo.setdefault(id(self), made)  # type: ignore[no-any-return]

    def _release_later(self) -> None:
        self._finalizer = weakref.finalize(self, self._trunk.release, cache_id=self.cache_id)
        self._finalizer.atexit = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Does nothing: the tensors are the trunk's."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Refuses: no block of the client writes here.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError("the cache of the trunk's blocks is written by the trunk")

    def take_edits(self, new_tokens: int) -> list[CacheEdit]:
        """Returns the edits to send with a forward of ``new_tokens``, and counts those."""
        edits, self._edits = self._edits, []
        self._tokens += new_tokens
        return edits

    def get_seq_length(self) -> int:
        """Tokens in the trunk's cache."""
        return self._tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask over cached and new tokens."""
        return self._tokens + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reset(self) -> None:
        """Empties the trunk's cache before the next forward."""
        self._tokens = 0
        self.skipped = False
        self._edits = [CacheEdit(reset=True)]
        self.history = []

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Makes rows ``beam_idx`` the batch."""
        self._edits.append(CacheEdit(reorder=beam_idx.tolist()))

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens; transformers gives their number negated."""
        count = min(abs(tokens_to_remove), self._tokens)
        if count:
            self._tokens -= count
            self._edits.append(CacheEdit(remove_tokens=count))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        self._edits.append(CacheEdit(repeats=repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps some rows."""
        rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self._edits.append(CacheEdit(reorder=rows.tolist()))
