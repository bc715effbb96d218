"""The places of the trunk's key/value cache in the client's own."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from client_service.calls import CacheEdit
from client_service.trunk_function import Computed, TrunkFunction
from shared.errors import ProtocolError


def past_of(layers: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    """Keys and values that a cache has of the trunk's blocks, in turn; nothing of an empty one.

    Raises:
        ProtocolError: If it does not have all of them, as one whose window they have left.
    """
    counts = [int(layer.get_seq_length()) for layer in layers]
    if not any(counts):
        return ()
    past: list[torch.Tensor] = []
    for layer, count in zip(layers, counts, strict=True):
        for tensor in (layer.keys, layer.values):
            if type(layer) is StaticLayer:
                tensor = tensor[:, :, :count]
            if not isinstance(layer, DynamicLayer | StaticLayer) or tensor.shape[-2] != count:
                raise ProtocolError(
                    f"a {type(layer).__name__} of {count} tokens that another model has filled: "
                    f"accepted are caches that keep every token"
                )
            past.append(tensor)
    return tuple(past)


def put_remote_layers(
    cache: Any, start: int, end: int, trunk: TrunkFunction, past: Sequence[torch.Tensor]
) -> None:
    """Puts what stands for the trunk's cache in the place of a cache's layers ``start .. end - 1``.

    Args:
        cache: transformers'.
        start: First of the trunk's blocks.
        end: First block above.
        trunk: That has the cache.
        past: As of :func:`past_of`; the trunk is given it with the next forward.
    """
    before = cache.layers[start:end]
    first = RemoteCacheLayer(trunk, before[0])
    first.begin_with(int(past[0].shape[-2]) if past else 0)
    cache.layers[start:end] = [first, *(FollowingCacheLayer(first, like) for like in before[1:])]


class _Shape(CacheLayerMixin):  # type: ignore[misc]
    """What masks ask a layer of a cache, answered as by the kind of layer that it stands for."""

    def __init__(self, like: Any) -> None:
        self._like = like
        self.is_sliding = bool(getattr(like, "is_sliding", False))
        self.is_compileable = bool(like.is_compileable)
        self.is_croppable = bool(like.is_croppable)
        self.is_initialized = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask over cached and new tokens."""
        like, tokens = self._like, self.get_seq_length()
        if self.is_sliding:
            # The only thing that these ask of themselves.
            name = "cumulative_length" + "_int" * isinstance(like, StaticLayer)
            setattr(like, name, tokens)
        elif not isinstance(like, StaticLayer):
            return tokens + query_length, 0
        length, offset = like.get_mask_sizes(query_length)
        return int(length), int(offset)

    def get_max_length(self) -> int:
        """As of the kind of layer."""
        return int(self._like.get_max_length())

    @property
    def keys(self) -> torch.Tensor:
        """Refuses: they are the trunk's.

        Raises:
            ProtocolError: Always.
        """
        raise ProtocolError(
            "keys and values of the trunk's blocks are not here: accepted are the cache as it is, "
            "copies of it, and what crops and reorders it"
        )

    values = keys

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Does nothing: the tensors are the trunk's."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Refuses: no block of the client writes here.

        Raises:
            ProtocolError: Always.
        """
        raise ProtocolError(
            "a cache whose middle is on a trunk was given to another model: accepted is the model "
            "that has filled it"
        )


class RemoteCacheLayer(_Shape):
    """Stands in a cache for the trunk's first block; holds no keys, only what to tell the trunk.

    Reordering (beam search), cropping and repeating are sent along with the next forward, so they
    cost no message of their own. The trunk's cache is freed with this object.

    Args:
        trunk: That has the cache.
        like: The layer whose place it takes, empty.
    """

    def __init__(self, trunk: TrunkFunction, like: Any) -> None:
        super().__init__(like)
        self.cache_id = uuid.uuid4().hex
        self._tokens = 0
        self._edits: list[CacheEdit] = []
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
        made = type(self)(self._trunk, self._like)
        made._tokens, made._edits = self._tokens, list(self._edits)
        made.history = list(self.history)
        return memo.setdefault(id(self), made)  # type: ignore[no-any-return]

    def _release_later(self) -> None:
        self._finalizer = weakref.finalize(self, self._trunk.release, cache_id=self.cache_id)
        self._finalizer.atexit = False

    def take_edits(self, new_tokens: int) -> list[CacheEdit]:
        """Returns the edits to send with a forward of ``new_tokens``, and counts those."""
        edits, self._edits = self._edits, []
        self._tokens += new_tokens
        return edits

    def get_seq_length(self) -> int:
        """Tokens in the trunk's cache."""
        return self._tokens

    def reset(self) -> None:
        """Empties the trunk's cache before the next forward."""
        self._tokens = 0
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


class FollowingCacheLayer(_Shape):
    """Stands for another of the trunk's blocks, whose cache changes with the first one's.

    Args:
        first: Which that is.
        like: The layer whose place it takes, empty.
    """

    def __init__(self, first: RemoteCacheLayer, like: Any) -> None:
        super().__init__(like)
        self._first = first

    def get_seq_length(self) -> int:
        """Tokens in the trunk's cache."""
        return self._first.get_seq_length()

    def _follow(self, *args: Any) -> None:
        """Does nothing: what is asked of a cache is asked of the first block's layer as well."""

    reset = reorder_cache = crop = batch_repeat_interleave = batch_select_indices = _follow
