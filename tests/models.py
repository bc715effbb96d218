"""Tiny seeded checkpoints of every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCAB = 512


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
    if family == "gpt2":
        settings: dict[str, Any] = {
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
        return GPT2LMHeadModel(GPT2Config(**settings | changes))
    settings = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**settings | changes))
    return Qwen2ForCausalLM(Qwen2Config(**settings | changes))
