"""The model that is measured: GPT-2 small's shape, and its adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

SPLIT = "2:10"
LAYERS_ON_TRUNK = 8
WIDTH = 768
VOCABULARY = 50257


def gpt2_small(folder: Path) -> Path:
    """Writes GPT-2 small's shape (124M parameters) with seeded random weights, no dropout."""
    torch.manual_seed(0)
    config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def lora() -> LoraConfig:
    """LoRA of rank 8 on all linear layers of the blocks."""
    return LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["c_attn", "c_fc", "c_proj"]
    )


def adapted(model: Any) -> Any:
    """A model with that adapter, drawn under seed 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(model, lora())
