"""A host's view of a session: every message of the client, as the trunk gets it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import torch

from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.wire.messages import Inbox

_MOST_BYTES = 1 << 30


@dataclass
class Recorded:
    """Where the proxy listens, and what has passed it."""

    address: str = ""
    messages: list[tuple[pb.SessionRequest, Mapping[str, torch.Tensor]]] = field(
        default_factory=list
    )


class _Through(grpc.GenericRpcHandler):
    def __init__(self, channel: grpc.Channel, recorded: Recorded) -> None:
        self._channel, self._recorded = channel, recorded

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        method: Any = details.method
        if method.endswith("/Session"):
            return grpc.stream_stream_rpc_method_handler(
                lambda frames, _: self._channel.stream_stream(method)(self._read(frames))
            )
        return grpc.unary_unary_rpc_method_handler(
            lambda request, _: self._channel.unary_unary(method)(request)
        )

    def _read(self, frames: Iterator[bytes]) -> Iterator[bytes]:
        inbox = Inbox(pb.SessionRequest, lambda _: _MOST_BYTES, _MOST_BYTES)
        for frame in frames:
            if (incoming := inbox.feed(frame)) is not None:
                self._recorded.messages.append((incoming.message, incoming.tensors))
            yield frame


@contextmanager
def recording(address: str) -> Iterator[Recorded]:
    """Stands before a trunk."""
    recorded = Recorded()
    server = grpc.server(ThreadPoolExecutor(8))
    with grpc.insecure_channel(address) as channel:
        server.add_generic_rpc_handlers([_Through(channel, recorded)])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        recorded.address = f"127.0.0.1:{port}"
        yield recorded
        server.stop(None).wait()
