"""What a model's tables take: tokens of its vocabulary and, where they are learned, positions.

Checked before anything is loaded: a token or a position that a table lacks would end in an
IndexError in the middle of a forward. Rotary positions are computed, so they have no such end.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig
from transformers import PreTrainedConfig

from shared.errors import DataError, InvalidInputError
from shared.models.families import family_of


def learned_positions(config: PreTrainedConfig) -> int | None:
    """How many positions a model has learned; None if it computes them."""
    learns = family_of(config.model_type).learns_positions
    return int(config.max_position_embeddings) if learns else None


def virtual_tokens(adapter: PeftConfig | None) -> int:
    """How many positions an adapter's virtual tokens take."""
    return int(getattr(adapter, "num_virtual_tokens", None) or 0)


def check_block_length(config: PreTrainedConfig, tokens: int, virtual: int = 0) -> None:
    """Refuses blocks of text that are longer than what a model has learned positions for.

    Args:
        config: Of the whole model.
        tokens: Of a block.
        virtual: Tokens that an adapter puts before it.

    Raises:
        InvalidInputError: Says how many are accepted.
    """
    positions = learned_positions(config)
    if positions is not None and tokens + virtual > positions:
        taken = f", {virtual} of them for the adapter's virtual tokens" if virtual else ""
        raise InvalidInputError(
            f"--seq-len {tokens}: the model has {positions} positions{taken}; accepted are 2 to "
            f"{positions - virtual}"
        )


def check_prompt(
    ids_BT: torch.Tensor, config: PreTrainedConfig, new_tokens: int, virtual: int = 0
) -> None:
    """Refuses a prompt that is empty or too long, or too many tokens after it.

    Args:
        ids_BT: The prompt.
        config: Of the whole model.
        new_tokens: To be generated, at most.
        virtual: Tokens that an adapter puts before the prompt.

    Raises:
        DataError: If no token can follow the prompt.
        InvalidInputError: If so many cannot.
    """
    tokens, positions = ids_BT.shape[1], learned_positions(config)
    if positions is None:
        if not tokens:
            raise DataError("a prompt of 0 tokens: accepted is 1 or more")
        return
    room = positions - virtual
    if not 0 < tokens < room:
        raise DataError(f"a prompt of {tokens} tokens: accepted are 1 to {room - 1}")
    # The last token is not read again, so it needs no position.
    if new_tokens > room - tokens + 1:
        raise InvalidInputError(
            f"--max-new-tokens {new_tokens}: the model has {room} positions and the prompt "
            f"{tokens} tokens; accepted are 1 to {room - tokens + 1}"
        )


def unknown_token(ids: torch.Tensor, tokenizer: Any, config: PreTrainedConfig) -> str:
    """Describes a token that a model's vocabulary lacks; empty if it has all of them."""
    largest = int(ids.max()) if ids.numel() else -1
    if largest < config.vocab_size:
        return ""
    return (
        f"token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) is beyond the model's "
        f"vocabulary; accepted are 0 to {config.vocab_size - 1}, and this tokenizer has "
        f"{len(tokenizer)} tokens"
    )


def check_vocabulary(ids: torch.Tensor, tokenizer: Any, config: PreTrainedConfig) -> None:
    """Refuses tokens that a model's vocabulary lacks.

    Raises:
        DataError: Names one.
    """
    if unknown := unknown_token(ids, tokenizer, config):
        raise DataError(unknown)
