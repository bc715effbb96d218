"""One connection to a session: frames in, answers out, every failure of a request inside it.

The session outlives its connection for a while: what was under way is finished, its answers are
kept, and a client that comes back on a new stream is given them (see :mod:`trunk_service.answers`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import Future

from shared.errors import DrainingError, ProtocolError, ResourceExhaustedError, TrunklineError
from shared.failpoints import reach
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.wire.error_codes import to_message
from shared.wire.formats import Packed
from shared.wire.messages import Inbox, Incoming, to_frames
from trunk_service import translate
from trunk_service.answers import Answer
from trunk_service.execution import Execution
from trunk_service.identity import Peer
from trunk_service.registry import OpenSession, SessionRegistry
from trunk_service.requests import OpenRequest

logger = logging.getLogger(__name__)

Send = Callable[[bytes], Awaitable[None]]

_LAST_WRITE_S = 5.0
# A client that is over a quota is read this much slower, or its refused requests alone would keep
# the trunk busy.
_MAX_PAUSE_S = 0.5

_NEW_WORK = frozenset({"open", "forward", "fetch"})


class SessionStream:
    """Serves one stream from its first frame to its last.

    Args:
        registry: Where sessions live.
        execution: Runs requests and counts them.
        peer: Who the client is.
        send: Writes one frame to the client.
        disconnect: Ends this stream because another has taken the session over.
    """

    def __init__(
        self,
        registry: SessionRegistry,
        execution: Execution,
        peer: Peer,
        send: Send,
        disconnect: Callable[[SessionStream], None],
    ) -> None:
        self._registry, self._execution, self._peer = registry, execution, peer
        self._send, self._disconnect = send, disconnect
        self._write_lock = asyncio.Lock()
        self._writing: asyncio.Future[None] | None = None
        self._in_flight = asyncio.Semaphore(registry.limits.max_requests_in_flight)
        self._session: OpenSession | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._pause_s = 0.0
        self.keeps_session = True
        """Whether the session waits for its client if this stream breaks."""
        registry.quotas.of(peer.tenant)  # known, so that what is counted of it is forgotten too
        info, limits = registry.trunk.info, registry.limits

        def cap(message: pb.SessionRequest) -> int:
            if self._session is None:
                return 0  # whoever has no session yet has nothing to send
            return translate.max_tensor_bytes(message, info, limits)

        forward = pb.SessionRequest(forward=pb.Forward())
        widest = translate.max_tensor_bytes(forward, info, limits)
        self._inbox = Inbox(pb.SessionRequest, cap, max_open_bytes=2 * widest)

    async def serve(self, frames: AsyncIterator[bytes]) -> None:
        """Reads frames until the stream ends, with the session if the client said so.

        Raises:
            ProtocolError: If a frame is no message at all: the stream cannot go on.
        """
        try:
            async for raw in frames:
                self._execution.metrics.bytes_in(self._peer.tenant, len(raw))
                if self._pause_s:
                    pause, self._pause_s = self._pause_s, 0.0
                    await asyncio.sleep(pause)
                incoming = self._inbox.feed(raw)
                if incoming is not None:
                    await self._begin(incoming)
                del raw, incoming  # of an idle client they would stay until its next message
            await asyncio.gather(*self._tasks)
        except ProtocolError:
            self.keeps_session = False
            raise
        finally:
            for task in self._tasks:
                task.cancel()
            # Before anything is waited for: gRPC may cancel this very task meanwhile.
            closing = self._leave()
            await self._finish_write()
            if closing is not None:
                await asyncio.shield(asyncio.wrap_future(closing))

    @property
    def lease_is_over(self) -> bool:
        """True when the client was silent for longer than its session's lease."""
        if self._session is None or self._tasks:
            return False  # what it waits for is not its silence
        return self._session in self._registry.expired()

    @property
    def answering(self) -> bool:
        """True until the answers of all requests that were read have been written."""
        return bool(self._tasks)

    def give_up(self) -> None:
        """Leaves the session to another connection, at once."""
        self._session = None

    async def _begin(self, incoming: Incoming[pb.SessionRequest]) -> None:
        """Starts a request; waits while as many as are allowed are under way."""
        await self._in_flight.acquire()
        try:
            work = await self._answer_of(incoming)
        except TrunklineError as error:
            work = self._refused(incoming.message, error)
        if isinstance(work, pb.SessionResponse):
            try:
                await self._write(work, {})
            finally:
                self._in_flight.release()
            return
        task = asyncio.create_task(self._deliver(incoming.message, work))
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

    async def _answer_of(
        self, incoming: Incoming[pb.SessionRequest]
    ) -> asyncio.Task[Answer] | pb.SessionResponse:
        """The answer of a message that is new, or under way, or was answered before.

        Raises:
            TrunklineError: If the message is refused.
        """
        message, kind = incoming.message, incoming.message.WhichOneof("body")
        if incoming.error is not None:
            raise incoming.error
        assert kind is not None
        if (self._session is None) != (kind == "open"):
            raise ProtocolError(f"{kind} came {'before' if kind != 'open' else 'after an'} open")
        if kind == "close":
            self.keeps_session = False
            return pb.SessionResponse(id=message.id, close=pb.CloseResult())
        self._peer.check()
        if kind == "open":
            # Nothing of the session can start before it is open, so this is not run beside.
            return await self._open(message)
        session = self._session
        assert session is not None
        session.touch()
        session.answers.acknowledge(message.acknowledged)
        known = session.answers.find(message.id, kind)
        if known is not None:
            self._execution.metrics.replayed(self._peer.tenant)
            return known
        if self._registry.draining and kind in _NEW_WORK:
            raise DrainingError(f"the trunk is shutting down and takes no new {kind}")
        if kind == "forward" and message.forward.HasField("state"):
            session.owner.check_push_rate()
        work = self._execution.run(session, message, incoming.tensors)
        return session.answers.start(message.id, kind, work)

    async def _deliver(self, message: pb.SessionRequest, work: asyncio.Task[Answer]) -> None:
        try:
            # Shielded: the work goes on when the stream, and this task with it, is gone.
            response, tensors = await asyncio.shield(work)
        except TrunklineError as error:
            response, tensors = self._refused(message, error), {}
        reach("trunk.answer.before")
        await self._write(response, tensors)
        reach("trunk.answer.after")

    def _refused(self, message: pb.SessionRequest, error: TrunklineError) -> pb.SessionResponse:
        if isinstance(error, ResourceExhaustedError):
            self._pause_s = min(error.retry_after_s, _MAX_PAUSE_S)
        self._execution.note_refusal(self._session, message, error)
        return pb.SessionResponse(id=message.id, error=to_message(error))

    async def _open(self, message: pb.SessionRequest) -> pb.SessionResponse:
        body, tenant = message.open, self._peer.tenant
        if self._registry.draining:
            raise DrainingError("the trunk is shutting down and takes no new open")
        if body.resume_session_id:
            session = self._registry.resume(body.resume_session_id, body.epoch, tenant)
            self._execution.metrics.resumed(tenant)
            logger.info("session resumed", extra={"session": session.session_id, "tenant": tenant})
        else:
            session = await self._new_session(translate.open_request(body))
        self._session = session
        session.disconnect, session.opening = lambda: self._disconnect(self), False
        result = pb.OpenResult(
            session_id=session.session_id,
            epoch=session.epoch,
            max_requests_in_flight=self._registry.limits.max_requests_in_flight,
        )
        return pb.SessionResponse(id=message.id, open=result)

    async def _new_session(self, request: OpenRequest) -> OpenSession:
        tenant = self._peer.tenant
        opened = self._registry.open(request, tenant)
        try:
            session = await self._execution.guard("open", asyncio.wrap_future(opened))
        except asyncio.CancelledError:
            opened.add_done_callback(self._registry.close_late)
            raise
        logger.info("session opened", extra={"session": session.session_id, "tenant": tenant})
        return session

    def _leave(self) -> Future[None] | None:
        """Lets go of the session; returns its closing, unless it waits for its client."""
        session, self._session = self._session, None
        if session is None:
            return None
        session.disconnect = None
        session.touch()
        if self.keeps_session and not self._registry.draining:
            logger.info("session waits for its client", extra={"session": session.session_id})
            return None
        logger.info("session closed", extra={"session": session.session_id})
        return self._registry.close(session)

    async def _write(self, response: pb.SessionResponse, tensors: Mapping[str, Packed]) -> None:
        # A copy, since the answer may be given again and its tensors are announced in it.
        message = pb.SessionResponse()
        message.CopyFrom(response)
        # One message's frames may interleave with another's, one frame's bytes may not.
        for frame in to_frames(message, tensors):
            async with self._write_lock:
                self._writing = asyncio.ensure_future(self._send(frame))
                # Looked at also when whoever waits for it is cancelled: the client is gone then.
                self._writing.add_done_callback(lambda sent: sent.cancelled() or sent.exception())
                await asyncio.shield(self._writing)
            self._execution.metrics.bytes_out(self._peer.tenant, len(frame))

    async def _finish_write(self) -> None:
        """Waits for the frame that is being written.

        Cancelling its task would not take it back from gRPC, which refuses to send the stream's
        last status while a frame is under way. A client that reads nothing is not waited for long.
        """
        if self._writing is not None:
            await asyncio.wait({self._writing}, timeout=_LAST_WRITE_S)
