"""Rows of several tenants through the shared blocks at once, each with its own LoRA.

This is PEFT's mixed-batch inference (``adapter_names``, one name a row): one ``PeftModel`` of its
own around the shared weights knows every tenant's adapter, by parameters that share their memory
with the tenant's, so that a training step is seen at once. They are parameters of their own all the
same: PEFT switches ``requires_grad`` of a model's adapters when one is added or removed, and the
tenant's must not be touched by that.

Dimension letters: N rows, D model dimension.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from shared.adapters.wrap import fitted, wrap
from shared.models.families import family_of
from trunk_service.adapter import TenantAdapter
from trunk_service.limits import Limits
from trunk_service.requests import AdapterRequest
from trunk_service.trunk import Trunk

_BASE = "__base__"  # PEFT's name of no adapter


class MixedAdapters:
    """The shared blocks with the adapters of many. Not thread-safe.

    Args:
        trunk: The shared blocks.
    """

    def __init__(self, trunk: Trunk) -> None:
        self._trunk = trunk
        self._names: dict[TenantAdapter, str] = {}
        self._numbers = itertools.count()
        self._gone: list[str] = []
        self._bare: Any = self._blocks().eval()
        self._model: Any = None

    def __len__(self) -> int:
        return len(self._names)

    def run(self, adapters: Sequence[TenantAdapter], **inputs: Any) -> torch.Tensor:
        """Runs the blocks.

        Args:
            adapters: One for each row; each of them ``mixes``.
            **inputs: Of the family's forward.

        Returns:
            Hidden states [N, 1, D].
        """
        names = [self._name_of(adapter) for adapter in adapters]
        self._forget_gone()
        if all(name == _BASE for name in names):
            output = self._bare(**inputs)
        else:
            output = self._model(**inputs, adapter_names=names)
        hidden_N1D: torch.Tensor = output.last_hidden_state
        return hidden_N1D

    def _name_of(self, adapter: TenantAdapter) -> str:
        if adapter.config is None:
            return _BASE
        if adapter not in self._names:
            name = f"tenant{next(self._numbers)}"
            self._add(name, adapter)
            self._names[adapter] = name
            adapter.on_close.append(self._closed)
        return self._names[adapter]

    def _add(self, name: str, adapter: TenantAdapter) -> None:
        if self._model is None:
            # Never used: PEFT wants an active adapter, and would make another one active.
            layers = family_of(self._trunk.info.model_type).linear_layers
            anchor = LoraConfig(task_type="CAUSAL_LM", r=1, target_modules=list(layers))
            self._model = wrap(self._blocks(), anchor, 0, "trunk")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"The following \w+_pattern keys", RuntimeWarning)
            config = fitted(copy.deepcopy(adapter.config), self._model, "trunk")
            self._model.add_adapter(name, config, low_cpu_mem_usage=True)
        for path, layer in _lora_layers(adapter.model):
            mixed = self._model.get_submodule(path)
            mixed.lora_A[name] = _same_memory(layer.lora_A["default"])
            mixed.lora_B[name] = _same_memory(layer.lora_B["default"])
            mixed.scaling[name] = layer.scaling["default"]
        self._model.eval()

    def _blocks(self) -> Any:
        return self._trunk.new_model(AdapterRequest(), Limits(), dropout=None)

    def _closed(self, adapter: TenantAdapter) -> None:
        # Perhaps on another compute thread than that of a forward: only noted.
        self._gone.append(self._names.pop(adapter))

    def _forget_gone(self) -> None:
        while self._gone:
            self._model.delete_adapter(self._gone.pop())


def _lora_layers(model: Any) -> list[tuple[str, Any]]:
    named = model.named_modules()
    return [(n, m) for n, m in named if isinstance(m, LoraLayer) and "default" in m.lora_A]


def _same_memory(linear: nn.Module) -> nn.Module:
    """The same layer with parameters of its own in the same memory."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in linear.parameters()
    }
    alias: nn.Module = copy.deepcopy(linear, memo)
    return alias
