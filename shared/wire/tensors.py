"""Tensors as announcements and raw little-endian bytes, in chunks of bounded size."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping

import torch

from shared.errors import ProtocolError, TensorError
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.tensor_bytes import as_bytes
from shared.wire.dtypes import to_torch, to_wire
from shared.wire.formats import Int8Blocks, Packed, block_bytes, unpack

CHUNK_BYTES = 2 * 1024 * 1024
"""Most payload bytes in one message; with its small fields it stays under ``MAX_FRAME_BYTES``."""

MAX_FRAME_BYTES = CHUNK_BYTES + 1024 * 1024
"""What both sides allow gRPC to receive as one message."""

_ENCODINGS = frozenset({pb.ENCODING_UNSPECIFIED, pb.ENCODING_INT8_BLOCKS})

MAX_RANK = 8
MAX_TENSORS = 100_000
MAX_ELEMENTS = 2**60

if sys.byteorder != "little":
    raise ImportError("tensors travel little-endian and are not converted; this host is big-endian")


def announce(tensors: Mapping[str, Packed]) -> list[pb.TensorSpec]:
    """Describes tensors in the order in which their bytes will follow."""
    return [_announced(name, tensor) for name, tensor in tensors.items()]


def _announced(name: str, tensor: Packed) -> pb.TensorSpec:
    if isinstance(tensor, Int8Blocks):
        return pb.TensorSpec(
            name=name,
            data_type=pb.DATA_TYPE_FLOAT32,
            shape=tensor.shape,
            encoding=pb.ENCODING_INT8_BLOCKS,
        )
    return pb.TensorSpec(name=name, data_type=to_wire(tensor.dtype), shape=tensor.shape)


def chunks(tensors: Mapping[str, Packed]) -> Iterator[list[memoryview]]:
    """Yields the bytes of the tensors, back to back, at most ``CHUNK_BYTES`` at a time.

    A chunk is a list of views, which are joined where the frame is: so the small tensors of a
    message share one, and each frame that gRPC need not carry is a tenth of a token's way.
    """
    chunk, room = list[memoryview](), CHUNK_BYTES
    for tensor in tensors.values():
        view = as_bytes(tensor.raw if isinstance(tensor, Int8Blocks) else tensor)
        while view.nbytes:
            chunk.append(view[:room])
            view, room = view[room:], room - chunk[-1].nbytes
            if not room:
                yield chunk
                chunk, room = [], CHUNK_BYTES
    if chunk:
        yield chunk


class TensorAssembly:
    """The tensors of one message while their bytes arrive.

    Bytes are copied once, from the message into the tensor's own memory. A view into the message
    would save that copy, but would start at an arbitrary address, and matrix kernels may sum in
    another order there: results would no longer be the same bit for bit from run to run.

    Args:
        specs: The announcement.
        max_bytes: Most bytes the message may have in all.

    Raises:
        TensorError: If a dtype, rank, shape or the total size is not acceptable.
        ProtocolError: If a name is announced twice or there are too many.
    """

    def __init__(self, specs: list[pb.TensorSpec], max_bytes: int) -> None:
        if len(specs) > MAX_TENSORS or len({spec.name for spec in specs}) != len(specs):
            raise ProtocolError(f"{len(specs)} tensors announced: too many, or a name twice")
        sizes = [_byte_size(spec) for spec in specs]
        if sum(sizes) > max_bytes:
            raise TensorError(
                f"tensors of {sum(sizes)} bytes announced; at most {max_bytes} are accepted"
            )
        self.tensors = {
            s.name: torch.empty(tuple(s.shape), dtype=to_torch(s.data_type)) for s in specs
        }
        self._encoded = {
            s.name: torch.empty(block_bytes(self.tensors[s.name].numel()), dtype=torch.uint8)
            for s in specs
            if s.encoding == pb.ENCODING_INT8_BLOCKS
        }
        arriving = (self._encoded.get(name, t) for name, t in self.tensors.items())
        self._open = [as_bytes(tensor) for tensor in arriving if tensor.numel()]
        self._filled = 0

    @property
    def complete(self) -> bool:
        """True once every announced byte has arrived."""
        return not self._open

    def add(self, payload: memoryview) -> None:
        """Takes the next bytes.

        Raises:
            ProtocolError: If there are more bytes than announced.
        """
        while payload.nbytes:
            if not self._open:
                raise ProtocolError(f"{payload.nbytes} bytes more than the tensors announced")
            target = self._open[0]
            count = min(payload.nbytes, target.nbytes - self._filled)
            # Not torch's copy: it wakes other threads for a chunk, and gRPC has the cores by now.
            target[self._filled : self._filled + count] = payload[:count]
            self._filled += count
            payload = payload[count:]
            if self._filled == target.nbytes:
                self._open.pop(0)
                self._filled = 0
        if not self._open:
            while self._encoded:
                name, raw = self._encoded.popitem()
                self.tensors[name] = unpack(raw, self.tensors[name].shape)


def _byte_size(spec: pb.TensorSpec) -> int:
    """Bytes once it is decoded."""
    if spec.encoding not in _ENCODINGS:
        raise TensorError(f"{spec.name}: encoding {spec.encoding}; accepted: {sorted(_ENCODINGS)}")
    if spec.encoding and spec.data_type != pb.DATA_TYPE_FLOAT32:
        raise TensorError(f"{spec.name}: int8 blocks are of float32 numbers alone")
    if len(spec.shape) > MAX_RANK:
        raise TensorError(f"{spec.name}: rank {len(spec.shape)}; at most {MAX_RANK} is accepted")
    # Empty dimensions count as 1 here: torch computes strides past them, and those overflow.
    if math.prod(max(1, size) for size in spec.shape) > MAX_ELEMENTS:
        raise TensorError(f"{spec.name}: shape {list(spec.shape)} is larger than any tensor")
    return math.prod(spec.shape) * to_torch(spec.data_type).itemsize
