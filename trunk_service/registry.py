"""The sessions a trunk serves, and what expires when nobody comes back."""

from __future__ import annotations

import ctypes
import logging
import time
import uuid
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from shared.errors import DrainingError, ResourceExhaustedError
from trunk_service.budget import ByteBudget
from trunk_service.limits import Limits
from trunk_service.requests import OpenRequest
from trunk_service.scheduler import Scheduler
from trunk_service.session import TenantSession
from trunk_service.trunk import Trunk

logger = logging.getLogger(__name__)


@dataclass
class OpenSession:
    """A session and when it was last heard of."""

    session_id: str
    tenant: TenantSession
    last_used: float = field(default_factory=time.monotonic)
    freeing: Future[None] | None = None
    """The task that frees its expired requests, once there was one."""

    def touch(self) -> None:
        """Renews the lease."""
        self.last_used = time.monotonic()


class SessionRegistry:
    """Opens, expires and closes sessions; computing happens on the scheduler's threads."""

    def __init__(self, trunk: Trunk, limits: Limits, scheduler: Scheduler) -> None:
        self.trunk, self.limits, self.scheduler = trunk, limits, scheduler
        self.budget = ByteBudget(limits.held_bytes, "trunk's held-state")
        self.draining = False
        self._sessions: dict[str, OpenSession] = {}
        self._opening: set[Future[OpenSession]] = set()
        self._completed_before = 0
        self._completed_at_trim = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, request: OpenRequest) -> Future[OpenSession]:
        """Starts a session on a compute thread.

        Raises:
            DrainingError: If the trunk is shutting down.
            ResourceExhaustedError: If there are as many sessions as are allowed.
        """
        if self.draining:
            raise DrainingError("the trunk is shutting down and opens no session")
        self._opening = {f for f in self._opening if not f.done()}
        count = len(self._sessions) + len(self._opening)
        if count >= self.limits.max_sessions:
            raise ResourceExhaustedError(f"{count} sessions are open, as many as are allowed", 30.0)
        session_id = uuid.uuid4().hex

        def build() -> OpenSession:
            tenant = TenantSession(self.trunk, request, self.limits, self.budget)
            session = OpenSession(session_id, tenant)
            self._sessions[session_id] = session
            return session

        opened = self.scheduler.submit(session_id, build)
        self._opening.add(opened)
        return opened

    def close(self, session: OpenSession) -> Future[None]:
        """Frees a session after the requests it still has in the queue."""

        def free() -> None:
            session.tenant.close()
            self._sessions.pop(session.session_id, None)
            return_freed_memory()

        return self.scheduler.submit(session.session_id, free, over_limit=True)

    def close_late(self, opened: Future[OpenSession]) -> None:
        """Closes a session whose client was gone before it was open."""
        if not opened.cancelled() and opened.exception() is None:
            self.close(opened.result())

    def expired(self) -> list[OpenSession]:
        """Sessions that were silent for longer than their lease."""
        horizon = time.monotonic() - self.limits.session_lease_s
        return [s for s in list(self._sessions.values()) if s.last_used < horizon]

    def free_expired_requests(self) -> None:
        """Frees held state whose backward never came, each on its session's turn."""
        for session in list(self._sessions.values()):
            waiting = session.freeing is not None and not session.freeing.done()
            if session.tenant.held.any_expired and not waiting:
                session.freeing = self.scheduler.submit(
                    session.session_id, partial(_free_expired, session)
                )

    def return_memory_when_idle(self) -> None:
        """Gives freed memory back to the system once nothing was computed since the last call.

        Between the requests of a busy trunk it would only be asked for again at once.
        """
        completed = self.scheduler.completed
        idle = self.scheduler.idle and completed == self._completed_before
        self._completed_before = completed
        if idle and completed != self._completed_at_trim:
            self._completed_at_trim = completed
            return_freed_memory()

    @property
    def holds_state(self) -> bool:
        """True while a forward waits for its backward, or gradients for their step."""
        tenants = [s.tenant for s in list(self._sessions.values())]
        return any(len(t.held) or t.holds_gradients for t in tenants)


def _free_expired(session: OpenSession) -> None:
    for request_id in session.tenant.held.drop_expired():
        extra = {"session": session.session_id, "request": request_id}
        logger.warning("held state expired: no backward came", extra=extra)


def return_freed_memory() -> None:
    """Gives memory that was freed back to the system; glibc would keep it for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
