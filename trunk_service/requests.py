"""What a tenant asks for and gets, as plain values: no gRPC, no generated messages.

Dimension letters: B batch, T tokens, S tokens with those in the cache, D model dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import torch

from shared.adapters.state_push import StatePush
from shared.versions import library_versions
from shared.wire.formats import Packed, WireFormat


@dataclass(frozen=True)
class OpenRequest:
    """The terms of a session."""

    weight_digest: str
    start_layer: int
    end_layer: int
    library_versions: Mapping[str, str] = field(default_factory=library_versions)
    """The client's; see :mod:`shared.versions`."""


@dataclass(frozen=True)
class CacheEdit:
    """A change of a key/value cache before a forward; exactly one field is set."""

    reorder: list[int] | None = None
    """Row i of the batch becomes what row ``reorder[i]`` was."""
    remove_tokens: int | None = None
    repeats: int | None = None
    """Every row is repeated this often, next to itself."""
    reset: bool = False


@dataclass(frozen=True)
class ForwardRequest:
    """Hidden states [B, T, D] to carry through the trunk."""

    hidden_BTD: torch.Tensor
    attention_mask: torch.Tensor | None = None
    """[B, S] of zeros and ones, or [B, 1, T, S]."""
    position_ids: torch.Tensor | None = None
    """[B or 1, T]."""
    request_id: str = ""
    keep_graph: bool = False
    training: bool = False
    cache_id: str = ""
    cache_edits: list[CacheEdit] = field(default_factory=list)
    cached_tokens: int | None = None
    """Tokens that the cache must have behind the edits."""
    answer_format: WireFormat = WireFormat.FLOAT32
    state_version: int = 0
    """Of the client's adapters; 0 before any came."""
    push: StatePush | None = None
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
    """First and end of those that compute, as the whole model counts; None for all."""

    @property
    def past_tokens(self) -> int:
        """Tokens that stand before the first one."""
        return int(self.past[0].shape[-2]) if self.past else 0


class HeldMode(Enum):
    """What is kept of a forward until its backward."""

    RETAINED = "retained"
    """The autograd graph."""
    RECOMPUTED = "recomputed"
    """The boundary activation; the graph is made again in backward."""
    OFFLOADED = "offloaded"
    """The autograd graph, its tensors elsewhere than in the memory that computes."""


@dataclass(frozen=True)
class ForwardAnswer:
    """Hidden states [B, T, D] behind the trunk, and what is held for backward."""

    hidden_BTD: Packed
    held_mode: HeldMode | None = None
    held_bytes: int = 0


@dataclass(frozen=True)
class BackwardRequest:
    """The gradient [B, T, D] of the loss with respect to a forward's answer."""

    gradient_BTD: torch.Tensor
    request_id: str
    need_input_gradient: bool = True
    answer_format: WireFormat = WireFormat.FLOAT32
    values: tuple[str, ...] = ()
    """First names of the client's values whose gradients are wanted."""
    past: tuple[int, ...] = ()
    """Numbers of the past tensors whose gradients are wanted."""
    keep_graph: bool = False
    """Whether another backward will follow."""
    value_format: WireFormat = WireFormat.FLOAT32
    """How the values' gradients travel, where they are float32."""


@dataclass(frozen=True)
class BackwardAnswer:
    """The gradient [B, T, D] with respect to a forward's input, if it was asked for."""

    gradient_BTD: Packed | None
    values: dict[str, Packed] = field(default_factory=dict)
    """Gradients of the client's values, where the output depends on them."""
    past: dict[int, Packed] = field(default_factory=dict)
    """Gradients of the past tensors, by number."""


@dataclass(frozen=True)
class FetchRequest:
    """Base weights of the blocks to read, by full name; all vectors if nothing is named."""

    names: tuple[str, ...] = ()
    norm_rows: tuple[str, ...] = ()
    """Matrices of which only the 2-norms of the rows are wanted."""
    norm_columns: tuple[str, ...] = ()
    """Of the columns."""
