"""A session spoken to frame by frame, by a client that keeps to no rules but the wire's."""

from __future__ import annotations

import functools
import itertools
import queue
from collections.abc import Mapping
from typing import Any

import grpc
import torch
from peft import LoraConfig

from client_service.credentials import Credentials
from client_service.trunk_function import Adapters
from shared.models import SplitRange
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.versions import library_versions
from shared.wire.messages import Inbox, to_frames
from tests.chaos.stage import BATCH, HIDDEN, LORA, SIZES, SPLIT, TOKENS
from tests.client_adapter import client_adapter, first_push

_METHOD = f"/{pb.DESCRIPTOR.services_by_name['TrunkService'].full_name}/Session"
_UNBOUNDED = 1 << 62

STATES_BTD = torch.randn(BATCH, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0))


class RawSession:
    """A stream whose answers are read by whoever waits for them.

    Args:
        address: ``host:port``.
        credentials: To show; None speaks without TLS.
    """

    def __init__(self, address: str, credentials: Credentials | None = None) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        if credentials is None:
            self._channel = grpc.insecure_channel(address, options)
        else:
            self._channel = grpc.secure_channel(address, credentials.for_channel(), options)
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        call: Any = self._channel.stream_stream(_METHOD)
        self._call: Any = call(iter(self._outgoing.get, None))
        self._ids = itertools.count(1)
        self._inbox = Inbox(pb.SessionResponse, lambda _: _UNBOUNDED, _UNBOUNDED)

    def send(
        self, request: pb.SessionRequest, tensors: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        request.id = next(self._ids)
        for frame in to_frames(request, tensors or {}):
            self._outgoing.put(frame)

    def receive(self) -> pb.SessionResponse:
        """Waits for the next answer to anything.

        Raises:
            grpc.RpcError: If the stream ended instead.
        """
        while True:
            incoming = self._inbox.feed(next(self._call))
            if incoming is not None:
                return incoming.message

    def open(self) -> pb.SessionResponse:
        """Asks for a session; the answer may be an error."""
        split = SplitRange.parse(SPLIT)
        body = pb.Open(
            start_layer=split.start,
            end_layer=split.end,
            library_versions=library_versions(),
        )
        self.send(pb.SessionRequest(open=body))
        return self.receive()

    def send_held_forward(self, request_id: str, with_adapter: bool = True) -> None:
        """Sends a forward whose graph the trunk is to keep, and an adapter, all of it."""
        body = pb.Forward(request_id=request_id, keep_graph=True, training=True, state_version=1)
        body.dropout_key = bytes(32)
        tensors = {"hidden_states": STATES_BTD}
        if with_adapter:
            state, values = first_push(_adapter())
            body.state.CopyFrom(state)
            tensors |= values
        self.send(pb.SessionRequest(forward=body), tensors)

    def abandon(self) -> None:
        """Dies without having closed the session."""
        self._call.cancel()
        self._outgoing.put(None)
        self._channel.close()


@functools.cache
def _adapter() -> Adapters:
    config = LoraConfig(**LORA, fan_in_fan_out=True)  # type: ignore[arg-type]
    return client_adapter(config, SplitRange.parse(SPLIT), **SIZES)
