"""A session's adapters, by name."""

from __future__ import annotations

import re
from collections.abc import Iterator

from shared.errors import AdapterError, ResourceExhaustedError
from trunk_service.adapter import TenantAdapter
from trunk_service.budget import ByteBudget
from trunk_service.limits import Limits
from trunk_service.requests import AdapterRequest
from trunk_service.trunk import Trunk

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")


class SessionAdapters:
    """The adapters that one session has on the trunk; no other session sees them.

    Args:
        trunk: The shared blocks.
        limits: What a tenant may use.
        budget: The session's byte budget.
        dropout: Replaces the probability of the blocks' own dropout layers.
    """

    def __init__(
        self, trunk: Trunk, limits: Limits, budget: ByteBudget, dropout: float | None
    ) -> None:
        self._trunk, self._limits, self._budget, self._dropout = trunk, limits, budget, dropout
        self._by_name: dict[str, TenantAdapter] = {}
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
        self._by_name[request.name] = self._build(request)
        return self._by_name[request.name]

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

    def close(self) -> None:
        """Frees all adapters' gradients and optimizers."""
        for adapter in self:
            adapter.close()

    def _build(self, request: AdapterRequest) -> TenantAdapter:
        model = self._trunk.new_model(request, self._limits, self._dropout)
        return TenantAdapter(self._trunk, request, model, self._budget)
