"""What a client asks of a trunk and is answered, as plain values.

Dimension letters: B batch, T tokens, D model dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from shared.adapters.state_push import StatePush
from shared.wire.formats import WireFormat


@dataclass(frozen=True)
class SessionTerms:
    """What a client expects of a trunk and asks of it."""

    split: tuple[int, int] | None = None
    """First block of the trunk and first block above; None takes what the trunk serves."""
    weight_digest: str | None = None
    """None where the client cannot know it: then it is not checked."""
    activation_format: WireFormat = WireFormat.FLOAT32
    """How hidden states travel, both ways."""
    gradient_format: WireFormat = WireFormat.FLOAT32
    adapter_format: WireFormat = WireFormat.FLOAT32
    """How float32 tensors of adapters travel, and their gradients back."""


@dataclass(frozen=True)
class CacheEdit:
    """A change of the trunk's cache before a forward; exactly one is set."""

    reorder: list[int] | None = None
    remove_tokens: int | None = None
    repeats: int | None = None
    reset: bool = False


@dataclass(frozen=True)
class ForwardCall:
    """What goes with hidden states; see ``Forward`` in the protocol."""

    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    request_id: str = ""
    keep_graph: bool = False
    training: bool = False
    cache_id: str = ""
    cache_edits: list[CacheEdit] = field(default_factory=list)
    cached_tokens: int | None = None
    """Tokens that the cache must have by then; None does not say."""
    in_float32: bool = False
    """Travels in float32 both ways, whatever the session's format."""
    state_version: int = 0
    """Of the client's adapters; 0 means that it has sent none."""
    push: StatePush | None = None
    """What changed of them."""
    past: tuple[torch.Tensor, ...] = ()
    """Keys and values [B, H, P, D/H] in turn, of every block, before the first token."""
    adapter_names: tuple[str, ...] = ()
    """One a row; empty for the active ones."""
    attention: str = ""
    """transformers' word for how it is computed; empty is the trunk's own way."""
    autocast: torch.dtype | None = None
    """What torch's autocast computes in, if it is on."""
    dropout_key: bytes = b""
    """Fixes every dropout mask, where dropout draws."""
    blocks: tuple[int, int] | None = None
    """First and end of those that compute; None for all."""
