"""Rows of several tenants through the shared blocks at once, each with its own LoRA.

One ``PeftModel`` of its own around the shared weights has a single LoRA adapter, whose ranks are
those of all tenants side by side: ``lora_A`` of each below the others', ``lora_B`` of each beside
the others'. What a row has in the ranks of others is multiplied by zero between the two, so that
PEFT's own forward adds to every row its tenant's adapter and no other. PEFT's mixed batches
(``adapter_names``) do the same one adapter after the other, with five small operations each in
every layer: with eight they took three times as long as the blocks themselves.

The matrices are copies. They are made anew when tenants come or go, and a tenant's are copied again
when its own have changed since.

Dimension letters: N rows, K inputs of a layer, R ranks of all tenants, D model dimension.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from shared.adapters.wrap import wrap
from trunk_service.adapter import TenantAdapter
from trunk_service.budget import ByteBudget
from trunk_service.limits import Limits
from trunk_service.requests import AdapterRequest
from trunk_service.trunk import Trunk

_MOST = 32
"""Adapters side by side; every one costs each row a little, whoever's it is."""

_JOINT = "default"


class _OwnRanks(nn.Linear):
    """``lora_A`` of all tenants, of which a row keeps what is in its own tenant's ranks."""

    own_N1R: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Maps [N, 1, K] to [N, 1, R]."""
        return super().forward(input) * self.own_N1R


@dataclass
class _Part:
    """A tenant's matrices of one layer, and the ranks where their copies are."""

    a_RK: torch.Tensor
    b_NR: torch.Tensor
    ranks: slice
    scaling: float


@dataclass
class _Pooled:
    """One layer of the model of all."""

    layer: Any
    parts: dict[TenantAdapter, _Part] = field(default_factory=dict)

    def fill(self, sources: dict[TenantAdapter, Any]) -> None:
        """Puts the matrices of these tenants' layers side by side."""
        self.parts, end = {}, 0
        for adapter, source in sources.items():
            a_RK = source.lora_A["default"].weight.detach()
            b_NR = source.lora_B["default"].weight.detach()
            ranks = slice(end, end + len(a_RK))
            self.parts[adapter] = _Part(a_RK, b_NR, ranks, source.scaling["default"])
            end = ranks.stop
        self.layer.enable_adapters(bool(sources))
        parts = self.parts.values()
        for made, tensors, dim in (
            (self.layer.lora_A[_JOINT], [part.a_RK for part in parts], 0),
            (self.layer.lora_B[_JOINT], [part.b_NR for part in parts], 1),
        ):
            joined = torch.cat(tensors, dim) if tensors else made.weight.new_empty(0)
            made.weight = nn.Parameter(joined, requires_grad=False)

    def copy_again(self, adapter: TenantAdapter) -> None:
        """Takes over what a tenant has trained."""
        if (part := self.parts.get(adapter)) is not None:
            self.layer.lora_A[_JOINT].weight[part.ranks] = part.a_RK
            self.layer.lora_B[_JOINT].weight[:, part.ranks] = part.b_NR

    def show(self, adapters: Sequence[TenantAdapter]) -> None:
        """Gives every row its tenant's ranks."""
        ranks: Any = self.layer.lora_A[_JOINT]
        own_NR = ranks.weight.new_zeros(len(adapters), len(ranks.weight))
        for row, adapter in enumerate(adapters):
            if (part := self.parts.get(adapter)) is not None:
                own_NR[row, part.ranks] = part.scaling
        ranks.own_N1R = own_NR[:, None]


class MixedAdapters:
    """The shared blocks with the adapters of many.

    Args:
        trunk: The shared blocks.
        budget: What copies of adapters are reserved from.
    """

    def __init__(self, trunk: Trunk, budget: ByteBudget) -> None:
        self._trunk, self._budget = trunk, budget
        self._bare: Any = self._blocks().eval()
        self._model: Any = None
        self._layers: dict[str, _Pooled] = {}
        self._versions: dict[TenantAdapter, int] = {}
        self._shown: list[TenantAdapter] = []
        self._reserved = 0
        # An adapter is closed on its session's own compute thread, perhaps while others run here.
        self._using = threading.Lock()

    def __len__(self) -> int:
        return len(self._versions)

    def run(self, adapters: Sequence[TenantAdapter], **inputs: Any) -> torch.Tensor:
        """Runs the blocks, without a graph.

        Args:
            adapters: One for each row; each of them ``mixes``.
            **inputs: Of the family's forward, of one token a row.

        Returns:
            Hidden states [N, 1, D].

        Raises:
            ResourceExhaustedError: If the budget has no room for copies of the adapters.
        """
        with self._using, torch.no_grad():
            if all(adapter.config is None for adapter in adapters):
                output = self._bare(**inputs)
            else:
                self._prepare(adapters)
                output = self._model(**inputs)
        hidden_N1D: torch.Tensor = output.last_hidden_state
        return hidden_N1D

    def _prepare(self, adapters: Sequence[TenantAdapter]) -> None:
        wanted = {adapter: None for adapter in adapters if adapter.config is not None}
        if not wanted.keys() <= self._versions.keys():
            before = [a for a in self._versions if a not in wanted]
            kept = before if len(before) + len(wanted) <= _MOST else []
            self._fill([*kept, *wanted])
        for adapter in wanted:
            if self._versions[adapter] != (version := _version(adapter)):
                for pooled in self._layers.values():
                    pooled.copy_again(adapter)
                self._versions[adapter] = version
        if self._shown != list(adapters):
            for pooled in self._layers.values():
                pooled.show(adapters)
            self._shown = list(adapters)

    def _fill(self, members: list[TenantAdapter]) -> None:
        """Puts the adapters of these side by side, in place of those there were."""
        self._empty()
        self._budget.reserve(nbytes := sum(_nbytes(member) for member in members))
        self._reserved = nbytes
        if self._model is None:
            self._make_model()
        layers = {member: _lora_layers(member.model) for member in members}
        for path, pooled in self._layers.items():
            pooled.fill({m: found[path] for m, found in layers.items() if path in found})
        self._versions = {member: _version(member) for member in members}
        for member in members:
            if self._closed not in member.on_close:
                member.on_close.append(self._closed)

    def _empty(self) -> None:
        self._budget.release(self._reserved)
        self._reserved, self._shown, self._versions = 0, [], {}
        for pooled in self._layers.values():
            pooled.fill({})

    def _make_model(self) -> None:
        blocks = self._blocks()
        names = [n for n, m in blocks.named_modules() if isinstance(m, nn.Linear | Conv1D)]
        config = LoraConfig(task_type="CAUSAL_LM", r=1, target_modules=names)
        self._model = wrap(blocks, config, 0, "trunk").eval()
        for path, layer in _lora_layers(self._model).items():
            layer.lora_A[_JOINT].__class__ = _OwnRanks
            layer.scaling[_JOINT] = 1.0  # each tenant's own is in what its rows keep
            self._layers[path] = _Pooled(layer)

    def _blocks(self) -> Any:
        return self._trunk.new_model(AdapterRequest(), Limits(), dropout=None)

    def _closed(self, adapter: TenantAdapter) -> None:
        with self._using:
            if adapter in self._versions:
                self._fill([member for member in self._versions if member is not adapter])


def _lora_layers(model: Any) -> dict[str, Any]:
    named = model.named_modules()
    return {n: m for n, m in named if isinstance(m, LoraLayer) and "default" in m.lora_A}


def _version(adapter: TenantAdapter) -> int:
    """Grows whenever one of its weights is written."""
    return sum(parameter._version for parameter in adapter.parameters)


def _nbytes(adapter: TenantAdapter) -> int:
    return sum(parameter.nbytes for parameter in adapter.parameters)
