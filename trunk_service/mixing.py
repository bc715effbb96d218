"""Which adapters can run beside others in one batch, and what they add to the blocks' layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from trunk_service.tenant_tree import TreeState


@dataclass(frozen=True, eq=False)
class Matrices:
    """Plain LoRA of one layer: R ranks, K inputs, O outputs."""

    a_RK: torch.Tensor
    b_OR: torch.Tensor
    scaling: float


PlainLora = dict[str, Matrices]
"""By the layer's full name; empty without an adapter. Never written to."""


def plain_lora(state: TreeState) -> PlainLora | None:
    """What one adapter adds to linear layers; None if the adapters do anything else."""
    if any(name in state.built.base for leaf in state.leaves.values() for name in leaf.value.names):
        return None  # norms or biases of the client's own
    found: PlainLora = {}
    for path, module in state.built.stated.items():
        if isinstance(module, AuxiliaryTrainingWrapper):
            return None
        if not isinstance(module, BaseTunerLayer):
            continue  # dropout, which draws nothing while decoding
        if not isinstance(module, LoraLayer) or module.lora_embedding_A:
            return None
        active = [] if module.disable_adapters else module.active_adapters
        active = [name for name in active if name in module.lora_A]
        if len(active) > 1 or any(_does_more(module, name) for name in active):
            return None
        for name in active:
            a_RK, b_OR = module.lora_A[name].weight, module.lora_B[name].weight
            found[path] = Matrices(a_RK.detach(), b_OR.detach(), module.scaling[name])
    return found


def _does_more(module: Any, adapter: str) -> bool:
    variant = module.lora_variant.get(adapter) is not None
    return bool(
        variant or module.use_dora.get(adapter, False) or module.lora_bias.get(adapter, False)
    )
