"""Compute workers behind a bounded queue: fair between tenants, in order within one.

A worker takes the next task of the tenant whose turn it is. Tasks of one tenant never overlap, so
its session needs no locks and its requests are answered in the order they came.

The number of threads a task computes with changes the order of floating-point sums. With a fixed
number of workers it never changes, and a tenant's numbers do not depend on who else is served.
``adaptive`` gives that up for throughput: a lone tenant gets all threads, and when several wait,
each runs on one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from shared.errors import DrainingError, ResourceExhaustedError

T = TypeVar("T")


@dataclass
class _Task:
    work: Callable[[], Any]
    future: Future[Any]


class Scheduler:
    """Runs tenants' tasks on compute threads.

    Args:
        workers: Compute threads.
        threads_per_worker: Threads torch uses inside one task.
        max_queued_per_tenant: Tasks of one tenant that may wait.
        adaptive: Vary the threads of a task with the load (see the module's text).
    """

    def __init__(
        self,
        workers: int,
        threads_per_worker: int,
        max_queued_per_tenant: int = 64,
        adaptive: bool = False,
    ) -> None:
        self._threads_per_worker = threads_per_worker
        self._max_queued = max_queued_per_tenant
        self._adaptive = adaptive
        self._queues: OrderedDict[str, deque[_Task]] = OrderedDict()
        self._busy: set[str] = set()
        self._stopping = False
        self._completed = 0
        self._changed = threading.Condition()
        self._workers = [
            threading.Thread(target=self._work, name=f"compute-{i}", daemon=True)
            for i in range(workers)
        ]
        for worker in self._workers:
            worker.start()

    def submit(self, tenant: str, work: Callable[[], T], over_limit: bool = False) -> Future[T]:
        """Queues a task behind the tenant's earlier ones.

        Args:
            tenant: Whose turn it takes.
            work: Runs on a compute thread.
            over_limit: Queue it however many wait: for freeing, which must not be refused.

        Raises:
            ResourceExhaustedError: If too many tasks of this tenant wait already.
            DrainingError: If the scheduler is stopping.
        """
        task = _Task(work, Future())
        with self._changed:
            if self._stopping:
                raise DrainingError("the trunk is shutting down")
            queue = self._queues.setdefault(tenant, deque())
            if len(queue) >= self._max_queued and not over_limit:
                raise ResourceExhaustedError(
                    f"{len(queue)} requests of this session wait already", retry_after_s=0.5
                )
            queue.append(task)
            self._changed.notify()
        return task.future

    @property
    def completed(self) -> int:
        """Tasks done so far."""
        return self._completed

    @property
    def idle(self) -> bool:
        """True when nothing waits or runs."""
        with self._changed:
            return not self._busy and not self._queues

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
            tenant, task, threads = taken
            if self._adaptive:
                torch.set_num_threads(threads)
            _run(task)
            with self._changed:
                self._busy.discard(tenant)
                self._completed += 1
                self._changed.notify_all()

    def _take(self) -> tuple[str, _Task, int] | None:
        """Waits for a task whose tenant is not being served; None when stopping."""
        with self._changed:
            while True:
                tenant = next((t for t in self._queues if t not in self._busy), None)
                if tenant is not None:
                    return self._take_from(tenant)
                if self._stopping and not self._queues:
                    return None
                self._changed.wait()

    def _take_from(self, tenant: str) -> tuple[str, _Task, int]:
        queue = self._queues.pop(tenant)
        task = queue.popleft()
        if queue:
            self._queues[tenant] = queue  # at the end: the others' turn comes first
        self._busy.add(tenant)
        alone = len(self._busy) == 1 and not (self._queues.keys() - self._busy)
        return tenant, task, self._threads_per_worker if alone else 1


def _run(task: _Task) -> None:
    if not task.future.set_running_or_notify_cancel():
        return
    try:
        result = task.work()
    except BaseException as error:
        task.future.set_exception(error)
    else:
        task.future.set_result(result)
