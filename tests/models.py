"""Tiny seeded checkpoints of every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 512

GPT2: dict[str, Any] = {
    "n_layer": 12,
    "n_embd": 64,
    "n_head": 4,
    "vocab_size": VOCAB,
    "n_positions": 128,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OTHERS: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Where a family has a sliding window, the tests' sequences are longer than it; where heads may be
# of another size than hidden_size / num_attention_heads, they are.
OF_FAMILY: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": 9},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 32},
    "gemma": {"num_key_value_heads": 1, "head_dim": 32},
    "gemma2": {
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": 9,
        # Small enough that the tiny model's logits feel them.
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "phi": {},
    "gpt_neox": {},
}


def tiny_model(family: str, **changes: Any) -> Any:
    """A model with weights large enough that every block matters."""
    torch.manual_seed(0)
    model = _build(family, changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.02))
    return model.eval()


def save_tiny_model(family: str, folder: Path, **changes: Any) -> Path:
    tiny_model(family, **changes).save_pretrained(folder)
    return folder


def _build(family: str, changes: dict[str, Any]) -> Any:
    settings = GPT2 if family == "gpt2" else OTHERS | OF_FAMILY[family]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings | changes))
