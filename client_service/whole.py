"""The unsplit model that a split one is compared with: same weights, same adapter, one process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from shared.models.dropout import set_dropout
from shared.models.quantization import check_kind, prepare_loaded


def load_whole(model: str | Path, quantize: str = "", dtype: torch.dtype = torch.float32) -> Any:
    """Loads a whole model as transformers does, quantised by transformers if asked.

    Raises:
        QuantizationError: If the quantisation is unknown or not installed.
    """
    if not quantize:
        return AutoModelForCausalLM.from_pretrained(str(model), dtype=dtype)
    check_kind(quantize)
    if quantize == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    loaded = AutoModelForCausalLM.from_pretrained(
        str(model), quantization_config=config, dtype=dtype, device_map="cpu"
    )
    return prepare_loaded(loaded)


def whole_twin(model: str | Path, split: Any, quantize: str = "") -> Any:
    """The unsplit model with the very weights that a split one has now; dropout is off.

    Args:
        model: Folder or hub id of the whole model.
        split: The split model, with adapters or with ends that are trained themselves.
        quantize: As the split model's two sides are.
    """
    twin = load_whole(model, quantize)
    set_dropout(twin, 0.0)
    for name, config in getattr(split, "peft_config", {}).items():
        config = copy.deepcopy(config)
        if hasattr(twin, "peft_config"):
            twin.add_adapter(name, config)
        else:
            twin = get_peft_model(twin, config, name)
    ours = dict(split.named_parameters())
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            value = ours[name]
            parameter.requires_grad_(value.requires_grad)
            if value.requires_grad:
                parameter.copy_(value)
        buffers = dict(split.named_buffers())
        for name, buffer in twin.named_buffers():
            if name in buffers and buffers[name].shape == buffer.shape:
                buffer.copy_(buffers[name])
    return twin


def trained_weights(model: Any) -> dict[str, torch.Tensor]:
    """What training changes, by parameter name."""
    named = model.named_parameters()
    return {n: p.detach().clone() for n, p in named if p.requires_grad}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Every gradient there is, by parameter name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Largest difference of any element of any tensor; infinite where a shape differs."""
    # A name on one side only would make the comparison say less than it claims.
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())[:3]
    if any(ours[n].shape != theirs[n].shape for n in ours):
        return float("inf")
    return max(
        (float((ours[n] - theirs[n]).abs().max()) for n in ours if ours[n].numel()), default=0.0
    )
