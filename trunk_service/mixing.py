"""Which adapters can run beside others in one batch."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper


def can_mix(model: Any) -> bool:
    """Whether it adds two matrices to linear layers and nothing else: plain LoRA, or no adapter."""
    if not isinstance(model, PeftModel):
        return True
    config = model.peft_config["default"]
    if type(config) is not LoraConfig or config.bias != "none" or config.layer_replication:
        return False
    tuned = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    return all(map(_mixes, tuned))


def _mixes(module: Any) -> bool:
    if not isinstance(module, LoraLayer) or "default" not in module.lora_A:
        return False
    variant = module.lora_variant.get("default") is not None
    more = module.use_dora.get("default", False) or module.lora_bias.get("default", False)
    return not (variant or more or module.lora_embedding_A)
