"""Some of a trunk's blocks by themselves, for a client that looks between them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin


class _Passed(nn.Module):
    """Stands for a block that another forward computes."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        if (kind := getattr(block, "attention_type", None)) is not None:
            self.attention_type = kind  # by which some families choose a block's mask

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Hands on what it is given."""
        return hidden_states


class _OtherBlock(CacheLayerMixin):  # type: ignore[misc]
    """A layer of a cache in whose place another one answers how many tokens there are."""

    def __init__(self, own: Any, answers: Any, tokens: int) -> None:
        super().__init__()
        self.is_sliding = own.is_sliding
        same = own.is_sliding == answers.is_sliding
        self._answers, self._tokens = answers if same else None, tokens

    def get_seq_length(self) -> int:
        """Tokens before this forward."""
        return self._tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask; of one that no block reads, as without a window."""
        if self._answers is None:
            return self._tokens + query_length, 0
        length, offset = self._answers.get_mask_sizes(query_length)
        return int(length), int(offset)

    def get_max_length(self) -> int:
        """None."""
        return -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Does nothing."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Refuses: this block does not compute now.

        Raises:
            AssertionError: Always.
        """
        raise AssertionError("a block that does not compute wrote into its cache")


@contextlib.contextmanager
def blocks_alone(model: Any, blocks: tuple[int, int] | None) -> Iterator[None]:
    """Lets only some of a part's blocks compute, while it lasts.

    Args:
        model: A trunk part, of one tenant.
        blocks: First and end of those that do, as the whole model counts; None for all.
    """
    if blocks is None:
        yield
        return
    layers = getattr(model.base, model.family.layers)._modules
    whole = dict(layers)
    for name, block in whole.items():
        if not blocks[0] <= int(name) < blocks[1]:
            layers[name] = _Passed(block)
    try:
        yield
    finally:
        layers.update(whole)


def cache_of_blocks(cache: DynamicCache, first: int, end: int, tokens: int) -> DynamicCache:
    """A cache for some blocks: the others' layers, which may be a forward ahead, only answer.

    Args:
        cache: Of all blocks.
        first: Position of the first block that computes.
        end: Position behind the last one.
        tokens: In that block's cache.
    """
    own: list[Any] = list(cache.layers)
    answers = own[first]
    seen = DynamicCache()
    seen.layers = [
        layer if first <= i < end else _OtherBlock(layer, answers, tokens)
        for i, layer in enumerate(own)
    ]
    return seen
