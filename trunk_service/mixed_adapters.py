"""Rows of several tenants through the shared blocks at once, each with its own LoRA.

One ``PeftModel`` of its own around the shared weights has a single LoRA adapter, whose ranks are
those of all tenants side by side: ``lora_A`` of each below the others', ``lora_B`` of each beside
the others'. What a row has in the ranks of others is set to zero between the two, so that PEFT's
own forward adds to every row its tenant's adapter and no other. PEFT's mixed batches
(``adapter_names``) do the same one adapter after the other, with five small operations each in
every layer: with eight they took three times as long as the blocks themselves.

The matrices are copies, reserved from their own session's budget. They are made anew when tenants
come or go, and a tenant's are copied again when its own have changed. An adapter with a number in
``lora_B`` that is not finite is not let in: it would make a number of nobody's out of the others'
zeros.

Dimension letters: N rows, K inputs of a layer, O its outputs, R ranks of all tenants, D model
dimension.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from shared.adapters.numbers import largest_rank
from shared.adapters.wrap import wrap
from shared.models.onednn import can_use_onednn, use_onednn
from trunk_service.adapter import TenantAdapter
from trunk_service.limits import Limits
from trunk_service.requests import AdapterRequest
from trunk_service.trunk import Trunk

_MOST_RANKS = 512
"""Side by side; each costs every row a little, whoever's it is."""

_IDLE_FORWARDS = 64
"""An adapter that had no row in so many forwards makes place."""

_JOINT = "default"


class _OwnRanks(nn.Linear):
    """``lora_A`` of all tenants, of which a row keeps what is in its own tenant's ranks."""

    scaling_N1R: torch.Tensor
    others_N1R: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Maps [N, 1, K] to [N, 1, R]."""
        # Filled and not multiplied by zero: another's infinity would be no number then.
        return (super().forward(input) * self.scaling_N1R).masked_fill_(self.others_N1R, 0.0)


@dataclass
class _Part:
    """A tenant's matrices of one layer, and the ranks where their copies are."""

    a_RK: torch.Tensor
    b_OR: torch.Tensor
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
            b_OR = source.lora_B["default"].weight.detach()
            ranks = slice(end, end + len(a_RK))
            self.parts[adapter] = _Part(a_RK, b_OR, ranks, source.scaling["default"])
            end = ranks.stop
        self.layer.enable_adapters(bool(sources))
        parts = self.parts.values()
        for made, tensors, dim in (
            (self.layer.lora_A[_JOINT], [part.a_RK for part in parts], 0),
            (self.layer.lora_B[_JOINT], [part.b_OR for part in parts], 1),
        ):
            joined = torch.cat(tensors, dim) if tensors else made.weight.new_empty(0)
            made.weight = nn.Parameter(joined, requires_grad=False)

    def copy_again(self, adapter: TenantAdapter) -> None:
        """Takes over what a tenant has trained."""
        if (part := self.parts.get(adapter)) is not None:
            self.layer.lora_A[_JOINT].weight[part.ranks] = part.a_RK
            self.layer.lora_B[_JOINT].weight[:, part.ranks] = part.b_OR

    def show(self, adapters: Sequence[TenantAdapter]) -> None:
        """Gives every row its tenant's ranks."""
        ranks: Any = self.layer.lora_A[_JOINT]
        scaling_NR = ranks.weight.new_zeros(len(adapters), len(ranks.weight))
        others_NR = torch.ones_like(scaling_NR, dtype=torch.bool)
        for row, adapter in enumerate(adapters):
            if (part := self.parts.get(adapter)) is not None:
                scaling_NR[row, part.ranks] = part.scaling
                others_NR[row, part.ranks] = False
        ranks.scaling_N1R, ranks.others_N1R = scaling_NR[:, None], others_NR[:, None]


@dataclass
class _Copy:
    """What is known of an adapter that is side by side with others."""

    version: int
    nbytes: int
    last_used: int


class MixedAdapters:
    """The shared blocks with the adapters of many.

    Args:
        trunk: The shared blocks.
    """

    def __init__(self, trunk: Trunk) -> None:
        self.in_use = threading.Lock()
        """To be held from :meth:`admit` to the end of :meth:`run`: an adapter may be closed on
        another compute thread meanwhile."""
        self._trunk = trunk
        self._bare: Any = self._blocks().eval()
        self._model: Any = None
        self._layers: dict[str, _Pooled] = {}
        self._copies: dict[TenantAdapter, _Copy] = {}
        self._refused: dict[TenantAdapter, int] = {}
        self._shown: list[TenantAdapter] = []
        self._forwards = 0

    def __len__(self) -> int:
        return len(self._copies)

    def admit(self, adapters: Iterable[TenantAdapter]) -> set[TenantAdapter]:
        """Makes adapters ready to run beside each other.

        Args:
            adapters: Each of them ``mixes``.

        Returns:
            Those that can; the others have too many ranks, no room in their session's budget for a
            copy, or numbers that are not finite.
        """
        self._forwards += 1
        asked = dict.fromkeys(adapters)
        ready = {a for a in asked if a.config is None}
        wanted = [a for a in asked if a not in ready and self._is_finite(a)]
        members = self._within_ranks(wanted)
        if set(members) != self._copies.keys():
            self._fill(members)
        for adapter in wanted:
            if (copy := self._copies.get(adapter)) is not None:
                ready.add(adapter)
                copy.last_used = self._forwards
                if copy.version != (version := adapter.version):
                    for pooled in self._layers.values():
                        pooled.copy_again(adapter)
                    copy.version = version
        return ready

    def run(self, adapters: Sequence[TenantAdapter], **inputs: Any) -> torch.Tensor:
        """Runs the blocks, without a graph.

        Args:
            adapters: One for each row; all of them were admitted.
            **inputs: Of the family's forward, of one token a row.

        Returns:
            Hidden states [N, 1, D].
        """
        with torch.no_grad():
            if all(adapter.config is None for adapter in adapters):
                output = self._bare(**inputs)
            else:
                self._show(list(adapters))
                output = self._model(**inputs)
        hidden_N1D: torch.Tensor = output.last_hidden_state
        return hidden_N1D

    def _show(self, adapters: list[TenantAdapter]) -> None:
        if self._shown != adapters:
            self._shown = []  # unless all layers show the same, they show nothing
            for pooled in self._layers.values():
                pooled.show(adapters)
            self._shown = adapters

    def _is_finite(self, adapter: TenantAdapter) -> bool:
        """Whether zeros of others stay zeros behind it; looked at when it has changed."""
        version = adapter.version
        copy = self._copies.get(adapter)
        if copy is not None and copy.version == version:
            return True
        if self._refused.get(adapter) == version:
            return False
        layers = _lora_layers(adapter.model).values()
        finite = all(bool(la.lora_B["default"].weight.isfinite().all()) for la in layers)
        self._refused.pop(adapter, None)
        if not finite:
            self._refused[adapter] = version
            self._watch(adapter)
        return finite

    def _within_ranks(self, wanted: list[TenantAdapter]) -> list[TenantAdapter]:
        """Those wanted, and those that were used lately as far as there is place."""
        others = sorted(
            (a for a in self._copies if a not in wanted and a not in self._refused),
            key=lambda a: -self._copies[a].last_used,
        )
        lately = [a for a in others if self._forwards - self._copies[a].last_used <= _IDLE_FORWARDS]
        taken, ranks = [], 0
        for adapter in [*wanted, *lately]:
            if adapter not in self._copies and not adapter.budget.fits(_nbytes(adapter)):
                continue
            if ranks + (own := largest_rank(adapter.config)) <= _MOST_RANKS:
                ranks += own
                taken.append(adapter)
        return taken

    def _fill(self, members: list[TenantAdapter]) -> None:
        """Puts the adapters of these side by side, in place of those there were."""
        used = {a: copy.last_used for a, copy in self._copies.items()}
        self._empty()
        if self._model is None:
            self._make_model()
        try:
            for member in members:
                count = _nbytes(member)
                if member.budget.try_reserve(count):
                    # The version first: what is written while it is copied is copied again.
                    self._copies[member] = _Copy(member.version, count, used.get(member, 0))
                    self._watch(member)
            layers = {member: _lora_layers(member.model) for member in self._copies}
            for path, pooled in self._layers.items():
                pooled.fill({m: found[path] for m, found in layers.items() if path in found})
        except BaseException:
            self._empty()
            raise

    def _empty(self) -> None:
        self._shown = []
        while self._copies:
            adapter, copy = self._copies.popitem()
            adapter.budget.release(copy.nbytes)
        for pooled in self._layers.values():
            pooled.fill({})

    def _watch(self, adapter: TenantAdapter) -> None:
        if self._closed not in adapter.on_close:
            adapter.on_close.append(self._closed)

    def _closed(self, adapter: TenantAdapter) -> None:
        with self.in_use:
            self._refused.pop(adapter, None)
            if adapter in self._copies:
                self._empty()  # the next forward puts the others together again

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
        blocks = self._trunk.new_model(AdapterRequest(), Limits(), dropout=None)
        info, device = self._trunk.info, self._trunk.device
        if can_use_onednn(blocks, info.dtype, device):
            # MKL packs every weight anew for a few rows: 8 of them took 1.8 times as long. What is
            # computed together has other bits than what is computed alone anyway.
            use_onednn(blocks, info.dtype, device)
        return blocks


def _lora_layers(model: Any) -> dict[str, Any]:
    named = model.named_modules()
    return {n: m for n, m in named if isinstance(m, LoraLayer) and "default" in m.lora_A}


def _nbytes(adapter: TenantAdapter) -> int:
    return sum(parameter.nbytes for parameter in adapter.parameters)
