"""Which tasks a worker takes together, how their time is shared out, and whom it waits for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from tests.patience import PATIENCE_S
from tests.unit.test_trunk_pieces import Clock
from trunk_service.returns import Returns
from trunk_service.scheduler import Joint, Scheduler


class Crowd:
    """A scheduler of one worker that is held until everything is submitted."""

    def __init__(self, max_rows: int) -> None:
        self.clock, self.batches = Clock(), list[list[str]]()
        self.scheduler = Scheduler(workers=1, threads_per_worker=1, clock=self.clock)
        self.scheduler.join(self._together, max_rows)
        self.told = list[tuple[str, float]]()
        self.scheduler.observe(lambda tenant, _, ran: self.told.append((tenant, ran)))
        self._gate, started = threading.Event(), threading.Event()
        self.scheduler.submit("gate", "gate", lambda: (started.set(), self._gate.wait()))
        assert started.wait(PATIENCE_S)

    def _together(self, items: Any) -> list[Any]:
        self.batches.append(list(items))
        self.clock.now += 1.0
        return [lambda item=item: self._result(item) for item in items]

    def _result(self, item: str) -> str:
        if item.startswith("bad"):
            raise ValueError(item)
        return item

    def submit(self, name: str, rows: int = 1, joint: bool = True) -> Future[str]:
        def work() -> str:
            self.batches.append([name])
            self.clock.now += 1.0
            return self._result(name)

        how = Joint(rows, name) if joint else None
        return self.scheduler.submit(name[:-1], name[:-1], work, joint=how)

    def run(self) -> list[list[str]]:
        self._gate.set()
        self.scheduler.stop()
        return self.batches


def test_heads_of_lines_are_taken_together_as_far_as_the_rows_go() -> None:
    crowd = Crowd(max_rows=3)
    for name in ("a0", "b0", "c0", "d0"):
        crowd.submit(name)
    assert crowd.run() == [["a0", "b0", "c0"], ["d0"]]


def test_a_session_keeps_its_order_and_what_is_not_joint_stays_alone() -> None:
    crowd = Crowd(max_rows=8)
    crowd.submit("a0", joint=False)
    for name in ("a1", "b0", "b1", "c0"):
        crowd.submit(name)
    assert crowd.run() == [["a0"], ["b0", "c0", "a1"], ["b1"]]


def test_time_is_shared_out_by_rows() -> None:
    crowd = Crowd(max_rows=8)
    crowd.submit("a0", rows=3)
    crowd.submit("b0")
    crowd.run()
    assert crowd.told[-2:] == [("a", 0.75), ("b", 0.25)]


def test_a_failure_is_that_tasks_own() -> None:
    crowd = Crowd(max_rows=8)
    futures = [crowd.submit(name) for name in ("a0", "bad0", "c0")]
    futures.append(crowd.submit("d0"))
    assert futures[3].cancel()
    assert crowd.run() == [["a0", "bad0", "c0"]]
    assert [futures[0].result(0), futures[2].result(0)] == ["a0", "c0"]
    assert isinstance(futures[1].exception(0), ValueError)
    assert crowd.scheduler.idle


def test_one_alone_is_done_as_ever() -> None:
    crowd = Crowd(max_rows=8)
    future = crowd.submit("a0")
    assert crowd.run() == [["a0"]]
    assert future.result(0) == "a0"


def test_tasks_are_done_together_on_one_thread_at_a_time() -> None:
    scheduler = Scheduler(workers=2, threads_per_worker=1)
    inside, go_on, batches = threading.Event(), threading.Event(), list[list[str]]()

    def together(items: Any) -> list[Any]:
        batches.append(list(items))
        inside.set()
        assert go_on.wait(PATIENCE_S)
        return [str for _ in items]

    scheduler.join(together, 2)
    gate, held = threading.Event(), threading.Barrier(3)
    for worker in "xy":
        scheduler.submit(worker, worker, lambda: (held.wait(PATIENCE_S), gate.wait()))
    held.wait(PATIENCE_S)
    for name in "abcd":
        scheduler.submit(name, name, str, joint=Joint(1, name))
    gate.set()
    assert inside.wait(PATIENCE_S)
    plain = scheduler.submit("e", "e", lambda: len(batches))
    assert plain.result(PATIENCE_S) == 1  # the other thread does this, and leaves the joint ones
    go_on.set()
    scheduler.stop()
    assert batches == [["a", "b"], ["c", "d"]]


@pytest.fixture
def returns() -> Iterator[Returns]:
    yield Returns()


def test_who_is_quick_is_waited_for_and_who_is_not_is_not(returns: Returns) -> None:
    returns.answered("quick", 0.0, took_s=0.2)
    assert returns.wait_s(0.05) == pytest.approx(0.1)  # three quarters at most
    returns.came("quick", 0.1)
    assert returns.wait_s(0.1) == 0.0
    returns.answered("quick", 1.0, took_s=0.2)
    returns.answered("slow", 1.0, took_s=0.2)
    returns.came("slow", 1.2)
    returns.answered("slow", 1.3, took_s=0.2)
    assert returns.wait_s(1.3) == 0.0
    returns.came("quick", 1.3)
    returns.answered("quick", 1.4, took_s=0.2)
    assert returns.wait_s(1.4) == 0.0  # it took three tenths of a second the last time


def test_nobody_is_waited_for_longer_than_a_quarter_of_a_second(returns: Returns) -> None:
    returns.answered("quick", 0.0, took_s=60.0)
    assert returns.wait_s(0.0) == pytest.approx(0.25)


def test_who_asks_for_something_else_is_not_waited_for_and_no_quicker(returns: Returns) -> None:
    returns.answered("slow", 0.0, took_s=0.2)
    returns.came("slow", 0.01, joint=False)
    assert returns.wait_s(0.01) == 0.0
    returns.came("slow", 0.5)
    returns.answered("slow", 0.6, took_s=0.2)
    returns.came("slow", 0.61, joint=False)
    returns.answered("slow", 0.7, took_s=0.2)
    assert returns.wait_s(0.7) == 0.0


def test_whose_next_token_waits_already_is_not_waited_for() -> None:
    """Else a client that sends several ahead would hold up the others after each of them."""
    crowd = Crowd(max_rows=3)
    ahead = [crowd.submit(name) for name in ("a0", "a1", "a2")]
    crowd._gate.set()
    # By this clock no time passes while the worker waits: it would wait for good.
    assert [future.result(PATIENCE_S) for future in ahead] == ["a0", "a1", "a2"]
    assert crowd.run() == [["a0"], ["a1"], ["a2"]]


def test_who_does_not_come_back_is_forgotten(returns: Returns) -> None:
    returns.answered("gone", 0.0, took_s=0.1)
    assert returns.wait_s(100.0) == 0.0
    assert not returns._sessions
