"""The unsplit model that a split one is compared with: same weights, same adapter, one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModelForCausalLM
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from shared.adapters.weights import adapter_weights, load_adapter_weights
from shared.adapters.wrap import wrap
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
        split: The split model, with an adapter or with ends that are trained themselves.
        quantize: As the split model's two sides are.
    """
    whole = load_whole(model, quantize)
    whole.loss_type = "ForCausalLM"
    set_dropout(whole, 0.0)
    if not hasattr(split, "peft_config"):
        return _with_frozen_trunk(whole, split)
    joined = split.joined_adapter()
    twin = wrap(whole, joined.config, 0, "whole", PeftModelForCausalLM)
    if _has_encoder(joined.config):
        # Of an encoder of virtual tokens PEFT would save only what it gives.
        twin.prompt_encoder.load_state_dict(split.prompt_encoder.state_dict())
    else:
        load_adapter_weights(twin, joined.weights)
    return twin


def trained_weights(model: Any) -> dict[str, torch.Tensor]:
    """What training changes: the adapter of a whole or split model, or its own weights."""
    if hasattr(model, "joined_adapter"):
        return dict(model.joined_adapter().weights)
    if hasattr(model, "peft_config"):
        return adapter_weights(model)
    named = model.named_parameters()
    return {n: p.detach().clone() for n, p in named if p.requires_grad and _is_own(n)}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Every gradient of a whole or split model, by parameter name."""
    found = {
        name.replace(".default", ""): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and _is_own(name)
    }
    remote = getattr(model, "remote_trunk", None)
    if remote is None:
        return found
    for name, theirs in remote.session.gradients().items():
        # A prefix is one tensor over all blocks; it is the only name that both sides have.
        found[name] = model.join_columns(found[name], theirs) if name in found else theirs
    return found


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Largest difference of any element of any tensor; infinite where a shape differs."""
    # A name on one side only would make the comparison say less than it claims.
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())[:3]
    if any(ours[n].shape != theirs[n].shape for n in ours):
        return float("inf")
    return max(
        (float((ours[n] - theirs[n]).abs().max()) for n in ours if ours[n].numel()), default=0.0
    )


def _with_frozen_trunk(whole: Any, split: Any) -> Any:
    own = {n for n, p in split.named_parameters() if p.requires_grad}
    with torch.no_grad():
        values = dict(split.named_parameters())
        for name, parameter in whole.named_parameters():
            parameter.requires_grad_(name in own)
            if name in own:
                parameter.copy_(values[name])
    return whole


def _has_encoder(config: PeftConfig) -> bool:
    return bool(config.is_prompt_learning and config.peft_type.value == "P_TUNING")


def _is_own(name: str) -> bool:
    return not name.endswith(".proxy")
