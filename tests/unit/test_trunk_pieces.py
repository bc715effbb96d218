"""Scheduler, budget and held state, each alone."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from shared.errors import DrainingError, ResourceExhaustedError, UnknownRequestError
from tests.patience import PATIENCE_S
from trunk_service.budget import ByteBudget
from trunk_service.held import HeldRequests
from trunk_service.requests import ForwardRequest
from trunk_service.room import Room
from trunk_service.scheduler import Scheduler


class Clock:
    """Time that passes only inside of tasks that say so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Script:
    """One worker, held back until everything is submitted; notes what ran, in order."""

    def __init__(self) -> None:
        self.clock, self.ran = Clock(), list[str]()
        self.scheduler = Scheduler(workers=1, threads_per_worker=1, clock=self.clock)
        self._futures = list[Future[None]]()
        self._gate, started = threading.Event(), threading.Event()
        self.scheduler.submit("gate", "gate", lambda: (started.set(), self._gate.wait()))
        assert started.wait(PATIENCE_S)

    def submit(
        self, tenant: str, seconds: float = 1.0, session: str = "a", then: str = ""
    ) -> Future[None]:
        """Adds a task, at whose end the tenant ``then`` adds one too."""

        def work() -> None:
            self.ran.append(tenant + session)
            self.clock.now += seconds
            if then:
                self.submit(then)

        self._futures.append(self.scheduler.submit(tenant, session, work))
        return self._futures[-1]

    def run(self) -> list[str]:
        self._gate.set()
        while self._futures:
            if not (future := self._futures.pop()).cancelled():
                future.result(PATIENCE_S)
        self.scheduler.stop()
        return self.ran


def test_sessions_of_a_tenant_take_turns_and_each_keeps_its_order() -> None:
    script = Script()
    for session in ("a", "a", "a", "b"):
        script.submit("one-", session=session)
    assert script.run() == ["one-a", "one-b", "one-a", "one-a"]


def test_a_tenant_with_many_sessions_gets_no_more_than_one_with_one() -> None:
    script = Script()
    for session in "abcdef":
        script.submit("greedy-", session=session)
    for _ in range(3):
        script.submit("modest-", session="m")
    turns = [name.partition("-")[0] for name in script.run()]
    assert turns == ["greedy", "modest"] * 3 + ["greedy"] * 3


def test_what_is_shared_is_time_and_not_the_number_of_tasks() -> None:
    script = Script()
    for _ in range(3):
        script.submit("long-", seconds=4.0)
    for _ in range(8):
        script.submit("short-", seconds=1.0)
    turns = [name.partition("-")[0] for name in script.run()]
    assert turns == ["long", *["short"] * 4, "long", *["short"] * 4, "long"]


def test_who_was_away_has_saved_up_nothing() -> None:
    script = Script()
    for _ in range(5):
        script.submit("here-")
    for then in ("away-", "away-", ""):
        script.submit("here-", then=then, session="b")
    # Had it saved up the time before, its two tasks would come one right after the other.
    assert script.run() == [
        *("here-a", "here-b", "here-a"),
        *("away-a", "here-b", "here-a"),
        *("away-a", "here-b", "here-a", "here-a"),
    ]


def test_who_was_away_keeps_its_debt() -> None:
    script = Script()
    script.submit("debtor-", seconds=10.0)
    script.submit("other-", then="debtor-")
    for _ in range(3):
        script.submit("other-", seconds=3.0)
    assert script.run() == ["debtor-a", *["other-a"] * 4, "debtor-a"]


def test_tenants_that_left_are_forgotten() -> None:
    script = Script()
    for number in range(20):
        script.submit(f"tenant{number}")
    assert script.scheduler.queue_depths()["tenant7"] == 1
    script.run()
    assert script.scheduler.queue_depths() == {}
    assert script.scheduler.idle
    assert len(script.scheduler._tenants) <= 1


def test_what_a_task_waited_and_ran_is_told() -> None:
    script, told = Script(), list[tuple[str, float, float]]()
    script.scheduler.observe(lambda *done: told.append(done))
    script.submit("one", seconds=2.0)
    script.submit("one", seconds=3.0)
    script.submit("one").cancel()
    script.run()
    assert told == [("gate", 0.0, 0.0), ("one", 0.0, 2.0), ("one", 2.0, 3.0)]


def test_tasks_of_one_session_never_overlap() -> None:
    scheduler = Scheduler(workers=4, threads_per_worker=1)
    running, overlaps = set[int](), list[int]()

    def work(number: int) -> None:
        overlaps.extend(running)
        running.add(number)
        torch.randn(64, 64) @ torch.randn(64, 64)
        running.discard(number)

    for number in range(40):
        scheduler.submit("one", "a", lambda n=number: work(n))
    scheduler.stop()
    assert overlaps == []


def test_sessions_of_one_tenant_run_side_by_side() -> None:
    scheduler = Scheduler(workers=2, threads_per_worker=1)
    both = threading.Barrier(2)
    futures = [scheduler.submit("one", s, lambda: both.wait(PATIENCE_S)) for s in ("a", "b")]
    assert {future.result(PATIENCE_S) for future in futures} == {0, 1}
    scheduler.stop()


@pytest.mark.parametrize(("other", "threads"), [(None, 3), (("one", "b"), 1), (("two", "a"), 1)])
def test_adaptive_gives_all_threads_to_a_session_that_is_alone(
    other: tuple[str, str] | None, threads: int
) -> None:
    # The clock stands still, so that tenants have used the same and take turns.
    scheduler = Scheduler(workers=1, threads_per_worker=3, adaptive=True, clock=Clock())
    gate, started = threading.Event(), threading.Event()
    scheduler.submit("one", "a", lambda: (started.set(), gate.wait()))
    assert started.wait(PATIENCE_S)
    found = scheduler.submit("one", "a", torch.get_num_threads)
    if other is not None:
        # Two, so that one still waits whichever comes first.
        scheduler.submit(*other, bool), scheduler.submit(*other, bool)
    gate.set()
    assert found.result(PATIENCE_S) == threads
    scheduler.stop()


def test_a_full_queue_and_a_stopped_scheduler_refuse() -> None:
    scheduler = Scheduler(workers=1, threads_per_worker=1, max_queued=1)
    gate, started = threading.Event(), threading.Event()
    scheduler.submit("one", "a", lambda: (started.set(), gate.wait()))
    assert started.wait(PATIENCE_S)
    scheduler.submit("one", "a", bool)
    with pytest.raises(ResourceExhaustedError):
        scheduler.submit("one", "a", bool)
    scheduler.submit("one", "a", bool, over_limit=True)
    scheduler.submit("one", "b", bool)
    gate.set()
    scheduler.stop()
    with pytest.raises(DrainingError):
        scheduler.submit("one", "a", bool)


def test_a_failing_task_fails_alone() -> None:
    scheduler = Scheduler(workers=1, threads_per_worker=1)
    bad = scheduler.submit("one", "a", lambda: 1 // 0)
    good = scheduler.submit("one", "a", lambda: 7)
    assert good.result(PATIENCE_S) == 7
    assert isinstance(bad.exception(PATIENCE_S), ZeroDivisionError)
    scheduler.stop()


def test_a_budget_counts_against_its_parent() -> None:
    total = ByteBudget(100, "total")
    one, two = ByteBudget(80, "one", total), ByteBudget(80, "two", total)
    one.reserve(70)
    assert not two.fits(40)
    with pytest.raises(ResourceExhaustedError, match="total"):
        two.reserve(40)
    assert (two.used, total.used) == (0, 70)
    one.release(70)
    two.reserve(40)
    assert total.used == 40


def test_held_state_expires_and_gives_its_bytes_back() -> None:
    now = [0.0]
    budget = ByteBudget(100, "held")
    state: Any = None
    held = HeldRequests(lease_s=5.0, clock=lambda: now[0])
    for name in ("old", "new"):
        room = Room(budget, 0, 10, None)
        request = ForwardRequest(torch.zeros(1, 1, 1), request_id=name)
        held.add(request, torch.zeros(1), None, room, state)
        now[0] += 3.0
    assert held.drop_expired() == ["old"]
    assert budget.used == 10
    with pytest.raises(UnknownRequestError, match="expired"):
        held.get("old")
