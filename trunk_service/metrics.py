"""What the trunk counts, for Prometheus, and the port it is read from.

Labels are tenants' names, kinds of requests and error codes: never ids of sessions, requests or
adapters, and never the text of an error. So there are as many series as tenants, and none of them
says what a tenant trains on.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_PLAIN_0_0_4,
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from shared.errors import InvalidInputError
from shared.pb.trunkline.v1 import trunk_pb2 as pb

logger = logging.getLogger(__name__)

# They would double the series and say nothing that a counter's own reset does not.
disable_created_metrics()

KINDS = frozenset(f.name for f in pb.SessionRequest.DESCRIPTOR.oneofs_by_name["body"].fields)
"""Kinds of requests."""

_CODES = pb.DESCRIPTOR.enum_types_by_name["ErrorCode"].values_by_name

REASONS = frozenset(
    name.removeprefix("ERROR_CODE_") for name in _CODES if name != "ERROR_CODE_UNSPECIFIED"
)
"""Why requests are rejected: the names of the wire's error codes."""

_WAIT_BUCKETS_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True)
class Gauges:
    """Where a scrape reads what is held at that moment. Called on the thread of the scrape."""

    queue_depth: Callable[[], Mapping[str, int]]
    """Tasks that wait, by tenant."""
    held_bytes: Callable[[], Mapping[str, int]]
    """Bytes of autograd state and caches, by tenant."""
    sessions: Callable[[], Mapping[tuple[str, bool], int]]
    """Sessions, by tenant and whether a connection has them."""
    ready: Callable[[], bool]
    """Whether new sessions are taken."""


class TrunkMetrics:
    """Counts what happens on a trunk. May be used from any thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._by_tenant: list[Counter | Histogram] = []
        self._wait = Histogram(
            "trunkline_queue_wait_seconds",
            "How long requests waited for a compute thread.",
            ["tenant"],
            buckets=_WAIT_BUCKETS_S,
            registry=self._registry,
        )
        self._by_tenant.append(self._wait)
        self._compute = self._counter(
            "trunkline_compute_seconds_total", "Seconds requests were computed.", "tenant", "kind"
        )
        self._requests = self._counter(
            "trunkline_requests_total", "Requests answered.", "tenant", "kind", "code"
        )
        self._pushes = self._counter("trunkline_pushes_total", "Changed adapters taken.", "tenant")
        self._replays = self._counter(
            "trunkline_replays_total", "Answers given again to a client that came back.", "tenant"
        )
        self._resumes = self._counter(
            "trunkline_resumes_total", "Sessions that went on on a new connection.", "tenant"
        )
        self._batched = self._counter(
            "trunkline_batched_rows_total",
            "Rows of forwards that were computed together with other sessions'.",
            "tenant",
        )
        self._bytes = self._counter(
            "trunkline_bytes_total", "Bytes of frames.", "direction", "tenant"
        )
        self._rejections = Counter(
            "trunkline_rejections_total",
            "Requests and connections refused, by error code.",
            ["reason"],
            registry=self._registry,
        )

    def watch(self, gauges: Gauges) -> None:
        """Adds what is read at every scrape; once."""
        self._registry.register(_GaugeReader(gauges))

    def request_done(self, tenant: str, kind: str, code: str, computed_s: float) -> None:
        """Counts a request that was answered.

        Args:
            tenant: Whose it was.
            kind: One of ``KINDS``.
            code: ``OK`` or one of ``REASONS``.
            computed_s: Seconds it was computed.
        """
        kind = _one_of(KINDS, kind)
        code = code if code == "OK" else _one_of(REASONS, code)
        self._requests.labels(tenant, kind, code).inc()
        self._compute.labels(tenant, kind).inc(computed_s)

    def rejected(self, reason: str) -> None:
        """Counts a refusal; the reason is one of ``REASONS``."""
        self._rejections.labels(_one_of(REASONS, reason)).inc()

    def bytes_in(self, tenant: str, count: int) -> None:
        """Counts bytes that came from a client."""
        self._bytes.labels("in", tenant).inc(count)

    def bytes_out(self, tenant: str, count: int) -> None:
        """Counts bytes that were sent to a client."""
        self._bytes.labels("out", tenant).inc(count)

    def pushed(self, tenant: str) -> None:
        """Counts changed adapters that were taken."""
        self._pushes.labels(tenant).inc()

    def batched(self, tenant: str, rows: int) -> None:
        """Counts rows that were computed together with those of other sessions."""
        self._batched.labels(tenant).inc(rows)

    def replayed(self, tenant: str) -> None:
        """Counts an answer that was given again."""
        self._replays.labels(tenant).inc()

    def resumed(self, tenant: str) -> None:
        """Counts a session that went on on a new connection."""
        self._resumes.labels(tenant).inc()

    def waited(self, tenant: str, seconds: float) -> None:
        """Counts how long a request waited for a compute thread."""
        self._wait.labels(tenant).observe(seconds)

    def forget(self, tenant: str) -> None:
        """Drops the series of a tenant that has left."""
        for metric in self._by_tenant:
            metric.remove_by_labels({"tenant": tenant})

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        counter = Counter(name, about, labels, registry=self._registry)
        self._by_tenant.append(counter)
        return counter


def serve_metrics(metrics: TrunkMetrics, address: str) -> tuple[int, Callable[[], None]]:
    """Serves ``/metrics`` on a thread, and nothing else.

    The port is for the trunk's host alone: it asks for no certificate and names the tenants. Bind
    it to loopback, or to a network that only the host's own Prometheus is in.

    Args:
        metrics: What is served.
        address: HOST:PORT; port 0 takes a free one.

    Returns:
        The port, and what stops serving.

    Raises:
        InvalidInputError: If the address cannot be bound.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    server_class = _ServerV6 if ":" in host else _Server
    try:
        server = server_class((host, int(port)), partial(_Handler, metrics))
    except (OSError, OverflowError, ValueError) as error:
        raise InvalidInputError(f"cannot serve metrics on {address}: {error}") from error
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return server.server_address[1], close


class _GaugeReader(Collector):
    def __init__(self, gauges: Gauges) -> None:
        self._gauges = gauges

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """Nothing: else registering it would read the gauges."""
        return []

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Reads the gauges."""
        yield _by_tenant("trunkline_queue_depth", "Requests that wait.", self._gauges.queue_depth())
        yield _by_tenant(
            "trunkline_held_bytes",
            "Bytes of autograd state and caches.",
            self._gauges.held_bytes(),
        )
        sessions = GaugeMetricFamily(
            "trunkline_sessions", "Sessions open.", labels=["tenant", "state"]
        )
        for (tenant, attached), count in self._gauges.sessions().items():
            sessions.add_metric([tenant, "attached" if attached else "detached"], count)
        yield sessions
        yield GaugeMetricFamily(
            "trunkline_ready", "1 while new sessions are taken.", float(self._gauges.ready())
        )


def _by_tenant(name: str, about: str, values: Mapping[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, about, labels=["tenant"])
    for tenant, value in values.items():
        family.add_metric([tenant], value)
    return family


def _one_of(known: Collection[str], value: str) -> str:
    """The value, or one name for all that would make the number of series unbounded."""
    return value if value in known else "OTHER"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Binds without the look-up of the host's name that HTTPServer does, which can hang."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "trunkd", self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Logs a scrape that failed; the server goes on."""
        logger.warning("a scrape of the metrics failed", exc_info=True)


class _ServerV6(_Server):
    address_family = socket.AF_INET6


class _Handler(BaseHTTPRequestHandler):
    timeout = 10.0  # of a client that sends nothing
    server_version, sys_version = "trunkd", ""

    def __init__(self, metrics: TrunkMetrics, *args: Any) -> None:
        self._metrics = metrics
        super().__init__(*args)

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        body = self._metrics.text()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", CONTENT_TYPE_PLAIN_0_0_4)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not logged."""
