"""One session's stream to a trunk: requests out, answers matched to them by id."""

from __future__ import annotations

import itertools
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import grpc

from client_service.credentials import Credentials, tls_hint
from shared.errors import (
    AuthenticationError,
    DrainingError,
    InvalidInputError,
    ProtocolError,
    SessionExpiredError,
    StaleSessionError,
    TrunklineError,
    TrunkUnavailableError,
)
from shared.loopback import is_loopback
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.wire.error_codes import to_exception
from shared.wire.formats import Packed
from shared.wire.messages import Inbox, Incoming, to_frames
from shared.wire.tensors import MAX_FRAME_BYTES

logger = logging.getLogger(__name__)

SERVICE = f"/{pb.DESCRIPTOR.services_by_name['TrunkService'].full_name}"

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
    ("grpc.max_send_message_length", MAX_FRAME_BYTES),
    # A silent trunk is noticed within 20 s; it tolerates pings every 5 s (trunk_service.server).
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 8_000),
    ("grpc.http2.ping_timeout_ms", 8_000),  # of the ping itself; by default a minute
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),  # or a session that waits is pinged twice only
    ("grpc.enable_channelz", 0),
    ("grpc.use_local_subchannel_pool", 1),
]

CONNECT_TIMEOUT_S = 5.0

Answer = Incoming[pb.SessionResponse]

_LAST_ID = (1 << 63) - 1

_process = 0
"""That has opened the first channel."""


@dataclass
class Traffic:
    """Bytes on the wire, as gRPC is given and gives them."""

    bytes_sent: int = 0
    bytes_received: int = 0


def open_channel(address: str, credentials: Credentials | None = None) -> grpc.Channel:
    """Opens a channel; nothing is sent before the first call.

    Args:
        address: HOST:PORT of the trunk.
        credentials: What to show it, inside TLS; None takes the environment's, and without any the
            channel is plain.

    Raises:
        InvalidInputError: If a file of the credentials is unusable, there are none and the address
            is not on this machine, or this process was forked from one that has opened a channel.
    """
    global _process
    _process = _process or os.getpid()
    if _process != os.getpid():
        raise InvalidInputError(
            "this process was forked from one that had opened a session, after which gRPC hangs: "
            "accepted are models that are opened in a process that was spawned"
        )
    credentials = credentials or Credentials.from_environment()
    if credentials is not None:
        return grpc.secure_channel(address, credentials.for_channel(), options=CHANNEL_OPTIONS)
    if not is_loopback(address):
        raise InvalidInputError(
            f"trunk {address} is on another host, which is reached with TLS only: give the folder "
            "that `trunkline certs` made for this client, as --tls DIR or in TRUNKLINE_TLS"
        )
    # A proxy would carry what is plain away from this machine.
    return grpc.insecure_channel(address, options=[*CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0)])


def get_info(channel: grpc.Channel, address: str, timeout_s: float) -> pb.GetInfoResponse:
    """Asks a trunk what it serves.

    Raises:
        TrunkUnavailableError: If it does not answer in time; names the address and the cause.
        AuthenticationError: If it does not accept the certificate or the token.
    """
    call = channel.unary_unary(
        f"{SERVICE}/GetInfo",
        request_serializer=pb.GetInfoRequest.SerializeToString,
        response_deserializer=pb.GetInfoResponse.FromString,
    )
    try:
        info: pb.GetInfoResponse = call(pb.GetInfoRequest(), timeout=timeout_s)
    except grpc.RpcError as error:
        failure = _unavailable(address, error)
        if error.code() is grpc.StatusCode.UNAVAILABLE and (hint := tls_hint(error.details())):
            failure = TrunkUnavailableError(f"{failure}{hint}")
        raise failure from error
    return info


class SessionConnection:
    """A stream that many threads may send on.

    Args:
        channel: Where the trunk is; closed with the connection.
        address: For messages.
        traffic: Counts bytes.
        on_end: Called once when the stream is over, with the reason.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        address: str,
        traffic: Traffic,
        on_end: Callable[[SessionConnection, TrunklineError], None],
    ) -> None:
        self._channel, self._address, self._traffic = channel, address, traffic
        self._on_end = on_end
        self._waiting: dict[int, Future[Answer]] = {}
        self._failure: TrunklineError | None = None
        self._lock = threading.Lock()
        self._outgoing: queue.SimpleQueue[Iterator[bytes] | None] = queue.SimpleQueue()
        call: Any = channel.stream_stream(f"{SERVICE}/Session")
        self._call: Any = call(self._written())
        self._reader = threading.Thread(target=self._read, name="trunk-answers", daemon=True)
        self._reader.start()

    def send(self, request: pb.SessionRequest, tensors: Mapping[str, Packed]) -> Future[Answer]:
        """Sends a request; its answer arrives in the future, or the error that it was.

        The tensors must stay as they are until then.

        Raises:
            TensorError: If a tensor's dtype does not travel; nothing was sent.
        """
        future: Future[Answer] = Future()
        message = pb.SessionRequest()
        message.CopyFrom(request)  # announcing the tensors changes it
        # The first is made here, so that what cannot be sent raises before anything is remembered;
        # the others when they are written, each in the memory, and the cache, of one before it.
        frames = to_frames(message, tensors)
        first = next(frames)
        with self._lock:
            failure = self._failure
            if failure is None:
                self._waiting[message.id] = future
                self._outgoing.put(itertools.chain((first,), frames))
        if failure is not None:
            future.set_exception(failure)
        return future

    def ask(
        self, request: pb.SessionRequest, tensors: Mapping[str, Packed], timeout_s: float
    ) -> Answer:
        """Sends a request and waits for its answer.

        Raises:
            TrunklineError: What the trunk answered, if it refused.
            TrunkUnavailableError: If the stream broke or no answer came in time.
        """
        try:
            return self.send(request, tensors).result(timeout_s)
        except TimeoutError as error:
            raise TrunkUnavailableError(
                f"trunk {self._address} gave no answer within {timeout_s:g} s"
            ) from error

    def close(self) -> None:
        """Ends the stream and the session with it."""
        closing = pb.SessionRequest(id=_LAST_ID, close=pb.Close())
        self._outgoing.put(iter((closing.SerializeToString(),)))
        self._outgoing.put(None)
        self._reader.join(timeout=5.0)
        self.abandon()

    def abandon(self) -> None:
        """Breaks the stream off; the trunk keeps the session for a while."""
        self._call.cancel()
        if self._reader is not threading.current_thread():
            self._reader.join(timeout=5.0)
        self._outgoing.put(None)
        self._channel.close()

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
        with self._lock:
            self._failure = failure
            waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            future.set_exception(failure)
        self._on_end(self, failure)

    def _written(self) -> Iterator[bytes]:
        """What gRPC writes; it asks for a frame when it has taken the one before."""
        for frames in iter(self._outgoing.get, None):
            for frame in frames:
                self._traffic.bytes_sent += len(frame)
                yield frame

    def _frames(self) -> Iterator[bytes]:
        for raw in self._call:
            self._traffic.bytes_received += len(raw)
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


def _unavailable(address: str, error: grpc.RpcError) -> TrunklineError:
    """The error that a call's status stands for."""
    details = str(error.details()) or error.code().name
    kind: type[TrunklineError] = {
        grpc.StatusCode.ABORTED: SessionExpiredError,
        grpc.StatusCode.FAILED_PRECONDITION: StaleSessionError,
        grpc.StatusCode.INVALID_ARGUMENT: ProtocolError,
        grpc.StatusCode.UNAUTHENTICATED: AuthenticationError,
    }.get(error.code(), TrunkUnavailableError)
    if "shutting down" in details:
        kind = DrainingError
    return kind(f"trunk {address}: {details} ({error.code().name})")
