"""Whole messages: cut into frames on one side, put together again on the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from shared.errors import ProtocolError, ResourceExhaustedError, TrunklineError
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.wire.formats import Packed
from shared.wire.frames import decode_frame, encode_frame
from shared.wire.tensors import (
    CHUNK_BYTES,
    MAX_FRAME_BYTES,
    TensorAssembly,
    announce,
    chunks,
)

M = TypeVar("M", pb.SessionRequest, pb.SessionResponse)

MAX_OPEN_MESSAGES = 64


def to_frames(message: M, tensors: Mapping[str, Packed]) -> Iterator[bytes]:
    """Yields a message as frames of bounded size, its tensors announced in the first."""
    message.tensors.extend(announce(tensors))
    pieces = chunks(tensors)
    fills_a_frame = message.ByteSize() > MAX_FRAME_BYTES - CHUNK_BYTES
    yield encode_frame(message, *([] if fills_a_frame else next(pieces, [])))
    follow_up = type(message)(id=message.id)
    for piece in pieces:
        yield encode_frame(follow_up, *piece)


@dataclass
class Incoming(Generic[M]):
    """A message that has arrived whole, or what was wrong with it."""

    message: M
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    error: TrunklineError | None = None


class Inbox(Generic[M]):
    """Puts the messages of one stream together while their frames arrive interleaved.

    A message that is refused (its tensors too large, say) is reported once; the frames that still
    follow under its id are dropped, and the stream stays usable.

    Args:
        message_type: What the frames are.
        max_bytes: Most tensor bytes of a message, by its first frame.
        max_open_bytes: Most tensor bytes of all messages that are under way.
    """

    def __init__(
        self,
        message_type: type[M],
        max_bytes: Callable[[M], int],
        max_open_bytes: int,
    ) -> None:
        self._type: type[M] = message_type
        self._max_bytes: Callable[[M], int] = max_bytes
        self._max_open_bytes = max_open_bytes
        self._open: dict[int, tuple[Incoming[M], TensorAssembly]] = {}

    def feed(self, raw: bytes) -> Incoming[M] | None:
        """Takes one frame; returns a message when its last byte has arrived.

        Raises:
            ProtocolError: If the frame is no message of this type: the stream cannot go on.
        """
        frame = decode_frame(self._type, raw)
        message = frame.message
        if message.WhichOneof("body") is None:
            return self._continue(message, frame.payload)
        incoming = Incoming(message)
        try:
            assembly = self._begin(message)
        except TrunklineError as error:
            incoming.error = error
            return incoming
        incoming.tensors = assembly.tensors
        self._open[message.id] = incoming, assembly
        return self._add(message.id, frame.payload)

    def _begin(self, message: M) -> TensorAssembly:
        if message.id in self._open:
            del self._open[message.id]
            raise ProtocolError(f"message {message.id} begins twice")
        assembly = TensorAssembly(list(message.tensors), self._max_bytes(message))
        under_way = sum(t.nbytes for m, _ in self._open.values() for t in m.tensors.values())
        size = sum(t.nbytes for t in assembly.tensors.values())
        if len(self._open) >= MAX_OPEN_MESSAGES or under_way + size > self._max_open_bytes:
            raise ResourceExhaustedError(
                f"{len(self._open)} messages with {under_way} bytes are under way; "
                f"at most {MAX_OPEN_MESSAGES} with {self._max_open_bytes} bytes are accepted"
            )
        return assembly

    def _continue(self, message: M, payload: memoryview) -> Incoming[M] | None:
        if message.id not in self._open:
            return None  # the rest of a message that was refused
        return self._add(message.id, payload)

    def _add(self, message_id: int, payload: memoryview) -> Incoming[M] | None:
        incoming, assembly = self._open[message_id]
        try:
            assembly.add(payload)
        except TrunklineError as error:
            del self._open[message_id]
            incoming.error, incoming.tensors = error, {}
            return incoming
        if not assembly.complete:
            return None
        del self._open[message_id]
        return incoming
