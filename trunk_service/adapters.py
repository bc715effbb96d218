"""A session's adapters, by name."""

from __future__ import annotations

import re
from collections.abc import Iterator

from shared.errors import AdapterError, ResourceExhaustedError
from trunk_service.adapter import TenantAdapter
from trunk_service.budget import ByteBudget
from trunk_service.limits import Limits
from trunk_service.quotas import TenantQuota
from trunk_service.requests import AdapterRequest
from trunk_service.trunk import Trunk

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")


class SessionAdapters:
    """The adapters that one session has on the trunk; no other session sees them.

    Args:
        trunk: The shared blocks.
        limits: What a tenant may use.
        budget: The session's byte budget.
        quota: What all sessions of the tenant may hold.
        dropout: Replaces the probability of the blocks' own dropout layers.
    """

    def __init__(
        self,
        trunk: Trunk,
        limits: Limits,
        budget: ByteBudget,
        quota: TenantQuota,
        dropout: float | None,
    ) -> None:
        self._trunk, self._limits, self._budget, self._dropout = trunk, limits, budget, dropout
        self._quota = quota
        self._by_name: dict[str, TenantAdapter] = {}
        self._counted: dict[str, int] = {}
        self._bare: TenantAdapter | None = None

    def __iter__(self) -> Iterator[TenantAdapter]:
        return iter(list(self._by_name.values()))

    def items(self) -> list[tuple[str, TenantAdapter]]:
        """Names and adapters, in the order they were added."""
        return list(self._by_name.items())

    def add(self, request: AdapterRequest) -> TenantAdapter:
        """Puts a fresh adapter around the blocks.

        Raises:
            AdapterError: If the name is taken or none, or the adapter is refused.
            ResourceExhaustedError: If the session has as many adapters as are allowed.
        """
        if request.name and not _NAME.fullmatch(request.name):
            raise AdapterError(
                f"adapter name {request.name!r} is not accepted: 1 to 64 letters, digits and _ - . "
                f"are, not beginning with a dot"
            )
        if request.name in self._by_name:
            raise AdapterError(f"this session has an adapter {request.name!r} already")
        if len(self._by_name) >= self._limits.max_adapters_per_session:
            raise ResourceExhaustedError(
                f"this session has {len(self._by_name)} adapters, as many as are allowed"
            )
        added = self._build(request)
        try:
            self._quota.reserve_parameters(added.trainable_parameters)
        except ResourceExhaustedError:
            added.close()
            raise
        self._by_name[request.name] = added
        self._counted[request.name] = added.trainable_parameters
        return added

    def get(self, name: str) -> TenantAdapter:
        """Returns an adapter; the empty name is that of ``Open``.

        Raises:
            AdapterError: If this session has none of this name; names those it has.
        """
        if name not in self._by_name:
            raise AdapterError(
                f"this session has no adapter {name!r}; it has: "
                f"{', '.join(repr(n) for n in self._by_name)}"
            )
        return self._by_name[name]

    def bare(self) -> TenantAdapter:
        """The blocks without an adapter."""
        if self._bare is None:
            self._bare = self._build(AdapterRequest())
        return self._bare

    def remove(self, name: str) -> None:
        """Frees an adapter.

        Raises:
            AdapterError: If there is none of this name.
        """
        self.get(name).close()
        del self._by_name[name]
        self._quota.release_parameters(self._counted.pop(name))

    def close(self) -> None:
        """Frees all adapters' gradients and optimizers."""
        for name in list(self._by_name):
            self.remove(name)

    def _build(self, request: AdapterRequest) -> TenantAdapter:
        model = self._trunk.new_model(request, self._limits, self._dropout)
        return TenantAdapter(self._trunk, request, model, self._budget)
