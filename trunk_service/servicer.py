"""The gRPC service: ``GetInfo`` and the session stream, on asyncio.

Frames pass as raw bytes: our codec reads and writes them (see :mod:`shared.wire.frames`), so a
malformed one is answered by us and not by gRPC.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from shared.errors import AuthenticationError, ProtocolError
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from trunk_service import translate
from trunk_service.execution import Execution
from trunk_service.identity import Authenticator
from trunk_service.registry import SessionRegistry
from trunk_service.stream import SessionStream

logger = logging.getLogger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["TrunkService"].full_name


class TrunkServicer:
    """Serves sessions from a registry, and ends their streams when leases or the trunk end.

    Args:
        registry: Sessions, trunk and scheduler.
        authenticator: Tells who calls.
    """

    def __init__(self, registry: SessionRegistry, authenticator: Authenticator) -> None:
        self._registry = registry
        self._execution = Execution(registry.scheduler, registry.metrics)
        self._authenticator = authenticator
        self._streams: dict[SessionStream, asyncio.Task[None]] = {}
        self._endings: dict[SessionStream, tuple[grpc.StatusCode, str]] = {}

    def handler(self) -> grpc.GenericRpcHandler:
        """The service's methods, as gRPC wants them registered."""
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "GetInfo": grpc.unary_unary_rpc_method_handler(
                    self.get_info,
                    response_serializer=pb.GetInfoResponse.SerializeToString,
                ),
                "Session": grpc.stream_stream_rpc_method_handler(self.session),
            },
        )

    async def get_info(
        self, request: bytes, context: grpc.aio.ServicerContext[object, object]
    ) -> pb.GetInfoResponse:
        """Answers what this trunk serves and accepts; there is nothing in the request to read."""
        try:
            self._authenticator.identify(context)
        except AuthenticationError as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        return translate.info_response(self._registry.trunk.info, self._registry.limits)

    async def session(
        self, frames: AsyncIterator[bytes], context: grpc.aio.ServicerContext[object, object]
    ) -> None:
        """Serves one connection to a session."""
        try:
            peer = self._authenticator.identify(context)
        except AuthenticationError as error:
            self._execution.metrics.rejected("UNAUTHENTICATED")
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        stream = SessionStream(
            self._registry, self._execution, peer, context.write, self._end_taken_over
        )
        serving = asyncio.create_task(stream.serve(_Frames(context)))
        self._streams[stream] = serving
        try:
            await serving
        except ProtocolError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except asyncio.CancelledError:
            if stream not in self._endings:
                raise
            await context.abort(*self._endings.pop(stream))
        finally:
            serving.cancel()
            self._streams.pop(stream, None)
            self._endings.pop(stream, None)

    @property
    def answering(self) -> bool:
        """True until every stream has written the answers of the requests that it has read."""
        return any(stream.answering for stream in self._streams)

    def end_expired(self) -> None:
        """Ends the streams whose sessions were silent for too long."""
        lease_s = self._registry.limits.session_lease_s
        for stream in list(self._streams):
            if stream.lease_is_over:
                why = f"the session was silent for more than its lease of {lease_s:g} s"
                self._end(stream, grpc.StatusCode.ABORTED, why)

    async def end_all(self, why: str, timeout_s: float) -> None:
        """Ends every stream because the trunk goes away, and waits until each was told.

        Stopping the server before that would cut off the statuses that are on their way.
        """
        for stream in list(self._streams):
            self._end(stream, grpc.StatusCode.UNAVAILABLE, why)
        deadline = time.monotonic() + timeout_s
        while self._streams and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    def _end_taken_over(self, stream: SessionStream) -> None:
        stream.give_up()
        why = "another connection has taken the session over"
        self._end(stream, grpc.StatusCode.FAILED_PRECONDITION, why)

    def _end(self, stream: SessionStream, code: grpc.StatusCode, why: str) -> None:
        if stream not in self._streams or stream in self._endings:
            return
        stream.keeps_session = False
        self._endings[stream] = code, why
        self._streams[stream].cancel()


class _Frames:
    """What a client sends; of gRPC's own iterator the last frame would stay until the next."""

    def __init__(self, context: grpc.aio.ServicerContext[object, object]) -> None:
        self._context: Any = context

    def __aiter__(self) -> _Frames:
        return self

    async def __anext__(self) -> bytes:
        frame: Any = await self._context.read()
        if frame is grpc.aio.EOF:
            raise StopAsyncIteration
        return frame  # type: ignore[no-any-return]
