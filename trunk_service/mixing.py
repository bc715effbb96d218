"""Which adapters PEFT can run beside others in one batch."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper


def can_mix(model: Any) -> bool:
    """Whether PEFT's mixed batches do what this model does: plain LoRA, or no adapter."""
    if not isinstance(model, PeftModel):
        return True
    config = model.peft_config["default"]
    if type(config) is not LoraConfig or config.bias != "none" or config.layer_replication:
        return False
    tuned = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    return all(map(_mixes, tuned))


def _mixes(module: Any) -> bool:
    if not isinstance(module, LoraLayer) or not hasattr(module, "_mixed_batch_forward"):
        return False
    variant = module.lora_variant.get("default") is not None
    return not (variant or module.use_dora.get("default", False) or module.lora_embedding_A)
