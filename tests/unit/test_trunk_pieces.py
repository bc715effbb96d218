"""Scheduler, budget, held state and gradients, each alone."""

from __future__ import annotations

import threading

import pytest
import torch

from shared.errors import DrainingError, ResourceExhaustedError, UnknownRequestError
from trunk_service.budget import ByteBudget
from trunk_service.gradients import GradientSlots
from trunk_service.held import HeldRequests
from trunk_service.requests import ForwardRequest
from trunk_service.scheduler import Scheduler


def test_waiting_tenants_take_turns_and_each_keeps_its_order() -> None:
    scheduler = Scheduler(workers=1, threads_per_worker=1)
    gate, ran = threading.Event(), list[str]()
    futures = [scheduler.submit("first", gate.wait)]
    for tenant in ("greedy", "greedy", "greedy", "modest"):
        label = f"{tenant}{len(futures)}"
        futures.append(scheduler.submit(tenant, lambda text=label: ran.append(text)))
    gate.set()
    scheduler.stop()
    assert all(future.done() for future in futures)
    assert ran == ["greedy1", "modest4", "greedy2", "greedy3"]


def test_tasks_of_one_tenant_never_overlap() -> None:
    scheduler = Scheduler(workers=4, threads_per_worker=1)
    running, overlaps = set[int](), list[int]()

    def work(number: int) -> None:
        overlaps.extend(running)
        running.add(number)
        torch.randn(64, 64) @ torch.randn(64, 64)
        running.discard(number)

    for number in range(40):
        scheduler.submit("one", lambda n=number: work(n))
    scheduler.stop()
    assert overlaps == []


def test_a_full_queue_and_a_stopped_scheduler_refuse() -> None:
    scheduler = Scheduler(workers=1, threads_per_worker=1, max_queued_per_tenant=1)
    gate, started = threading.Event(), threading.Event()
    scheduler.submit("a", lambda: (started.set(), gate.wait()))
    assert started.wait(10)
    scheduler.submit("a", bool)
    with pytest.raises(ResourceExhaustedError):
        scheduler.submit("a", bool)
    scheduler.submit("b", bool)
    gate.set()
    scheduler.stop()
    with pytest.raises(DrainingError):
        scheduler.submit("a", bool)


def test_a_failing_task_fails_alone() -> None:
    scheduler = Scheduler(workers=1, threads_per_worker=1)
    bad, good = scheduler.submit("a", lambda: 1 // 0), scheduler.submit("a", lambda: 7)
    assert good.result(10) == 7
    assert isinstance(bad.exception(10), ZeroDivisionError)
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
    held = HeldRequests(budget, lease_s=5.0, clock=lambda: now[0])
    for name in ("old", "new"):
        budget.reserve(10)
        held.add(ForwardRequest(torch.zeros(1, 1, 1), request_id=name), torch.zeros(1), None, 10)
        now[0] += 3.0
    assert held.drop_expired() == ["old"]
    assert budget.used == 10
    with pytest.raises(UnknownRequestError, match="expired"):
        held.get("old")


def test_slots_are_assigned_and_summed_in_their_order() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(1000, generator=generator) * 10.0**n for n in range(3)]
    slots = GradientSlots()
    for micro in (2, 0, 1):
        slots.assign(micro, [torch.zeros(1000), None])
        slots.assign(micro, [parts[micro], None])
    total = slots.total()
    assert total[1] is None and total[0] is not None
    assert torch.equal(total[0], (parts[0] + parts[1]) + parts[2])
    assert slots.norm() == pytest.approx(float(total[0].norm()))
