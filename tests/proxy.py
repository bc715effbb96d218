"""A line to a trunk: keeps what the client sends; may send it twice, or lose answers once."""

from __future__ import annotations

import threading
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
class Line:
    """What it does, and what it has done."""

    twice: bool = False
    loses: bool = False
    address: str = ""
    messages: list[tuple[pb.SessionRequest, Mapping[str, torch.Tensor]]] = field(
        default_factory=list
    )
    """The client's, as the trunk gets them."""
    doubled: int = 0
    lost: set[int] = field(default_factory=set)
    """Ids of the messages whose answers were lost."""


class _Through(grpc.GenericRpcHandler):
    def __init__(self, channel: grpc.Channel, line: Line) -> None:
        self._channel, self._line = channel, line

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        method: Any = details.method
        if method.endswith("/Session"):
            return grpc.stream_stream_rpc_method_handler(
                lambda frames, context: self._session(method, frames, context)
            )
        return grpc.unary_unary_rpc_method_handler(
            lambda request, _: self._channel.unary_unary(method)(request)
        )

    def _session(self, method: str, frames: Iterator[bytes], context: Any) -> Iterator[bytes]:
        ended = threading.Event()
        call: Any = self._channel.stream_stream(method)(self._sent(frames, ended))
        context.add_callback(call.cancel)
        inbox = Inbox(pb.SessionResponse, lambda _: _MOST_BYTES, _MOST_BYTES)
        held: list[bytes] = []
        try:
            for frame in call:
                held.append(frame)
                incoming = inbox.feed(frame)
                if incoming is None:
                    continue  # an answer is passed on when it is whole, or lost as a whole
                number = incoming.message.id
                opens = incoming.message.WhichOneof("body") == "open"
                if self._line.loses and not opens and number not in self._line.lost:
                    self._line.lost.add(number)
                    call.cancel()
                    context.abort(grpc.StatusCode.UNAVAILABLE, "the line was cut")
                yield from held
                held.clear()
        finally:
            ended.set()

    def _sent(self, frames: Iterator[bytes], ended: threading.Event) -> Iterator[bytes]:
        inbox = Inbox(pb.SessionRequest, lambda _: _MOST_BYTES, _MOST_BYTES)
        whole: list[bytes] = []
        for frame in frames:
            if ended.is_set():
                return
            yield frame
            whole.append(frame)
            incoming = inbox.feed(frame)
            if incoming is None:
                continue
            self._line.messages.append((incoming.message, incoming.tensors))
            if self._line.twice and incoming.message.WhichOneof("body") != "open":
                self._line.doubled += 1
                yield from whole
            whole = []


@contextmanager
def line_to(address: str, **faults: bool) -> Iterator[Line]:
    """Stands before a trunk."""
    line = Line(**faults)
    server = grpc.server(ThreadPoolExecutor(16))
    with grpc.insecure_channel(address) as channel:
        server.add_generic_rpc_handlers([_Through(channel, line)])
        line.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        yield line
        server.stop(None).wait()
