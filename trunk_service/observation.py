"""What a daemon shows of itself: metrics on their own address, spans to a collector."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from trunk_service.metrics import Gauges, serve_metrics
from trunk_service.registry import SessionRegistry
from trunk_service.tracing import open_tracing


def observe(registry: SessionRegistry) -> None:
    """Lets the registry's metrics see what is queued and held."""
    metrics, scheduler, quotas = registry.metrics, registry.scheduler, registry.quotas

    def sessions() -> Counter[tuple[str, bool]]:
        return Counter((s.owner.tenant, s.attached) for s in registry.sessions())

    metrics.watch(
        Gauges(
            queue_depth=scheduler.queue_depths,
            held_bytes=quotas.held_bytes,
            sessions=sessions,
            ready=lambda: not registry.draining,
        )
    )
    scheduler.observe(lambda tenant, waited_s, computed_s: metrics.waited(tenant, waited_s))
    quotas.observe(metrics.forget)


def serve_observation(
    registry: SessionRegistry, metrics_address: str, otlp_endpoint: str
) -> tuple[int, Callable[[], None]]:
    """Serves metrics and sends spans, as far as an address is given for them.

    Args:
        registry: What is observed.
        metrics_address: ``HOST:PORT`` for Prometheus; empty serves none.
        otlp_endpoint: Of an OpenTelemetry collector; empty sends none.

    Returns:
        The metrics' port, 0 without any, and what ends both.

    Raises:
        InvalidInputError: If the address cannot be bound or OpenTelemetry is not installed.
    """
    observe(registry)
    stop_tracing = open_tracing(otlp_endpoint)
    port, stop_metrics = 0, _nothing
    if metrics_address:
        port, stop_metrics = serve_metrics(registry.metrics, metrics_address)

    def stop() -> None:
        stop_metrics()
        stop_tracing()

    return port, stop


def _nothing() -> None:
    pass
