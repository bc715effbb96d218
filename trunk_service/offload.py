"""Held graphs whose tensors rest elsewhere than in the memory that computes.

That is a file that has no name (nobody else can open it, and it is gone with the process) in a
folder the operator chose, or, beside a CUDA device and without a folder, pinned memory of the host.
Tensors are taken away when the forward is done and brought back one by one in its backward, to the
same bits. It lies between the other two ways to hold a forward: slower than keeping the graph and
without its memory, and, where the way to there is fast, quicker than computing it again.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from shared.errors import InvalidInputError
from trunk_service.budget import ByteBudget
from trunk_service.transfer import beside_compute


class OffloadArea:
    """Room for the graphs of all sessions.

    Args:
        limit: Bytes in all.
        folder: Where files are made; None for pinned memory, beside a CUDA device only.
        device: Where the trunk computes.

    Raises:
        InvalidInputError: If there is no such folder, or none was given for a CPU.
    """

    def __init__(self, limit: int, folder: Path | None, device: torch.device) -> None:
        if folder is None and device.type != "cuda":
            raise InvalidInputError("offloading from a CPU needs a folder: give --offload-dir DIR")
        if folder is not None and not folder.is_dir():
            raise InvalidInputError(f"--offload-dir {folder}: no such folder")
        self.budget = ByteBudget(limit, "trunk's offload")
        self.folder, self.device = folder, device

    def open(self, count: int) -> OffloadedGraph | None:
        """Takes room for a graph of so many bytes; None if there is not as much."""
        if not self.budget.try_reserve(count):
            return None
        return OffloadedGraph(self, count)


@dataclass
class _Stored:
    """A storage that autograd saved; several saved tensors may be views of it."""

    nbytes: int
    device: torch.device
    here: torch.UntypedStorage | None
    """Until it is taken away."""
    offset: int = 0
    host: torch.Tensor | None = None


@dataclass(frozen=True)
class _Saved:
    """A saved tensor: how it views its storage."""

    storage: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class OffloadedGraph:
    """The saved tensors of one forward; made by :meth:`OffloadArea.open`."""

    def __init__(self, area: OffloadArea, reserved: int) -> None:
        self._area, self._reserved = area, reserved
        self._stored: list[_Stored] = []
        self._numbers: dict[int, int] = {}
        self._weights: frozenset[int] = frozenset()
        self._file: IO[bytes] | None = None

    def catch(self, weights: Iterable[torch.Tensor]) -> AbstractContextManager[Any]:
        """Notes what autograd saves in the block, apart from these weights."""
        self._weights = frozenset(w.untyped_storage().data_ptr() for w in weights)
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def take_away(self) -> None:
        """Frees the memory of what was caught.

        Raises:
            OSError: If the file cannot be written; the graph is then of no use.
        """
        self._numbers.clear()  # an address may be another tensor's from now on
        if self._area.folder is None:
            self._to_host()
        else:
            self._to_file(self._area.folder)
        for stored in self._stored:
            stored.here = None

    def close(self) -> None:
        """Gives the room back; may be called again."""
        self._area.budget.release(self._reserved)
        self._reserved = 0
        self._stored.clear()
        if self._file is not None:
            self._file.close()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Saved:
        if tensor.layout is not torch.strided:
            return tensor.detach()
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in self._weights or not storage.nbytes():
            # Not the tensor itself: its node would hold it, and it the node, out of gc's sight.
            return tensor.detach()
        if address not in self._numbers:
            self._numbers[address] = len(self._stored)
            self._stored.append(_Stored(storage.nbytes(), tensor.device, storage))
        number = self._numbers[address]
        offset = int(tensor.storage_offset())
        return _Saved(number, tensor.dtype, tensor.size(), tensor.stride(), offset)

    def _unpack(self, saved: torch.Tensor | _Saved) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        stored = self._stored[saved.storage]
        storage = stored.here if stored.here is not None else self._fetched(stored)
        empty = torch.empty(0, dtype=saved.dtype, device=stored.device)
        return empty.set_(storage, saved.offset, saved.size, saved.stride)  # type: ignore[call-overload, no-any-return]

    def _fetched(self, stored: _Stored) -> torch.UntypedStorage:
        if stored.host is not None:
            return stored.host.to(stored.device, non_blocking=True).untyped_storage()
        assert self._file is not None
        fetched = torch.empty(stored.nbytes, dtype=torch.uint8)
        view, done = memoryview(fetched.numpy()), 0  # type: ignore[arg-type]
        while done < stored.nbytes:
            count = os.preadv(self._file.fileno(), [view[done:]], stored.offset + done)
            if not count:
                raise OSError(f"an offloaded tensor ends after {done} of {stored.nbytes} bytes")
            done += count
        return fetched.to(stored.device).untyped_storage()

    def _to_file(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        end = 0
        for stored in self._stored:
            view, done = memoryview(_bytes(stored).cpu().numpy()), 0  # type: ignore[arg-type]
            while done < stored.nbytes:
                done += os.pwrite(self._file.fileno(), view[done:], end + done)
            stored.offset, end = end, end + stored.nbytes

    def _to_host(self) -> None:
        """On a stream beside the one that computes, after what it has been given so far."""
        beside = beside_compute(self._area.device)
        with torch.cuda.stream(beside):
            for stored in self._stored:
                stored.host = torch.empty(stored.nbytes, dtype=torch.uint8, pin_memory=True)
                stored.host.copy_(_bytes(stored), non_blocking=True)
        beside.synchronize()


def _bytes(stored: _Stored) -> torch.Tensor:
    assert stored.here is not None
    return torch.empty(0, dtype=torch.uint8, device=stored.device).set_(stored.here)  # type: ignore[call-overload, no-any-return]
