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
from shared.wire.formats import Packed


@dataclass(frozen=True)
class Entry:
    """A request and its tensors."""

    message: pb.SessionRequest
    tensors: Mapping[str, Packed]

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
        self._unstepped: dict[str, list[int]] = {}
        self._committed: dict[str, int] = {}
        self.version = 0
        """Grows with every request that is noted."""
        self.nbytes = self.base_nbytes = 0
        """Of all tensors, and of those of the snapshot that it begins with."""
        self.steps = 0
        """Since that snapshot."""
        self.optimizers: dict[str, pb.Optimizer] = {}
        """Of the last step of each adapter."""
        self.added: dict[str, pb.SessionRequest] = {}
        """The requests that added the adapters there are now."""

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def quiet(self) -> bool:
        """Whether no forward waits for its backward, and no gradient for its step."""
        return not (self._held or self._unstepped)

    def entries(self) -> list[Entry]:
        """What to send again, in order."""
        return list(self._entries.values())

    def record(self, message: pb.SessionRequest, tensors: Mapping[str, Packed]) -> None:
        """Notes a request that was answered; one that changes nothing is not kept."""
        kind = message.WhichOneof("body")
        if message.forward.state_version or self._of_client(message):
            return  # the client runs it again itself
        noted = {
            "forward": self._forward,
            "backward": self._backward,
            "step": self._step,
            "restore": self._restore,
            "remove_adapter": self._remove_adapter,
        }
        if kind == "release":
            self._release(message.release)
        elif kind in noted:
            noted[kind](message, tensors)
        elif kind in ("add_adapter", "allocate") or (
            kind == "importance" and message.importance.update
        ):
            self._add(message, tensors)
            if kind == "add_adapter":
                self.added[message.add_adapter.adapter] = message
        else:
            return
        self.version += 1

    def start_from(self, base: Iterable[Entry]) -> None:
        """Replaces all entries by those that restore a snapshot taken at a quiet moment.

        What fills caches stays: it is computed anew with the weights of the snapshot, so a cache
        that is kept over training steps is the one thing that may come back with other bits.
        """
        assert self.quiet
        caches = {n: [self._entries[i] for i in numbers] for n, numbers in self._caches.items()}
        self._entries.clear()
        self._caches.clear()
        self.nbytes = self.steps = 0
        for entry in base:
            self._keep(entry)
        self.base_nbytes = self.nbytes
        for name, entries in caches.items():
            self._caches[name] = [self._keep(entry) for entry in entries]

    def _of_client(self, message: pb.SessionRequest) -> bool:
        """Whether it is a backward of a forward with the client's own adapters."""
        is_backward = message.WhichOneof("body") == "backward"
        return is_backward and message.backward.request_id not in self._held

    def _forward(self, message: pb.SessionRequest, tensors: Mapping[str, Packed]) -> None:
        body = message.forward
        if body.keep_graph:
            if body.request_id not in self._held:  # a repeated one is there already
                self._held[body.request_id] = self._add(message, tensors)
        elif body.cache_id:
            if body.cache_ops and body.cache_ops[0].HasField("reset"):
                self._release(pb.Release(cache_ids=[body.cache_id]))
            self._caches.setdefault(body.cache_id, []).append(self._add(message, tensors))

    def _backward(self, message: pb.SessionRequest, tensors: Mapping[str, Packed]) -> None:
        number = self._held.pop(message.backward.request_id)
        forward = self._entries[number].message.forward
        named = forward.adapter in self.added
        if forward.without_adapter or not (named or (self._trainable and not forward.adapter)):
            self._drop(number)  # it left nothing behind
            return
        if message.backward.reset_gradients:
            for before in self._unstepped.pop(forward.adapter, []):
                self._drop(before)
        entries = self._unstepped.setdefault(forward.adapter, [])
        entries += [number, self._add(message, tensors)]

    def _step(self, message: pb.SessionRequest, tensors: Mapping[str, Packed]) -> None:
        body = message.step
        if body.step <= self._committed.get(body.adapter, 0):
            return  # was answered again, not done again
        self._committed[body.adapter] = body.step
        self._add(message, tensors)
        self.steps += 1
        self.optimizers[body.adapter] = body.optimizer
        self._unstepped.pop(body.adapter, None)
        self._forget_held(body.adapter)

    def _restore(self, message: pb.SessionRequest, tensors: Mapping[str, Packed]) -> None:
        body = message.restore
        self._add(message, tensors)
        if tensors:
            self._forget_held(body.adapter)
        if body.HasField("optimizer"):
            self.optimizers[body.adapter] = body.optimizer
        if body.HasField("committed_step"):
            self._committed[body.adapter] = body.committed_step

    def _remove_adapter(self, message: pb.SessionRequest, tensors: Mapping[str, Packed]) -> None:
        name = message.remove_adapter.adapter
        self._forget_held(name)
        self._unstepped.pop(name, None)
        for known in (self.added, self.optimizers, self._committed):
            known.pop(name, None)  # type: ignore[attr-defined]
        cached = {i for numbers in self._caches.values() for i in numbers}
        if any(_adapter_of(self._entries[i].message) == name for i in cached):
            self._add(message, tensors)  # what fills a cache still needs it
            return
        if not name:
            self._add(message, tensors)  # it comes with the session, and is removed again
            return
        gone: set[str] = set()
        for number, entry in list(self._entries.items()):
            body = entry.message
            of_it = body.WhichOneof("body") == "backward" and body.backward.request_id in gone
            if of_it or _adapter_of(body) == name:
                gone.add(body.forward.request_id)
                self._drop(number)

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

    def _add(self, message: pb.SessionRequest, tensors: Mapping[str, Packed]) -> int:
        # Copies: the caller may change its tensors once it has its answer. Blocks are ours alone.
        copies = {
            n: t.detach().to("cpu", copy=True) if isinstance(t, torch.Tensor) else t
            for n, t in tensors.items()
        }
        return self._keep(Entry(message, copies))

    def _keep(self, entry: Entry) -> int:
        number = next(self._numbers)
        self._entries[number] = entry
        self.nbytes += entry.nbytes
        return number

    def _drop(self, number: int) -> None:
        self.nbytes -= self._entries.pop(number).nbytes


def _adapter_of(message: pb.SessionRequest) -> str | None:
    """The adapter that a request means; a backward's is its forward's."""
    body = getattr(message, message.WhichOneof("body") or "open")
    return getattr(body, "adapter", None)
