"""Rows of several tenants through the shared blocks at once, each with its own LoRA.

One ``PeftModel`` of its own around the shared weights has a single LoRA adapter, whose ranks are
those of all tenants side by side: ``lora_A`` of each below the others', ``lora_B`` of each beside
the others'. What a row has in the ranks of others is set to zero between the two, so that PEFT's
own forward adds to every row its tenant's adapter and no other. PEFT's mixed batches
(``adapter_names``) do the same one adapter after the other, with five small operations each in
every layer: with eight they took three times as long as the blocks themselves.

The matrices are copies, reserved from their own session's budget. They are made anew when tenants
come or go, or have changed what is theirs. An adapter with a number in
``lora_B`` that is not finite is not let in: it would make a number of nobody's out of the others'
zeros.

Dimension letters: N rows, K inputs of a layer, O its outputs, R ranks of all tenants, D model
dimension.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from shared.models.onednn import can_use_onednn, use_onednn
from trunk_service.adapter_build import TreeLimits
from trunk_service.client_state import ClientState
from trunk_service.mixing import Matrices, PlainLora
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
class _Pooled:
    """One layer of the model of all."""

    layer: Any
    ranks: dict[ClientState, tuple[slice, float]] = field(default_factory=dict)
    """Whose ranks are where, and their scaling."""

    def fill(self, parts: Mapping[ClientState, Matrices]) -> None:
        """Puts tenants' matrices of the layer side by side."""
        self.ranks, end = {}, 0
        for client, part in parts.items():
            own = slice(end, end + len(part.a_RK))
            self.ranks[client], end = (own, part.scaling), own.stop
        self.layer.enable_adapters(bool(parts))
        for made, tensors, dim in (
            (self.layer.lora_A[_JOINT], [part.a_RK for part in parts.values()], 0),
            (self.layer.lora_B[_JOINT], [part.b_OR for part in parts.values()], 1),
        ):
            joined = torch.cat(tensors, dim) if tensors else made.weight.new_empty(0)
            made.weight = nn.Parameter(joined, requires_grad=False)

    def show(self, clients: Sequence[ClientState]) -> None:
        """Gives every row its tenant's ranks."""
        ranks: Any = self.layer.lora_A[_JOINT]
        scaling_NR = ranks.weight.new_zeros(len(clients), len(ranks.weight))
        others_NR = torch.ones_like(scaling_NR, dtype=torch.bool)
        for row, client in enumerate(clients):
            if client in self.ranks:
                own, scaling = self.ranks[client]
                scaling_NR[row, own], others_NR[row, own] = scaling, False
        ranks.scaling_N1R, ranks.others_N1R = scaling_NR[:, None], others_NR[:, None]


@dataclass
class _Copy:
    """An adapter that is side by side with others, as it was when it was copied."""

    lora: PlainLora
    nbytes: int
    last_used: int


class MixedAdapters:
    """The shared blocks with the adapters of many.

    Args:
        trunk: The shared blocks.
    """

    def __init__(self, trunk: Trunk) -> None:
        self.in_use = threading.Lock()
        """To be held from :meth:`admit` to the end of :meth:`run`: a session may be closed on
        another compute thread meanwhile."""
        self._trunk = trunk
        self._bare: Any = self._blocks().eval()
        self._model: Any = None
        self._layers: dict[str, _Pooled] = {}
        self._copies: dict[ClientState, _Copy] = {}
        self._refused: dict[ClientState, PlainLora] = {}
        self._watched: set[ClientState] = set()
        self._shown: list[ClientState] = []
        self._forwards = 0

    def __len__(self) -> int:
        return len(self._copies)

    def admit(self, clients: Iterable[ClientState]) -> set[ClientState]:
        """Makes adapters ready to run beside each other.

        Args:
            clients: Each of them ``mixes``, and is of a session whose turn it is.

        Returns:
            Those that can; the others have too many ranks, no room in their session's budget for a
            copy, or numbers that are not finite.
        """
        self._forwards += 1
        asked = {client: client.lora or {} for client in clients}
        ready = {client for client, lora in asked.items() if not lora}
        wanted = {c: lora for c, lora in asked.items() if lora and self._fits_in(c, lora)}
        members = self._within_ranks(wanted, [c for c in self._copies if c not in asked])
        if members != {client: copy.lora for client, copy in self._copies.items()}:
            self._fill(members)
        for client in wanted:
            if (copy := self._copies.get(client)) is not None:
                ready.add(client)
                copy.last_used = self._forwards
        return ready

    def run(self, clients: Sequence[ClientState], **inputs: Any) -> torch.Tensor:
        """Runs the blocks, without a graph.

        Args:
            clients: Whose each row is; all of them were admitted.
            **inputs: Of the family's forward, of one token a row.

        Returns:
            Hidden states [N, 1, D].
        """
        with torch.no_grad():
            if not any(client.lora for client in clients):
                output = self._bare(**inputs)
            else:
                self._show(list(clients))
                output = self._model(**inputs)
        hidden_N1D: torch.Tensor = output.last_hidden_state
        return hidden_N1D

    def _show(self, clients: list[ClientState]) -> None:
        if self._shown != clients:
            self._shown = []  # unless all layers show the same, they show nothing
            for pooled in self._layers.values():
                pooled.show(clients)
            self._shown = clients

    def _fits_in(self, client: ClientState, lora: PlainLora) -> bool:
        """Whether zeros of others stay zeros behind it; looked at when it has changed."""
        copy = self._copies.get(client)
        if copy is not None and copy.lora is lora:
            return True
        if self._refused.get(client) is lora:
            return False
        self._refused.pop(client, None)
        if self._model is None:
            self._make_model()
        dtype = next(iter(self._layers.values())).layer.lora_A[_JOINT].weight.dtype
        tensors = [t for part in lora.values() for t in (part.a_RK, part.b_OR)]
        finite = all(bool(part.b_OR.isfinite().all()) for part in lora.values())
        if not finite or any(tensor.dtype != dtype for tensor in tensors):
            self._refused[client] = lora
            self._watch(client)
            return False
        return True

    def _within_ranks(
        self, wanted: dict[ClientState, PlainLora], others: list[ClientState]
    ) -> dict[ClientState, PlainLora]:
        """Those wanted, and of the others that were used lately as many as there is place for."""
        others = sorted(others, key=lambda c: -self._copies[c].last_used)
        lately = [c for c in others if self._forwards - self._copies[c].last_used <= _IDLE_FORWARDS]
        taken: dict[ClientState, PlainLora] = {}
        ranks = 0
        for client in [*wanted, *lately]:
            lora = wanted.get(client) or self._copies[client].lora
            if client not in self._copies and not client.budget.fits(_nbytes(lora)):
                continue
            own = max(len(part.a_RK) for part in lora.values())
            if ranks + own <= _MOST_RANKS:
                ranks += own
                taken[client] = lora
        return taken

    def _fill(self, members: dict[ClientState, PlainLora]) -> None:
        """Puts the adapters of these side by side, in place of those there were."""
        used = {client: copy.last_used for client, copy in self._copies.items()}
        self._empty()
        try:
            for client, lora in members.items():
                count = _nbytes(lora)
                if client.budget.try_reserve(count):
                    self._copies[client] = _Copy(lora, count, used.get(client, 0))
                    self._watch(client)
            for path, pooled in self._layers.items():
                copies = {c: copy.lora.get(path) for c, copy in self._copies.items()}
                pooled.fill({c: part for c, part in copies.items() if part is not None})
        except BaseException:
            self._empty()
            raise

    def _empty(self) -> None:
        self._shown = []
        while self._copies:
            client, copy = self._copies.popitem()
            client.budget.release(copy.nbytes)
        for pooled in self._layers.values():
            pooled.fill({})

    def _watch(self, client: ClientState) -> None:
        if client not in self._watched:
            self._watched.add(client)
            client.on_close.append(partial(self._closed, client))

    def _closed(self, client: ClientState) -> None:
        with self.in_use:
            self._watched.discard(client)
            self._refused.pop(client, None)
            if client in self._copies:
                self._empty()  # the next forward puts the others together again

    def _make_model(self) -> None:
        blocks = self._blocks()
        linear = {n: m for n, m in blocks.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        config = LoraConfig(
            r=1,
            target_modules=list(linear),
            init_lora_weights=False,
            fan_in_fan_out=any(isinstance(m, Conv1D) for m in linear.values()),
        )
        self._model = get_peft_model(blocks, config).eval()
        for path, layer in blocks.named_modules():
            if isinstance(layer, LoraLayer):
                layer.lora_A[_JOINT].__class__ = _OwnRanks
                layer.scaling[_JOINT] = 1.0  # each tenant's own is in what its rows keep
                self._layers[path] = _Pooled(layer)

    def _blocks(self) -> Any:
        blocks = self._trunk.new_tree(TreeLimits()).model
        info, device = self._trunk.info, self._trunk.device
        if can_use_onednn(blocks, info.dtype, device):
            # MKL packs every weight anew for a few rows: 8 of them took 1.8 times as long. What is
            # computed together has other bits than what is computed alone anyway.
            use_onednn(blocks, info.dtype, device)
        return blocks


def _nbytes(lora: PlainLora) -> int:
    return sum(part.a_RK.nbytes + part.b_OR.nbytes for part in lora.values())
