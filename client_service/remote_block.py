"""The hole: one module in the place of the trunk's blocks.

Dimension letters: B batch, T tokens, S tokens with those in the cache, D model dimension.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from client_service.remote_cache import RemoteCacheLayer
from client_service.remote_trunk import RemoteTrunk
from shared.errors import ProtocolError, TensorError


class RemoteBlock(nn.Module):
    """Takes a block's place in the family's own forward and asks the trunk.

    Args:
        trunk: The session.
        slot: This block's index in the client's cache.
    """

    def __init__(self, trunk: RemoteTrunk, slot: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.proxy = trunk.proxy
        self._slot = slot
        self._mask: torch.Tensor | None = None

    def watch_mask(self, base: nn.Module) -> None:
        """Remembers the attention mask of every forward of the base model.

        Blocks are given the mask that transformers made of it; the trunk's own forward makes that
        itself and needs the original.
        """
        signature = inspect.signature(base.forward)

        def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = signature.bind_partial(*args, **kwargs).arguments
            self._mask = given.get("attention_mask")

        base.register_forward_pre_hook(remember, with_kwargs=True)

    def forward(
        self,
        hidden_BTD: torch.Tensor,
        *args: Any,
        past_key_values: Any = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Returns the hidden states [B, T, D] behind the trunk.

        Raises:
            TensorError: If the attention mask is shorter or longer than the tokens.
            ProtocolError: If the cache was filled by a forward with gradients.
            TrunklineError: What the trunk answered, if it refused.
        """
        if past_key_values is None:
            # GPT-2 passes the cache by position, GPT-NeoX under its older name.
            past_key_values = args[0] if args else kwargs.get("layer_past")
        layer = self._cache_layer(past_key_values)
        if layer is not None and layer.skipped:
            raise ProtocolError(
                "this cache comes from a forward with gradients, of which the trunk caches "
                "nothing; run both forwards under torch.no_grad()"
            )
        cached = layer.get_seq_length() if layer is not None else 0
        mask = self._own_mask(cached + hidden_BTD.shape[1])
        if layer is None or (torch.is_grad_enabled() and not cached):
            if layer is not None:
                layer.skipped = True
            # In training the default configuration makes a cache that nothing reads.
            return self.trunk.run(hidden_BTD, mask, position_ids, self.training)
        if cached and hidden_BTD.shape[1] == 1 and mask is not None and _hides_nothing(mask):
            mask = None  # hides nothing from a single token, and would be longer with every one
        edits = layer.take_edits(hidden_BTD.shape[1])
        return self.trunk.run_cached(hidden_BTD, mask, position_ids, layer.cache_id, edits, cached)

    def _cache_layer(self, cache: Any) -> RemoteCacheLayer | None:
        if cache is None:
            return None
        while len(cache.layers) <= self._slot:
            cache.layers.append(cache.layer_class_to_replicate())
        if not isinstance(cache.layers[self._slot], RemoteCacheLayer):
            cache.layers[self._slot] = RemoteCacheLayer(self.trunk)
        layer: RemoteCacheLayer = cache.layers[self._slot]
        return layer

    def _own_mask(self, total: int) -> torch.Tensor | None:
        """The mask over tokens alone, without the columns of a prefix."""
        mask = self._mask
        if mask is None:
            return None
        if mask.shape[-1] != total + self.trunk.prefix_tokens:
            raise TensorError(
                f"attention_mask covers {mask.shape[-1]} tokens, there are "
                f"{total + self.trunk.prefix_tokens}"
            )
        if mask.ndim != 2:
            return mask
        # PEFT makes a mask with virtual tokens out of float ones.
        return mask[:, self.trunk.prefix_tokens :].to(torch.bool)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # The proxy stays float32 on the CPU whatever the model is cast or moved to: in bfloat16
        # the clipping scale read off its gradient would have eight bits.
        return self

    def _save_to_state_dict(self, *args: Any) -> None:
        """Leaves the proxy out: it stands for the trunk's weights and has no value of its own."""

    def _load_from_state_dict(self, *args: Any) -> None:
        """Expects nothing, as nothing was saved."""


def _hides_nothing(mask: torch.Tensor) -> bool:
    return mask.dtype == torch.bool and bool(mask.all())
