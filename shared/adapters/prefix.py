"""Prefix tuning over parts: each part holds the columns of its own blocks.

PEFT keeps the keys and values of all blocks' prefixes in one matrix, ``prompt_embeddings``
[virtual tokens, blocks x 2 x key width], block after block (``PeftModel.get_prompt``).
"""

from __future__ import annotations

import torch

from shared.errors import AdapterError
from shared.models.split_range import SplitRange

KEY = "prompt_embeddings"


def cut_prefix(
    embeddings: torch.Tensor, split: SplitRange, num_layers: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divides a whole model's prefix into the client's and the trunk's.

    The client's model has one block in the place of the trunk's, whose columns are zero here and
    never read.

    Raises:
        AdapterError: If the columns cannot be those of so many blocks.
    """
    tokens, width = embeddings.shape
    if width % num_layers:
        raise AdapterError(f"{KEY} has {width} columns: not those of {num_layers} blocks")
    by_layer = embeddings.reshape(tokens, num_layers, -1)
    hole = torch.zeros_like(by_layer[:, :1])
    client = torch.cat([by_layer[:, : split.start], hole, by_layer[:, split.end :]], dim=1)
    trunk = by_layer[:, split.start : split.end]
    return client.reshape(tokens, -1).clone(), trunk.reshape(tokens, -1).clone()


def join_prefix(client: torch.Tensor, trunk: torch.Tensor, split: SplitRange) -> torch.Tensor:
    """The whole model's prefix, from the client's (with its unused columns) and the trunk's."""
    tokens = client.shape[0]
    theirs = trunk.reshape(tokens, split.end - split.start, -1)
    ours = client.reshape(tokens, -1, theirs.shape[-1])
    joined = torch.cat([ours[:, : split.start], theirs, ours[:, split.start + 1 :]], dim=1)
    return joined.reshape(tokens, -1).clone()
