"""A session spoken to frame by frame, by a client that keeps to no rules but the wire's."""

from __future__ import annotations

import itertools
import json
import queue
from collections.abc import Mapping
from typing import Any

import grpc
import torch

from client_service.credentials import Credentials
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.versions import library_versions
from shared.wire.messages import Inbox, to_frames
from tests.chaos.stage import BATCH, HIDDEN, LORA, SPLIT, TOKENS

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
        """Asks for a session with an adapter; the answer may be an error."""
        start, end = map(int, SPLIT.split(":"))
        body = pb.Open(
            start_layer=start,
            end_layer=end,
            peft_config_json=json.dumps(LORA),
            wire_dtype=pb.DATA_TYPE_FLOAT32,
            library_versions=library_versions(),
        )
        self.send(pb.SessionRequest(open=body))
        return self.receive()

    def send_held_forward(self, request_id: str) -> None:
        """Sends a forward whose graph the trunk is to keep."""
        body = pb.Forward(request_id=request_id, keep_graph=True, training=True, step=1)
        self.send(pb.SessionRequest(forward=body), {"hidden_states": STATES_BTD})

    def abandon(self) -> None:
        """Dies without having closed the session."""
        self._call.cancel()
        self._outgoing.put(None)
        self._channel.close()
