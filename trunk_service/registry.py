"""The sessions a trunk serves, and what expires when nobody comes back."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import torch

from shared.errors import (
    DrainingError,
    ResourceExhaustedError,
    StaleSessionError,
    UnknownSessionError,
)
from shared.failpoints import reach
from shared.freed_memory import return_freed_memory
from trunk_service.answers import KeptAnswers
from trunk_service.budget import ByteBudget
from trunk_service.limits import Limits
from trunk_service.metrics import TrunkMetrics
from trunk_service.quotas import TenantQuota, TenantQuotas
from trunk_service.requests import OpenRequest
from trunk_service.scheduler import Scheduler
from trunk_service.session import TenantSession
from trunk_service.trunk import Trunk

logger = logging.getLogger(__name__)

# Answers that wait for a client to come back and fetch them, in bytes of one session.
_KEPT_ANSWER_BYTES = 64 * 1024**2

# How long they are kept where the connection seems to live: a backward's is as large as the
# adapter, and its client may be idle for hours.
_KEPT_ANSWER_S = 5.0


@dataclass
class OpenSession:
    """A session, whose it is, and when it was last heard of."""

    session_id: str
    owner: TenantQuota
    state: TenantSession
    answers: KeptAnswers
    epoch: int = 1
    """Grows with every connection; only the newest may change the session."""
    disconnect: Callable[[], None] | None = None
    """Ends the connection that has the session now; None while it waits for one."""
    opening: bool = True
    """Until its first connection knows of it."""
    last_used: float = field(default_factory=time.monotonic)
    freeing: Future[None] | None = None
    """The task that frees its expired requests, once there was one."""

    @property
    def attached(self) -> bool:
        """Whether a connection has it."""
        return self.opening or self.disconnect is not None

    def touch(self) -> None:
        """Renews the lease."""
        self.last_used = time.monotonic()


class SessionRegistry:
    """Opens, resumes, expires and closes sessions; computing happens on the scheduler's threads."""

    def __init__(self, trunk: Trunk, limits: Limits, scheduler: Scheduler) -> None:
        self.trunk, self.limits, self.scheduler = trunk, limits, scheduler
        self.metrics = TrunkMetrics()
        self.budget = ByteBudget(limits.held_bytes, "trunk's held-state")
        self.quotas = TenantQuotas(limits, self.budget)
        self.draining = False
        self._sessions: dict[str, OpenSession] = {}
        self._opening: set[Future[OpenSession]] = set()
        self._completed_before = self._completed_at_trim = 0
        self._idle_since = time.monotonic()

    def __len__(self) -> int:
        return len(self._sessions)

    def sessions(self) -> list[OpenSession]:
        """All sessions, with a connection or waiting for one."""
        return list(self._sessions.values())

    def open(self, request: OpenRequest, tenant: str) -> Future[OpenSession]:
        """Starts a session on a compute thread.

        Raises:
            DrainingError: If the trunk is shutting down.
            ResourceExhaustedError: If there are as many sessions as are allowed.
        """
        if self.draining:
            raise DrainingError("the trunk is shutting down and opens no session")
        owner = self.quotas.of(tenant)
        self._make_room(owner)
        session_id = uuid.uuid4().hex
        kept = KeptAnswers(2 * self.limits.max_requests_in_flight, _KEPT_ANSWER_BYTES)

        def build() -> OpenSession:
            reach("trunk.open.before")
            try:
                state = TenantSession(self.trunk, request, self.limits, owner)
            except BaseException:
                owner.remove_session()
                raise
            session = OpenSession(session_id, owner, state, kept)
            self._sessions[session_id] = session
            reach("trunk.open.after")
            return session

        try:
            opened = self.scheduler.submit(tenant, session_id, build)
        except BaseException:
            owner.remove_session()
            raise
        opened.add_done_callback(lambda f: owner.remove_session() if f.cancelled() else None)
        self._opening.add(opened)
        return opened

    def resume(self, session_id: str, epoch: int, tenant: str) -> OpenSession:
        """Gives a session to a new connection; the one that had it is ended.

        Raises:
            UnknownSessionError: If this tenant has none of this id.
            StaleSessionError: If a newer connection has it.
        """
        session = self._sessions.get(session_id)
        if session is None or session.owner.tenant != tenant:
            raise UnknownSessionError(f"no session {session_id[:64]!r}")
        if epoch <= session.epoch:
            raise StaleSessionError(
                f"epoch {epoch} of session {session_id} is over; it is at {session.epoch}"
            )
        if session.disconnect is not None:
            session.disconnect()
        session.epoch = epoch
        session.touch()
        return session

    def close(self, session: OpenSession) -> Future[None]:
        """Frees a session after the requests it still has in the queue."""
        # Nobody can resume it from here on; what it holds is freed on its turn.
        known = self._sessions.pop(session.session_id, None) is not None
        session.answers.forget_all()

        def free() -> None:
            session.state.close()
            if known:
                session.owner.remove_session()

        return self.scheduler.submit(
            session.owner.tenant, session.session_id, free, over_limit=True
        )

    def close_late(self, opened: Future[OpenSession]) -> None:
        """Closes a session whose client was gone before it was open."""
        if not opened.cancelled() and opened.exception() is None:
            self.close(opened.result())

    def expired(self) -> list[OpenSession]:
        """Sessions that were silent for longer than their lease."""
        horizon = time.monotonic() - self.limits.session_lease_s
        return [s for s in self.sessions() if s.last_used < horizon]

    def close_abandoned(self) -> None:
        """Closes the sessions to which no client came back in time."""
        horizon = time.monotonic() - self.limits.resume_window_s
        for session in self.sessions():
            if not session.attached and session.last_used < horizon:
                logger.info("session abandoned", extra={"session": session.session_id})
                self.close(session)

    def forget_old_answers(self) -> None:
        """Forgets what was answered a while ago to clients that are here."""
        for session in self.sessions():
            if session.attached:
                session.answers.forget_older(_KEPT_ANSWER_S)

    def free_expired_requests(self) -> None:
        """Frees held state whose backward never came, each on its session's turn."""
        for session in self.sessions():
            waiting = session.freeing is not None and not session.freeing.done()
            if session.state.held.any_expired and not waiting:
                session.freeing = self.scheduler.submit(
                    session.owner.tenant, session.session_id, partial(_free_expired, session)
                )

    def return_memory_when_idle(self) -> None:
        """Gives freed memory back to the system once nothing was computed for long enough.

        Between the requests of a busy trunk it would only be asked for again at once, and a client
        may compute its own share of a step, evaluate or write a checkpoint for many seconds. Pages
        are dear to take again, most of all where a hypervisor has them meanwhile.
        """
        completed, now = self.scheduler.completed, time.monotonic()
        if not self.scheduler.idle or completed != self._completed_before:
            self._completed_before, self._idle_since = completed, now
        due = now - self._idle_since >= self.limits.return_memory_after_s
        if due and completed != self._completed_at_trim:
            self._completed_at_trim = completed
            return_freed_memory()
            if torch.cuda.is_initialized():
                # Not whenever a session ends: it waits for all that the device computes.
                torch.cuda.empty_cache()

    @property
    def holds_state(self) -> bool:
        """True while a forward waits for its backward."""
        return any(len(s.state.held) for s in self.sessions() if s.attached)

    def _make_room(self, owner: TenantQuota) -> None:
        """Counts one more session; those that wait for a client make room for one that is here."""
        try:
            owner.add_session()
        except ResourceExhaustedError:
            if not self._close_oldest(owner):
                raise
            # Its place is free once the compute thread has closed it; that is soon.
            raise ResourceExhaustedError(
                "this tenant has as many sessions as are allowed; one that lost its client is "
                "being closed",
                retry_after_s=0.5,
            ) from None
        self._opening = {f for f in self._opening if not f.done()}
        count = len(self._sessions) + len(self._opening)
        full = count >= self.limits.max_sessions
        # A tenant's own first: nobody pushes out others' as long as it has some itself.
        if full and not (self._close_oldest(owner) or self._close_oldest(None)):
            owner.remove_session()
            raise ResourceExhaustedError(f"{count} sessions are open, as many as are allowed", 30.0)

    def _close_oldest(self, owner: TenantQuota | None) -> bool:
        waiting = [s for s in self.sessions() if not s.attached]
        if owner is not None:
            waiting = [s for s in waiting if s.owner is owner]
        if not waiting:
            return False
        self.close(min(waiting, key=lambda s: s.last_used))
        return True


def _free_expired(session: OpenSession) -> None:
    for request_id in session.state.held.drop_expired():
        extra = {"session": session.session_id, "request": request_id}
        logger.warning("held state expired: no backward came", extra=extra)
