"""What a tenant may hold over all of its sessions."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from shared.errors import ResourceExhaustedError
from tests.patience import PATIENCE_S
from trunk_service.budget import ByteBudget
from trunk_service.limits import Limits
from trunk_service.quotas import TenantQuota, TenantQuotas

LIMITS = Limits(
    held_bytes=100,
    tenant_held_bytes=80,
    tenant_max_sessions=2,
    tenant_adapter_parameters=1000,
    tenant_requests_in_flight=3,
    tenant_pushes_per_minute=6.0,
)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quotas(clock: Clock) -> TenantQuotas:
    return TenantQuotas(LIMITS, ByteBudget(LIMITS.held_bytes, "trunk's held-state"), clock)


Take = Callable[[TenantQuota], None]


@pytest.mark.parametrize(
    ("take", "give", "allowed", "text"),
    [
        (TenantQuota.add_session, TenantQuota.remove_session, 2, "2 sessions.*allows 2"),
        (TenantQuota.enter_request, TenantQuota.leave_request, 3, "3 requests.*allows 3"),
        (
            lambda q: q.reserve_parameters(400),
            lambda q: q.release_parameters(400),
            2,
            "400 .*tenant_adapter_parameters.*800 of 1000",
        ),
        (lambda q: q.budget.reserve(40), lambda q: q.budget.release(40), 2, "80 of 80"),
    ],
)
def test_a_limit_counts_all_of_one_tenant_and_nothing_of_another(
    quotas: TenantQuotas, take: Take, give: Take, allowed: int, text: str
) -> None:
    first, second = quotas.of("first"), quotas.of("second")
    for _ in range(allowed):
        take(quotas.of("first"))
    with pytest.raises(ResourceExhaustedError, match=text) as refused:
        take(first)
    assert "second" not in str(refused.value)
    assert refused.value.retry_after_s > 0
    if first.budget.used == 0:
        take(second)  # its own are all left
    give(first)
    take(first)


def test_one_tenant_cannot_hold_more_than_the_trunk(quotas: TenantQuotas) -> None:
    quotas.of("first").budget.reserve(80)
    with pytest.raises(ResourceExhaustedError, match="trunk"):
        quotas.of("second").budget.reserve(40)
    assert quotas.held_bytes() == {"first": 80, "second": 0}


def test_pushes_come_in_bursts_of_a_minutes_and_then_at_their_rate(
    quotas: TenantQuotas, clock: Clock
) -> None:
    quota = quotas.of("one")
    for _ in range(6):
        quota.check_push_rate()
    clock.now += 4.0
    with pytest.raises(ResourceExhaustedError, match="tenant_pushes_per_minute") as refused:
        quota.check_push_rate()
    assert refused.value.retry_after_s == pytest.approx(6.0)
    clock.now += refused.value.retry_after_s + 1e-6
    quota.check_push_rate()
    with pytest.raises(ResourceExhaustedError):
        quota.check_push_rate()
    quotas.of("other").check_push_rate()
    clock.now += 3600.0
    for _ in range(6):
        quota.check_push_rate()
    with pytest.raises(ResourceExhaustedError):
        quota.check_push_rate()


def test_tenants_that_hold_nothing_are_forgotten(quotas: TenantQuotas, clock: Clock) -> None:
    gone = list[str]()
    quotas.observe(gone.append)
    stays = quotas.of("stays")
    stays.add_session()
    for number in range(50):
        quotas.of(f"visitor{number}").check_push_rate()
    clock.now += 61.0
    assert quotas.of("stays") is stays
    assert len(quotas) == 1
    assert len(gone) == 50
    stays.remove_session()
    clock.now += 61.0
    quotas.forget_idle()
    assert (len(quotas), gone[-1]) == (0, "stays")


def test_leaving_and_coming_back_refills_nothing(quotas: TenantQuotas, clock: Clock) -> None:
    for _ in range(6):
        quotas.of("one").check_push_rate()
    clock.now += 1.0
    quotas.forget_idle()
    with pytest.raises(ResourceExhaustedError):
        quotas.of("one").check_push_rate()


def test_threads_that_race_get_no_more_than_is_allowed(quotas: TenantQuotas) -> None:
    entered, together = list[bool](), threading.Barrier(8)

    def enter() -> None:
        together.wait(PATIENCE_S)
        try:
            quotas.of("one").enter_request()
        except ResourceExhaustedError:
            return
        entered.append(True)

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(entered) == LIMITS.tenant_requests_in_flight
