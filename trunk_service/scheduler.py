"""Compute workers behind bounded queues: fair between tenants, in order within a session.

A worker takes the next task of the tenant that has used the least compute time, and among that
tenant's sessions of the one whose turn it is. Tasks of one session never overlap, so it needs no
locks and its requests are answered in the order they came.

Compute time is counted as in start-time fair queueing: every tenant has a sum of the seconds that
its tasks ran. One that comes back starts at the least sum of those who are being served, if that
is more than its own: nobody saves up time by being away, and nobody loses a debt by it.

The number of threads a task computes with changes the order of floating-point sums. With a fixed
number of workers it never changes, and a tenant's numbers do not depend on who else is served.
``adaptive`` gives that up for throughput: a lone session gets all threads, and when several wait,
each runs on one.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from shared.errors import DrainingError, ResourceExhaustedError

T = TypeVar("T")

OnDone = Callable[[str, float, float], None]


@dataclass
class _Task:
    work: Callable[[], Any]
    future: Future[Any]
    queued_at: float
    taken_at: float = 0.0


@dataclass
class _Tenant:
    used_s: float
    """Seconds its finished tasks ran, or those of others that it was moved up to."""
    queues: OrderedDict[str, deque[_Task]] = field(default_factory=OrderedDict)
    """Waiting tasks by session, the session whose turn it is first."""
    running: dict[str, _Task] = field(default_factory=dict)
    """The task of each session that is being computed."""

    @property
    def active(self) -> bool:
        return bool(self.queues or self.running)

    def used_by(self, now: float) -> float:
        """Seconds used up to now, by what still runs too."""
        return self.used_s + sum(now - task.taken_at for task in self.running.values())

    def next_session(self) -> str | None:
        return next((s for s in self.queues if s not in self.running), None)


class Scheduler:
    """Runs the tasks of tenants' sessions on compute threads.

    Args:
        workers: Compute threads.
        threads_per_worker: Threads torch uses inside one task.
        max_queued: Tasks of one session that may wait.
        adaptive: Vary the threads of a task with the load (see the module's text).
        clock: Tells the time in seconds.
    """

    def __init__(
        self,
        workers: int,
        threads_per_worker: int,
        max_queued: int = 64,
        adaptive: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._threads_per_worker = threads_per_worker
        self._max_queued = max_queued
        self._adaptive = adaptive
        self._clock = clock
        # The tenant that was served last is the last one: among equals, the others come first.
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()
        self._floor_s = 0.0
        self._stopping = False
        self._completed = 0
        self._on_done: OnDone | None = None
        self._changed = threading.Condition()
        self._workers = [
            threading.Thread(target=self._work, name=f"compute-{i}", daemon=True)
            for i in range(workers)
        ]
        for worker in self._workers:
            worker.start()

    def submit(
        self, tenant: str, session: str, work: Callable[[], T], over_limit: bool = False
    ) -> Future[T]:
        """Queues a task behind the session's earlier ones.

        Args:
            tenant: Whose compute time it uses.
            session: Whose earlier tasks come first.
            work: Runs on a compute thread.
            over_limit: Queue it however many wait: for freeing, which must not be refused.

        Raises:
            ResourceExhaustedError: If too many tasks of this session wait already.
            DrainingError: If the scheduler is stopping.
        """
        task = _Task(work, Future(), self._clock())
        with self._changed:
            if self._stopping:
                raise DrainingError("the trunk is shutting down")
            known = self._tenants.get(tenant)
            waiting = len(known.queues.get(session, ())) if known else 0
            if waiting >= self._max_queued and not over_limit:
                raise ResourceExhaustedError(
                    f"{waiting} requests of this session wait already", retry_after_s=0.5
                )
            self._enter(tenant).queues.setdefault(session, deque()).append(task)
            self._changed.notify()
        return task.future

    def observe(self, on_done: OnDone) -> None:
        """Sets what is told of every task that ran.

        Args:
            on_done: Called on the compute thread with the tenant, the seconds the task waited and
                the seconds it ran; must not raise.
        """
        self._on_done = on_done

    def queue_depths(self) -> dict[str, int]:
        """Tasks that wait, by tenant; only tenants that are being served."""
        with self._changed:
            return {
                name: sum(map(len, tenant.queues.values()))
                for name, tenant in self._tenants.items()
                if tenant.active
            }

    @property
    def completed(self) -> int:
        """Tasks done so far."""
        return self._completed

    @property
    def idle(self) -> bool:
        """True when nothing waits or runs."""
        with self._changed:
            return not any(tenant.active for tenant in self._tenants.values())

    def stop(self) -> None:
        """Finishes what is queued, then ends the workers."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for worker in self._workers:
            worker.join()

    def _work(self) -> None:
        torch.set_num_threads(self._threads_per_worker)
        while (taken := self._take()) is not None:
            tenant, session, task, threads = taken
            if self._adaptive:
                torch.set_num_threads(threads)
            ran = _run(task)
            with self._changed:
                computed_s = self._leave(tenant, session)
                self._completed += 1
                self._changed.notify_all()
            if ran and self._on_done is not None:
                self._on_done(tenant, task.taken_at - task.queued_at, computed_s)
            del taken, task  # and its tensors, while nothing else is to be done

    def _take(self) -> tuple[str, str, _Task, int] | None:
        """Waits for a task whose session is not being served; None when stopping."""
        with self._changed:
            while True:
                now = self._clock()
                ready = [
                    (tenant.used_by(now), place, name, session)
                    for place, (name, tenant) in enumerate(self._tenants.items())
                    if (session := tenant.next_session()) is not None
                ]
                if ready:
                    _, _, name, session = min(ready)
                    return name, session, *self._take_from(name, session, now)
                if self._stopping and not any(t.queues for t in self._tenants.values()):
                    return None
                self._changed.wait()

    def _take_from(self, name: str, session: str, now: float) -> tuple[_Task, int]:
        tenant = self._tenants[name]
        self._tenants.move_to_end(name)
        queue = tenant.queues.pop(session)
        task = queue.popleft()
        if queue:
            tenant.queues[session] = queue  # at the end: the other sessions' turn comes first
        task.taken_at = now
        tenant.running[session] = task
        return task, self._threads_per_worker if self._alone else 1

    @property
    def _alone(self) -> bool:
        """Whether one session runs and no other waits."""
        sessions = {
            (name, session)
            for name, tenant in self._tenants.items()
            for session in (*tenant.queues, *tenant.running)
        }
        return len(sessions) == 1

    def _enter(self, name: str) -> _Tenant:
        """The tenant, whose compute time is no less than that of those who are being served."""
        self._raise_floor(self._clock())
        tenant = self._tenants.setdefault(name, _Tenant(self._floor_s))
        if not tenant.active:
            tenant.used_s = max(tenant.used_s, self._floor_s)
        return tenant

    def _leave(self, name: str, session: str) -> float:
        """Counts the time of a task that has ended; returns it."""
        now, tenant = self._clock(), self._tenants[name]
        self._raise_floor(now)
        computed_s = now - tenant.running.pop(session).taken_at
        tenant.used_s += computed_s
        for other in [n for n, t in self._tenants.items() if not t.active]:
            # It would come back at the floor, so that nothing is lost with it.
            if self._tenants[other].used_s <= self._floor_s:
                del self._tenants[other]
        return computed_s

    def _raise_floor(self, now: float) -> None:
        active = [t.used_by(now) for t in self._tenants.values() if t.active]
        self._floor_s = max(self._floor_s, min(active, default=0.0))


def _run(task: _Task) -> bool:
    """Runs a task; tells whether it did, since one that was cancelled does not."""
    if not task.future.set_running_or_notify_cancel():
        return False
    try:
        result = task.work()
    except BaseException as error:
        task.future.set_exception(error)
    else:
        task.future.set_result(result)
    return True
