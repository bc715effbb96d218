"""What PEFT makes of an adapter is what its method says."""

from __future__ import annotations

import pytest
import torch
from peft import AdaLoraConfig

from shared.adapters.wrap import wrap
from tests.models import tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adalora_trains_its_three_matrices_alone(dtype: torch.dtype) -> None:
    """In bfloat16 (or on a device) PEFT makes the constant ``ranknum`` a parameter that trains."""
    config = AdaLoraConfig(task_type="CAUSAL_LM", total_step=10, target_modules=["c_attn"])
    wrapped = wrap(tiny_model("gpt2").to(dtype), config, 0, "whole")
    trained = {n.split(".")[-2] for n, p in wrapped.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "lora_E"}
