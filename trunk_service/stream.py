"""One session's stream: frames in, answers out, every failure of a request inside the stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import torch

from shared.errors import (
    DrainingError,
    ProtocolError,
    ResourceExhaustedError,
    TrunkInternalError,
    TrunklineError,
)
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.wire.error_codes import to_message
from shared.wire.messages import Inbox, Incoming, to_frames
from trunk_service import translate
from trunk_service.handlers import HANDLERS, Answer
from trunk_service.registry import OpenSession, SessionRegistry

logger = logging.getLogger(__name__)

Send = Callable[[bytes], Awaitable[None]]

_LAST_WRITE_S = 5.0

_NEW_WORK = frozenset({"open", "forward", "restore", "add_adapter"})


class SessionStream:
    """Serves one stream from its first frame to its last.

    Args:
        registry: Where sessions live.
        send: Writes one frame to the client.
    """

    def __init__(self, registry: SessionRegistry, send: Send) -> None:
        self._registry = registry
        self._send = send
        self._write_lock = asyncio.Lock()
        self._writing: asyncio.Future[None] | None = None
        self._in_flight = asyncio.Semaphore(registry.limits.max_requests_in_flight)
        self._session: OpenSession | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        info, limits = registry.trunk.info, registry.limits

        def cap(message: pb.SessionRequest) -> int:
            return translate.max_tensor_bytes(message, info, limits)

        widest = cap(pb.SessionRequest(forward=pb.Forward()))
        self._inbox = Inbox(pb.SessionRequest, cap, max_open_bytes=2 * widest, ids_grow=True)

    async def serve(self, frames: AsyncIterator[bytes]) -> None:
        """Reads frames until the client ends the stream, then frees the session.

        Raises:
            ProtocolError: If a frame is no message at all: the stream cannot go on.
        """
        try:
            async for raw in frames:
                incoming = self._inbox.feed(raw)
                if self._session is not None:
                    self._session.touch()
                if incoming is not None:
                    await self._begin(incoming)
            await asyncio.gather(*self._tasks)
        finally:
            for task in self._tasks:
                task.cancel()
            await self._finish_write()
            await self._close()

    @property
    def lease_is_over(self) -> bool:
        """True when the client was silent for longer than its session's lease."""
        if self._session is None or self._tasks:
            return False  # what it waits for is not its silence
        return self._session in self._registry.expired()

    async def _begin(self, incoming: Incoming[pb.SessionRequest]) -> None:
        """Starts a request; waits while as many as are allowed are under way."""
        await self._in_flight.acquire()
        message = incoming.message
        error = incoming.error or self._refusal(message)
        if error is not None or message.WhichOneof("body") == "open":
            # Nothing of the session can start before it is open, so this is not run beside.
            try:
                await self._answer(incoming, error)
            finally:
                self._in_flight.release()
            return
        task = asyncio.create_task(self._answer(incoming, None))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        await asyncio.sleep(0)  # lets the task reach the scheduler, so requests keep their order

    def _done(self, task: asyncio.Task[None]) -> None:
        if self._session is not None:
            self._session.touch()  # the lease counts silence, not the trunk's own computing
        # Only now, with its answer written: else a client that reads nothing would make the trunk
        # hold answer upon answer for it.
        self._in_flight.release()
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.info("an answer could not be written: %s", error)

    def _refusal(self, message: pb.SessionRequest) -> TrunklineError | None:
        kind = message.WhichOneof("body")
        if (self._session is None) != (kind == "open"):
            return ProtocolError(f"{kind} came {'before' if kind != 'open' else 'after an'} open")
        if self._registry.draining and kind in _NEW_WORK:
            return DrainingError(f"the trunk is shutting down and takes no new {kind}")
        return None

    async def _answer(
        self, incoming: Incoming[pb.SessionRequest], error: TrunklineError | None
    ) -> None:
        message = incoming.message
        try:
            if error is not None:
                raise error
            response, tensors = await self._handle(message, incoming.tensors)
        except TrunklineError as refused:
            response, tensors = pb.SessionResponse(error=to_message(refused)), {}
            self._log(logging.INFO, message, f"refused: {type(refused).__name__}: {refused}")
        except (MemoryError, torch.OutOfMemoryError) as exhausted:
            spent = ResourceExhaustedError(f"no memory for this request ({exhausted})")
            response, tensors = pb.SessionResponse(error=to_message(spent)), {}
            self._log(logging.WARNING, message, "no memory for a request")
        except Exception:
            failure = TrunkInternalError(f"message {message.id} failed; see the trunk's log")
            response, tensors = pb.SessionResponse(error=to_message(failure)), {}
            self._log(logging.ERROR, message, "request failed", exc_info=True)
        response.id = message.id
        await self._write(response, tensors)

    async def _handle(self, message: pb.SessionRequest, tensors: dict[str, torch.Tensor]) -> Answer:
        kind = message.WhichOneof("body")
        if kind == "open":
            return await self._open(message.open)
        assert self._session is not None and kind is not None
        work = HANDLERS[kind]
        tenant, body = self._session.tenant, getattr(message, kind)
        scheduler = self._registry.scheduler
        submitted = scheduler.submit(self._session.session_id, lambda: work(tenant, body, tensors))
        return await asyncio.wrap_future(submitted)

    async def _open(self, body: pb.Open) -> Answer:
        opened = self._registry.open(translate.open_request(body))
        try:
            self._session = await asyncio.wrap_future(opened)
        except asyncio.CancelledError:
            opened.add_done_callback(self._registry.close_late)
            raise
        session_id = self._session.session_id
        count = self._session.tenant.adapters.get("").trainable_parameters
        extra = {"session": session_id, "trainable_parameters": count}
        logger.info("session opened", extra=extra)
        result = pb.OpenResult(session_id=session_id, trainable_parameters=count)
        return pb.SessionResponse(open=result), {}

    async def _close(self) -> None:
        if self._session is None:
            return
        session, self._session = self._session, None
        await asyncio.shield(asyncio.wrap_future(self._registry.close(session)))
        logger.info("session closed", extra={"session": session.session_id})

    async def _write(
        self, response: pb.SessionResponse, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        # One message's frames may interleave with another's, one frame's bytes may not.
        for frame in to_frames(response, tensors):
            async with self._write_lock:
                self._writing = asyncio.ensure_future(self._send(frame))
                await asyncio.shield(self._writing)

    async def _finish_write(self) -> None:
        """Waits for the frame that is being written.

        Cancelling its task would not take it back from gRPC, which refuses to send the stream's
        last status while a frame is under way. A client that reads nothing is not waited for long.
        """
        if self._writing is not None:
            await asyncio.wait({self._writing}, timeout=_LAST_WRITE_S)
            if self._writing.done() and not self._writing.cancelled():
                self._writing.exception()  # a client that is gone: nothing is left to tell it

    def _log(self, level: int, message: pb.SessionRequest, text: str, **kwargs: Any) -> None:
        body = getattr(message, message.WhichOneof("body") or "open")
        extra = {
            "session": self._session.session_id if self._session else None,
            "message_id": message.id,
            "request": getattr(body, "request_id", None),
        }
        logger.log(level, text, extra=extra, **kwargs)
