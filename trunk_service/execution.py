"""Runs the requests of sessions on the compute threads, and turns what goes wrong into answers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from typing import Any, TypeVar

import torch

from shared.errors import ResourceExhaustedError, TrunkInternalError, TrunklineError
from shared.failpoints import reach
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.wire.error_codes import short, to_message
from trunk_service.answers import Answer
from trunk_service.handlers import HANDLERS
from trunk_service.joint_forwards import joint_forward
from trunk_service.metrics import TrunkMetrics
from trunk_service.registry import OpenSession
from trunk_service.scheduler import Scheduler
from trunk_service.tracing import span

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_ID_CHARS = 100


class Execution:
    """Requests of open sessions, from the message to its answer.

    Args:
        scheduler: The compute threads.
        metrics: Counts what happens.
    """

    def __init__(self, scheduler: Scheduler, metrics: TrunkMetrics) -> None:
        self._scheduler = scheduler
        self.metrics = metrics

    async def run(
        self, session: OpenSession, message: pb.SessionRequest, tensors: dict[str, torch.Tensor]
    ) -> Answer:
        """Computes a request's answer.

        Raises:
            TrunklineError: If it is refused, or failed; the session goes on.
        """
        kind = message.WhichOneof("body")
        assert kind is not None
        owner, body, handler = session.owner, getattr(message, kind), HANDLERS[kind]
        started = time.monotonic()
        joint = None
        if kind == "forward":
            joint = joint_forward(session, body, tensors, self._scheduler.max_joint_rows)

        def work() -> Answer:
            nonlocal started
            started = time.monotonic()
            with span(kind, owner.tenant, bytes=sum(t.nbytes for t in tensors.values())):
                reach(f"trunk.{kind}.before")
                answer = handler(session.state, body, tensors)
                reach(f"trunk.{kind}.after")
            return answer

        owner.enter_request()
        try:
            submitted = self._scheduler.submit(owner.tenant, session.session_id, work, joint=joint)
            response, sent = await self.guard(kind, asyncio.wrap_future(submitted))
        finally:
            owner.leave_request()
        computed_s = time.monotonic() - started
        if joint is not None and joint.item.computed_s:
            computed_s = joint.item.computed_s
        self.metrics.request_done(owner.tenant, kind, "OK", computed_s)
        if kind == "forward" and body.HasField("state"):
            self.metrics.pushed(owner.tenant)
        response.id = message.id
        return response, sent

    async def guard(self, kind: str, work: Awaitable[T]) -> T:
        """Waits for work; what nobody raised on purpose becomes an error that names no details.

        Raises:
            TrunklineError: What was raised on purpose.
            ResourceExhaustedError: If memory ran out.
            TrunkInternalError: If anything else went wrong; it is in the log.
        """
        try:
            return await work
        except TrunklineError:
            raise
        except (MemoryError, torch.OutOfMemoryError) as exhausted:
            logger.warning("no memory for a request", extra={"kind": kind})
            raise ResourceExhaustedError(f"no memory for this {kind}") from exhausted
        except Exception as error:
            logger.exception("request failed", extra={"kind": kind})
            raise TrunkInternalError(f"{kind} failed; see the trunk's log") from error

    def note_refusal(
        self, session: OpenSession | None, message: pb.SessionRequest, error: TrunklineError
    ) -> None:
        """Counts and logs a request that got an error."""
        kind = message.WhichOneof("body") or "open"
        code = pb.ErrorCode.Name(to_message(error).code).removeprefix("ERROR_CODE_")
        self.metrics.rejected(code)
        if session is not None:
            self.metrics.request_done(session.owner.tenant, kind, code, 0.0)
        body: Any = getattr(message, kind)
        extra = {
            "session": session.session_id if session else None,
            "message_id": message.id,
            "request": getattr(body, "request_id", "")[:_MAX_ID_CHARS] or None,
        }
        logger.info("refused: %s: %s", type(error).__name__, short(error), extra=extra)
