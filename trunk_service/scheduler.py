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

Tasks that may be done together (:class:`Joint`) are taken together from several sessions, as far as
their heads of line are such, and the time is shared out by their rows.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from shared.errors import DrainingError, ResourceExhaustedError
from trunk_service.returns import Returns

T = TypeVar("T")

OnDone = Callable[[str, float, float], None]


@dataclass(frozen=True)
class Joint:
    """What makes a task one that may be done together with those of other sessions."""

    rows: int
    item: Any
    """Is given to :data:`Together` with those of the others."""


Together = Callable[[Sequence[Any]], Sequence[Callable[[], Any]]]
"""Does several tasks, given their items; returns for each what gives its result, or raises."""


@dataclass
class _Task:
    work: Callable[[], Any]
    future: Future[Any]
    queued_at: float
    joint: Joint | None = None
    taken_at: float = 0.0
    share: float = 1.0
    """Of the time it runs, what it is counted for."""


@dataclass
class _Taken:
    tenant: str
    session: str
    task: _Task


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
        return self.used_s + sum((now - t.taken_at) * t.share for t in self.running.values())

    def next_session(self, without_joint: bool) -> str | None:
        """Whose turn it is; perhaps without those whose next task is a joint one."""
        for session, queue in self.queues.items():
            if session not in self.running and not (without_joint and queue[0].joint):
                return session
        return None


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
        self._together: Together | None = None
        self._max_rows = 0
        self._joining = False
        """Whether tasks are being done together: the next ones that could be wait for that."""
        self._returns = Returns()
        self._changed = threading.Condition()
        self._workers = [
            threading.Thread(target=self._work, name=f"compute-{i}", daemon=True)
            for i in range(workers)
        ]
        for worker in self._workers:
            worker.start()

    def join(self, together: Together, max_rows: int) -> None:
        """Does joint tasks together from now on.

        Args:
            together: What does it, on one compute thread at a time.
            max_rows: Of all tasks that are done at once.
        """
        self._together, self._max_rows = together, max_rows

    @property
    def max_joint_rows(self) -> int:
        """Most rows of joint tasks done at once; 0 when none are."""
        return self._max_rows

    def submit(
        self,
        tenant: str,
        session: str,
        work: Callable[[], T],
        over_limit: bool = False,
        joint: Joint | None = None,
    ) -> Future[T]:
        """Queues a task behind the session's earlier ones.

        Args:
            tenant: Whose compute time it uses.
            session: Whose earlier tasks come first.
            work: Runs on a compute thread.
            over_limit: Queue it however many wait: for freeing, which must not be refused.
            joint: Given if it may be done together with others instead of by ``work``.

        Raises:
            ResourceExhaustedError: If too many tasks of this session wait already.
            DrainingError: If the scheduler is stopping.
        """
        task = _Task(work, Future(), self._clock(), joint)
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
            self._returns.came(session, task.queued_at, joint is not None)
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
        while (found := self._take()) is not None:
            taken, threads = found
            if self._adaptive:
                torch.set_num_threads(threads)
            ran = self._run([one.task for one in taken])
            with self._changed:
                computed_s = [self._leave(one) for one in taken]
                self._completed += len(taken)
                self._changed.notify_all()
            if self._on_done is not None:
                for one, did, seconds in zip(taken, ran, computed_s, strict=True):
                    if did:
                        waited_s = one.task.taken_at - one.task.queued_at
                        self._on_done(one.tenant, waited_s, seconds)
                    del one
            del found, taken  # and its tensors, while nothing else is to be done

    def _take(self) -> tuple[list[_Taken], int] | None:
        """Waits for tasks whose sessions are not being served; None when stopping.

        Returns:
            Tasks to do together, or one, and the threads to do it with when those vary.
        """
        with self._changed:
            while True:
                now = self._clock()
                wait_s = self._returns.wait_s(now) if self._can_wait else 0.0
                ready = self._ready(now, without_joint=self._joining or wait_s > 0)
                if ready:
                    first = self._take_from(*ready[0], now)
                    taken = [first, *self._others(first, now)]
                    alone = self._sessions == len(taken)
                    return taken, self._threads_per_worker if alone else 1
                if self._stopping and not any(t.queues for t in self._tenants.values()):
                    return None
                self._changed.wait(wait_s or None)

    def _ready(self, now: float, without_joint: bool) -> list[tuple[str, str]]:
        """Tenants whose turn it could be, the least served first, each with its next session."""
        ready = [
            (tenant.used_by(now), place, name, session)
            for place, (name, tenant) in enumerate(self._tenants.items())
            if (session := tenant.next_session(without_joint)) is not None
        ]
        return [(name, session) for _, _, name, session in sorted(ready)]

    @property
    def _can_wait(self) -> bool:
        """Whether a joint task waits that others could still be done with."""
        waiting = self._waiting_joints()
        rows = sum(task.joint.rows for _, _, task in waiting if task.joint is not None)
        return bool(waiting) and not self._stopping and rows < self._max_rows

    def _waiting_joints(self) -> list[tuple[str, str, _Task]]:
        return [
            (name, session, queue[0])
            for name, tenant in self._tenants.items()
            for session, queue in tenant.queues.items()
            if queue[0].joint is not None and session not in tenant.running
        ]

    def _others(self, first: _Taken, now: float) -> list[_Taken]:
        """Takes what can be done together with a task, of the least served tenants first."""
        if first.task.joint is None or self._together is None:
            return []
        rows, others = first.task.joint.rows, list[_Taken]()
        used = {name: tenant.used_by(now) for name, tenant in self._tenants.items()}
        for name, session, task in sorted(self._waiting_joints(), key=lambda w: used[w[0]]):
            assert task.joint is not None
            if rows + task.joint.rows <= self._max_rows:
                rows += task.joint.rows
                others.append(self._take_from(name, session, now))
        for one in (first, *others) if others else ():
            assert one.task.joint is not None
            one.task.share = one.task.joint.rows / rows
            self._joining = True
        return others

    def _take_from(self, name: str, session: str, now: float) -> _Taken:
        tenant = self._tenants[name]
        self._tenants.move_to_end(name)
        queue = tenant.queues.pop(session)
        task = queue.popleft()
        if queue:
            tenant.queues[session] = queue  # at the end: the other sessions' turn comes first
        task.taken_at = now
        tenant.running[session] = task
        return _Taken(name, session, task)

    def _run(self, tasks: list[_Task]) -> list[bool]:
        """Runs tasks; tells of each whether it did, since one that was cancelled does not."""
        if len(tasks) == 1:
            return [_run(tasks[0])]
        started = [task.future.set_running_or_notify_cancel() for task in tasks]
        live = [task for task, runs in zip(tasks, started, strict=True) if runs]
        assert self._together is not None
        try:
            results = self._together([task.joint.item for task in live if task.joint])
        except BaseException as error:
            for task in live:
                task.future.set_exception(error)
        else:
            for task, result in zip(live, results, strict=True):
                _settle(task.future, result)
        return started

    @property
    def _sessions(self) -> int:
        """How many run or wait."""
        return sum(len({*t.queues, *t.running}) for t in self._tenants.values())

    def _enter(self, name: str) -> _Tenant:
        """The tenant, whose compute time is no less than that of those who are being served."""
        self._raise_floor(self._clock())
        tenant = self._tenants.setdefault(name, _Tenant(self._floor_s))
        if not tenant.active:
            tenant.used_s = max(tenant.used_s, self._floor_s)
        return tenant

    def _leave(self, one: _Taken) -> float:
        """Counts the time of a task that has ended; returns it."""
        now, tenant = self._clock(), self._tenants[one.tenant]
        self._raise_floor(now)
        took_s = now - tenant.running.pop(one.session).taken_at
        computed_s = took_s * one.task.share
        tenant.used_s += computed_s
        if one.task.joint is not None:
            self._joining = self._joining and one.task.share == 1.0
            self._returns.answered(one.session, now, took_s)
            if (queue := tenant.queues.get(one.session)) is not None:
                self._returns.came(one.session, now, queue[0].joint is not None)
        for other in [n for n, t in self._tenants.items() if not t.active]:
            # It would come back at the floor, so that nothing is lost with it.
            if self._tenants[other].used_s <= self._floor_s:
                del self._tenants[other]
        return computed_s

    def _raise_floor(self, now: float) -> None:
        active = [t.used_by(now) for t in self._tenants.values() if t.active]
        self._floor_s = max(self._floor_s, min(active, default=0.0))


def _run(task: _Task) -> bool:
    if not task.future.set_running_or_notify_cancel():
        return False
    _settle(task.future, task.work)
    return True


def _settle(future: Future[Any], work: Callable[[], Any]) -> None:
    try:
        result = work()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
