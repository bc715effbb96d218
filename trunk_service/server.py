"""The gRPC server around a trunk: health, leases, draining."""

from __future__ import annotations

import asyncio
import logging
import time

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from shared.errors import InvalidInputError
from shared.wire.tensors import MAX_FRAME_BYTES
from trunk_service.identity import Authenticator
from trunk_service.registry import SessionRegistry
from trunk_service.servicer import SERVICE_NAME, TrunkServicer

logger = logging.getLogger(__name__)

_REAP_INTERVAL_S = 1.0
_FAREWELL_S = 10.0  # how long the streams may take to end

# Health names. The process lives from its start to its end, also while it drains; it is ready, and
# the service is, until it drains.
_LIVENESS = ("", "liveness")
_READINESS = ("readiness", SERVICE_NAME)

SERVER_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
    ("grpc.max_send_message_length", MAX_FRAME_BYTES),
    # Two daemons on one port would share its connections at random.
    ("grpc.so_reuseport", 0),
    # A silent client is noticed within 20 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 8_000),
    ("grpc.http2.ping_timeout_ms", 8_000),  # of the ping itself; by default a minute
    ("grpc.http2.max_pings_without_data", 0),  # or a session that waits is pinged twice only
    # Clients ping every 10 s; gRPC's default of 5 min would end their connections.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.enable_channelz", 0),
    ("grpc.max_concurrent_streams", 100),  # of one connection
    # What a connection reads into stays with it: by default up to 4 MB of an idle one.
    ("grpc.experimental.tcp_max_read_chunk_size", 128 * 1024),
]


class TrunkServer:
    """Serves a registry's trunk on an address.

    Args:
        registry: Sessions, trunk and scheduler.
        authenticator: Tells who calls.
        credentials: TLS of the address; None serves plainly.
        with_reflection: Also serve gRPC reflection.
    """

    def __init__(
        self,
        registry: SessionRegistry,
        authenticator: Authenticator,
        credentials: grpc.ServerCredentials | None = None,
        with_reflection: bool = False,
    ) -> None:
        self._registry, self._credentials = registry, credentials
        self._servicer = TrunkServicer(registry, authenticator)
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        self._server.add_generic_rpc_handlers((self._servicer.handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if with_reflection:
            names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        self._reaper: asyncio.Task[None] | None = None

    async def start(self, address: str) -> int:
        """Starts serving; returns the port, which is a free one if the address names port 0.

        Raises:
            InvalidInputError: If the address cannot be bound.
        """
        try:
            if self._credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            raise InvalidInputError(f"cannot listen on {address}: {error}") from error
        await self._server.start()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING, *_LIVENESS, *_READINESS)
        self._reaper = asyncio.create_task(self._reap())
        return port

    async def drain(self, timeout_s: float) -> None:
        """Refuses new work, lets what is under way finish, then stops.

        Args:
            timeout_s: How long clients may take to send the backwards that are open.
        """
        logger.info("draining", extra={"sessions": len(self._registry)})
        self._registry.draining = True
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING, *_READINESS)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and not self._quiet:
            await asyncio.sleep(0.05)
        await self._servicer.end_all("the trunk is shutting down", timeout_s=_FAREWELL_S)
        await self._server.stop(grace=2.0)
        if self._reaper is not None:
            self._reaper.cancel()
        await asyncio.to_thread(self._registry.scheduler.stop)
        logger.info("stopped")

    @property
    def _quiet(self) -> bool:
        # What was computed is done for its client only once the answer is on its way.
        computing = not self._registry.scheduler.idle or self._servicer.answering
        return not computing and not self._registry.holds_state

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(_REAP_INTERVAL_S)
            try:
                self._servicer.end_expired()
                self._registry.close_abandoned()
                self._registry.forget_old_answers()
                self._registry.quotas.forget_idle()
                self._registry.free_expired_requests()
                await asyncio.to_thread(self._registry.return_memory_when_idle)
            except Exception:
                logger.exception("freeing what expired failed; tried again in a second")

    async def _set_health(
        self, status: health_pb2.HealthCheckResponse.ServingStatus, *names: str
    ) -> None:
        for name in names:
            await self._health.set(name, status)
