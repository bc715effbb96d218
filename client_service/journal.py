"""What brings a fresh session to where a lost one was: requests to send again, in order.

Everything a trunk computes follows from the requests it got (dropout is keyed, sums have a fixed
order), so a trunk that is sent them again holds the same bits. What has no effect any more, such
as a forward whose graph was dropped, is left out; at a quiet moment a snapshot takes the place of
all the rest (see :meth:`Journal.start_from`), so that the journal stays small.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from shared.pb.trunkline.v1 import trunk_pb2 as pb

_CHANGES = frozenset(
    {"forward", "backward", "step", "restore", "add_adapter", "remove_adapter", "allocate"}
)


@dataclass(frozen=True)
class Entry:
    """A request and its tensors."""

    message: pb.SessionRequest
    tensors: Mapping[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(t.nbytes for t in self.tensors.values())


class Journal:
    """Requests of one session that were answered. Not thread-safe.

    Args:
        trainable: Whether the session's own adapter can be trained.
    """

    def __init__(self, trainable: bool) -> None:
        self._trainable = trainable
        self._numbers = itertools.count()
        self._entries: dict[int, Entry] = {}
        self._held: dict[str, int] = {}
        self._caches: dict[str, list[int]] = {}
        self._unstepped: set[str] = set()
        self.nbytes = self.steps = 0
        self.optimizers: dict[str, pb.Optimizer] = {}
        """Of the last step of each adapter."""
        self.added: dict[str, pb.SessionRequest] = {}
        """The requests that added the adapters there are now."""

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def quiet(self) -> bool:
        """Whether the trunk holds nothing that a snapshot would not have."""
        return not (self._held or self._caches or self._unstepped)

    def entries(self) -> list[Entry]:
        """What to send again, in order."""
        return list(self._entries.values())

    def record(self, message: pb.SessionRequest, tensors: Mapping[str, torch.Tensor]) -> None:
        """Notes a request that was answered; one that changes nothing is not kept."""
        kind = message.WhichOneof("body")
        if kind == "release":
            self._release(message.release)
        elif kind == "backward":
            self._backward(message, tensors)
        elif kind == "forward":
            self._forward(message, tensors)
        elif kind in _CHANGES or (kind == "importance" and message.importance.update):
            self._add(message, tensors)
        if kind == "step":
            self.steps += 1
            self.optimizers[message.step.adapter] = message.step.optimizer
            self._unstepped.discard(message.step.adapter)
            self._forget_held(message.step.adapter)
        elif kind == "restore":
            self._forget_held(message.restore.adapter)
            if message.restore.HasField("optimizer"):
                self.optimizers[message.restore.adapter] = message.restore.optimizer
        elif kind == "add_adapter":
            self.added[message.add_adapter.adapter] = message
        elif kind == "remove_adapter":
            self.added.pop(message.remove_adapter.adapter, None)
            self._unstepped.discard(message.remove_adapter.adapter)

    def start_from(self, base: Iterable[Entry]) -> None:
        """Replaces all entries by those that restore a snapshot taken at a quiet moment."""
        assert self.quiet
        self._entries.clear()
        self.nbytes = self.steps = 0
        for entry in base:
            self._keep(entry)

    def _forward(self, message: pb.SessionRequest, tensors: Mapping[str, torch.Tensor]) -> None:
        body = message.forward
        if body.keep_graph:
            if body.request_id not in self._held:  # a repeated one is there already
                self._held[body.request_id] = self._add(message, tensors)
        elif body.cache_id:
            self._caches.setdefault(body.cache_id, []).append(self._add(message, tensors))

    def _backward(self, message: pb.SessionRequest, tensors: Mapping[str, torch.Tensor]) -> None:
        number = self._held.pop(message.backward.request_id)
        forward = self._entries[number].message.forward
        named = forward.adapter in self.added
        if forward.without_adapter or not (named or (self._trainable and not forward.adapter)):
            self._drop(number)  # it left nothing behind
            return
        self._add(message, tensors)
        self._unstepped.add(forward.adapter)

    def _release(self, body: pb.Release) -> None:
        for request_id in body.request_ids:
            if (number := self._held.pop(request_id, None)) is not None:
                self._drop(number)
        for cache_id in body.cache_ids:
            for number in self._caches.pop(cache_id, []):
                self._drop(number)

    def _forget_held(self, adapter: str) -> None:
        """A step or a restore ends every forward that was computed with the weights before it."""
        for request_id, number in list(self._held.items()):
            if self._entries[number].message.forward.adapter == adapter:
                self._release(pb.Release(request_ids=[request_id]))

    def _add(self, message: pb.SessionRequest, tensors: Mapping[str, torch.Tensor]) -> int:
        # Copies: the caller may change its tensors once it has its answer.
        return self._keep(Entry(message, {n: t.detach().clone() for n, t in tensors.items()}))

    def _keep(self, entry: Entry) -> int:
        number = next(self._numbers)
        self._entries[number] = entry
        self.nbytes += entry.nbytes
        return number

    def _drop(self, number: int) -> None:
        self.nbytes -= self._entries.pop(number).nbytes
