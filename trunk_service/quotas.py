"""What each tenant holds of what it may use, over all of its sessions."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from shared.errors import ResourceExhaustedError
from trunk_service.budget import ByteBudget
from trunk_service.limits import Limits

_MINUTE_S = 60.0

Clock = Callable[[], float]


class TenantQuota:
    """What one tenant holds, counted against its limits. May be used from any thread.

    Args:
        tenant: Its name.
        limits: What every tenant may use.
        total: The budget of all tenants.
        clock: Tells the time in seconds.
    """

    def __init__(
        self, tenant: str, limits: Limits, total: ByteBudget, clock: Clock = time.monotonic
    ) -> None:
        self.tenant = tenant
        self.budget = ByteBudget(limits.tenant_held_bytes, "tenant's held-state", total)
        self._limits, self._clock = limits, clock
        self._lock = threading.Lock()
        self._sessions = self._parameters = self._requests = 0
        # A bucket of pushes, refilled at the allowed rate.
        self._burst = max(1.0, limits.tenant_pushes_per_minute)
        self._pushes_left, self._refilled_at = self._burst, clock()

    @property
    def sessions(self) -> int:
        """Sessions open now."""
        return self._sessions

    @property
    def holds_nothing(self) -> bool:
        """Whether forgetting it would change nothing: the rate of its pushes is counted too."""
        with self._lock:
            self._refill()
            holds = self._sessions or self._parameters or self._requests or self.budget.used
            return not holds and self._pushes_left >= self._burst

    def add_session(self) -> None:
        """Counts one more session.

        Raises:
            ResourceExhaustedError: If there are as many as are allowed.
        """
        with self._lock:
            allowed = self._limits.tenant_max_sessions
            if self._sessions >= allowed:
                raise ResourceExhaustedError(
                    f"{self._sessions} sessions of this tenant are open; tenant_max_sessions "
                    f"allows {allowed}",
                    retry_after_s=30.0,
                )
            self._sessions += 1

    def remove_session(self) -> None:
        """Counts one session less."""
        with self._lock:
            assert self._sessions > 0, self.tenant
            self._sessions -= 1

    def reserve_parameters(self, count: int) -> None:
        """Counts the trainable numbers of one more adapter.

        Raises:
            ResourceExhaustedError: If all adapters of the tenant would have more than allowed;
                nothing was counted.
        """
        with self._lock:
            allowed = self._limits.tenant_adapter_parameters
            if self._parameters + count > allowed:
                raise ResourceExhaustedError(
                    f"{count} trainable numbers more than tenant_adapter_parameters allows: "
                    f"this tenant's adapters have {self._parameters} of {allowed}",
                    retry_after_s=30.0,
                )
            self._parameters += count

    def release_parameters(self, count: int) -> None:
        """Counts the trainable numbers of one adapter less."""
        with self._lock:
            assert 0 <= count <= self._parameters, (self.tenant, count, self._parameters)
            self._parameters -= count

    def enter_request(self) -> None:
        """Counts one more request under way.

        Raises:
            ResourceExhaustedError: If there are as many as are allowed.
        """
        with self._lock:
            allowed = self._limits.tenant_requests_in_flight
            if self._requests >= allowed:
                raise ResourceExhaustedError(
                    f"{self._requests} requests of this tenant are under way; "
                    f"tenant_requests_in_flight allows {allowed}",
                    retry_after_s=0.5,
                )
            self._requests += 1

    def leave_request(self) -> None:
        """Counts one request less."""
        with self._lock:
            assert self._requests > 0, self.tenant
            self._requests -= 1

    def check_push_rate(self) -> None:
        """Counts one push of changed adapters.

        Raises:
            ResourceExhaustedError: If it comes too early; tells when it may come.
        """
        with self._lock:
            self._refill()
            if self._pushes_left < 1.0:
                rate = self._limits.tenant_pushes_per_minute
                raise ResourceExhaustedError(
                    f"this tenant's adapters change faster than tenant_pushes_per_minute allows: "
                    f"{rate:g}, and the minute's are used",
                    retry_after_s=(1.0 - self._pushes_left) * _MINUTE_S / rate,
                )
            self._pushes_left -= 1.0

    def _refill(self) -> None:
        now = self._clock()
        refilled = (now - self._refilled_at) * self._limits.tenant_pushes_per_minute / _MINUTE_S
        self._pushes_left = min(self._burst, self._pushes_left + refilled)
        self._refilled_at = now


class TenantQuotas:
    """The quotas of all tenants. May be used from any thread.

    A tenant that held nothing for a minute is forgotten, so that the table stays bounded.

    Args:
        limits: What every tenant may use.
        total: The budget of all tenants.
        clock: Tells the time in seconds.
    """

    def __init__(self, limits: Limits, total: ByteBudget, clock: Clock = time.monotonic) -> None:
        self._limits, self._total, self._clock = limits, total, clock
        self._quotas: dict[str, TenantQuota] = {}
        self._used_at: dict[str, float] = {}
        self._on_forget: Callable[[str], None] | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._quotas)

    def of(self, tenant: str) -> TenantQuota:
        """Returns a tenant's quota, the same one for as long as it holds anything."""
        self.forget_idle()
        with self._lock:
            self._used_at[tenant] = self._clock()
            quota = self._quotas.get(tenant)
            if quota is None:
                quota = TenantQuota(tenant, self._limits, self._total, self._clock)
                self._quotas[tenant] = quota
            return quota

    def forget_idle(self) -> None:
        """Forgets the tenants that held nothing for a minute."""
        with self._lock:
            # Whoever asked for a quota just now is about to use it: a second one beside it would
            # double what the tenant may have.
            horizon = self._clock() - _MINUTE_S
            idle = [
                tenant
                for tenant, quota in self._quotas.items()
                if quota.holds_nothing and self._used_at[tenant] < horizon
            ]
            for tenant in idle:
                del self._quotas[tenant], self._used_at[tenant]
        if self._on_forget is not None:
            for tenant in idle:
                self._on_forget(tenant)

    def observe(self, on_forget: Callable[[str], None]) -> None:
        """Sets what is told the name of a tenant that was forgotten."""
        self._on_forget = on_forget

    def held_bytes(self) -> dict[str, int]:
        """Bytes held now, by tenant."""
        with self._lock:
            return {tenant: quota.budget.used for tenant, quota in self._quotas.items()}
