"""One session's stream to a trunk: requests out, answers matched to them by id."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import grpc
import torch

from shared.errors import (
    DrainingError,
    SessionExpiredError,
    TrunklineError,
    TrunkUnavailableError,
)
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.wire.error_codes import to_exception
from shared.wire.messages import Inbox, Incoming, to_frames
from shared.wire.tensors import MAX_FRAME_BYTES

logger = logging.getLogger(__name__)

SERVICE = f"/{pb.DESCRIPTOR.services_by_name['TrunkService'].full_name}"

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
    ("grpc.max_send_message_length", MAX_FRAME_BYTES),
    # The trunk tolerates pings every 10 s (see trunk_service.server).
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.use_local_subchannel_pool", 1),
]

Answer = Incoming[pb.SessionResponse]


@dataclass
class Traffic:
    """Bytes on the wire, as gRPC is given and gives them."""

    bytes_sent: int = 0
    bytes_received: int = 0


def open_channel(address: str) -> grpc.Channel:
    """Opens an unencrypted channel; nothing is sent before the first call."""
    return grpc.insecure_channel(address, options=_OPTIONS)


def get_info(channel: grpc.Channel, address: str, timeout_s: float) -> pb.GetInfoResponse:
    """Asks a trunk what it serves.

    Raises:
        TrunkUnavailableError: If it does not answer in time; names the address and the cause.
    """
    call = channel.unary_unary(
        f"{SERVICE}/GetInfo",
        request_serializer=pb.GetInfoRequest.SerializeToString,
        response_deserializer=pb.GetInfoResponse.FromString,
    )
    try:
        info: pb.GetInfoResponse = call(pb.GetInfoRequest(), timeout=timeout_s)
    except grpc.RpcError as error:
        raise _unavailable(address, error) from error
    return info


class SessionConnection:
    """A stream that many threads may send on.

    Args:
        channel: Where the trunk is.
        address: For messages.
        request_timeout_s: How long an answer may take.
    """

    def __init__(self, channel: grpc.Channel, address: str, request_timeout_s: float) -> None:
        self.traffic = Traffic()
        self._address = address
        self._timeout_s = request_timeout_s
        self._ids = itertools.count(1)
        self._waiting: dict[int, Future[Answer]] = {}
        self._failure: TrunklineError | None = None
        self._lock = threading.Lock()
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        call: Any = channel.stream_stream(f"{SERVICE}/Session")
        self._call: Any = call(iter(self._outgoing.get, None))
        self._reader = threading.Thread(target=self._read, name="trunk-answers", daemon=True)
        self._reader.start()

    def send(
        self, request: pb.SessionRequest, tensors: Mapping[str, torch.Tensor] | None = None
    ) -> Future[Answer]:
        """Sends a request; its answer arrives in the future, or the error that it was.

        Raises:
            TrunkUnavailableError: If the stream is broken already.
        """
        future: Future[Answer] = Future()
        with self._lock:
            if self._failure is not None:
                raise self._failure
            request.id = next(self._ids)
            self._waiting[request.id] = future
            for frame in to_frames(request, tensors or {}):
                self.traffic.bytes_sent += len(frame)
                self._outgoing.put(frame)
        return future

    def ask(
        self, request: pb.SessionRequest, tensors: Mapping[str, torch.Tensor] | None = None
    ) -> Answer:
        """Sends a request and waits for its answer.

        Raises:
            TrunklineError: What the trunk answered, if it refused.
            TrunkUnavailableError: If the stream broke or no answer came in time.
        """
        return self.wait(self.send(request, tensors))

    def wait(self, future: Future[Answer]) -> Answer:
        """Waits for the answer of a request that was sent.

        Raises:
            TrunklineError: As :meth:`ask`.
        """
        try:
            return future.result(self._timeout_s)
        except TimeoutError as error:
            raise TrunkUnavailableError(
                f"trunk {self._address} gave no answer within {self._timeout_s:g} s"
            ) from error

    def close(self) -> None:
        """Ends the stream; the trunk frees the session."""
        self._outgoing.put(None)
        self._reader.join(timeout=5.0)
        self._call.cancel()

    def _read(self) -> None:
        inbox = Inbox(pb.SessionResponse, lambda _: 1 << 62, max_open_bytes=1 << 62)
        failure: TrunklineError = TrunkUnavailableError(f"trunk {self._address} ended the session")
        try:
            for raw in self._frames():
                incoming = inbox.feed(raw)
                if incoming is not None:
                    self._deliver(incoming)
        except grpc.RpcError as error:
            failure = _unavailable(self._address, error)
        except Exception as error:
            logger.exception("reading answers failed")
            failure = TrunkUnavailableError(f"trunk {self._address}: {error}")
            self._call.cancel()
        self._fail_all(failure)

    def _frames(self) -> Iterator[bytes]:
        for raw in self._call:
            self.traffic.bytes_received += len(raw)
            yield raw

    def _deliver(self, incoming: Answer) -> None:
        with self._lock:
            future = self._waiting.pop(incoming.message.id, None)
        if future is None:
            return
        error = incoming.error
        if incoming.message.WhichOneof("body") == "error":
            error = to_exception(incoming.message.error)
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(incoming)

    def _fail_all(self, failure: TrunklineError) -> None:
        with self._lock:
            self._failure = failure
            waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            future.set_exception(failure)


def _unavailable(address: str, error: grpc.RpcError) -> TrunkUnavailableError:
    details = str(error.details()) or error.code().name
    kind = {
        grpc.StatusCode.ABORTED: SessionExpiredError,
    }.get(error.code(), TrunkUnavailableError)
    if "shutting down" in details:
        kind = DrainingError
    return kind(f"trunk {address}: {details} ({error.code().name})")
