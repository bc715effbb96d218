"""The metrics as a scrape sees them."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shared.errors import InvalidInputError
from tests.patience import PATIENCE_S
from trunk_service.metrics import KINDS, REASONS, Gauges, TrunkMetrics, serve_metrics

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]

LABELS = {"tenant", "kind", "code", "direction", "state", "reason", "le"}


class Scraped:
    """Metrics on a port of their own."""

    def __init__(self, address: str = "127.0.0.1:0") -> None:
        self.metrics = TrunkMetrics()
        self.port, self.close = serve_metrics(self.metrics, address)
        self._host = address.rpartition(":")[0]

    def get(self, path: str = "/metrics") -> str:
        opener = build_opener(ProxyHandler({}))
        with opener.open(f"http://{self._host}:{self.port}{path}", timeout=PATIENCE_S) as answer:
            return str(answer.read(), "utf-8")

    def samples(self) -> Samples:
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(self.get())
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float | None:
        return self.samples().get((name, tuple(sorted(labels.items()))))


@pytest.fixture
def scraped() -> Iterator[Scraped]:
    served = Scraped()
    yield served
    served.close()


def fill(metrics: TrunkMetrics, tenant: str) -> None:
    metrics.request_done(tenant, "forward", "OK", 0.25)
    metrics.request_done(tenant, "forward", "OK", 0.5)
    metrics.request_done(tenant, "backward", "TENSOR", 0.0)
    metrics.bytes_in(tenant, 100)
    metrics.bytes_out(tenant, 30)
    metrics.pushed(tenant)
    metrics.replayed(tenant)
    metrics.resumed(tenant)
    metrics.waited(tenant, 0.02)


def test_a_scrape_has_what_was_counted(scraped: Scraped) -> None:
    fill(scraped.metrics, "ward-7")
    scraped.metrics.rejected("DRAINING")
    expected = {
        ("trunkline_requests_total", "forward", "OK"): 2.0,
        ("trunkline_requests_total", "backward", "TENSOR"): 1.0,
    }
    for (name, kind, code), value in expected.items():
        assert scraped.value(name, tenant="ward-7", kind=kind, code=code) == value
    of = {"tenant": "ward-7"}
    assert scraped.value("trunkline_compute_seconds_total", kind="forward", **of) == 0.75
    assert scraped.value("trunkline_bytes_total", direction="in", **of) == 100.0
    assert scraped.value("trunkline_bytes_total", direction="out", **of) == 30.0
    for name in ("pushes", "replays", "resumes"):
        assert scraped.value(f"trunkline_{name}_total", **of) == 1.0
    assert scraped.value("trunkline_queue_wait_seconds_count", **of) == 1.0
    assert scraped.value("trunkline_queue_wait_seconds_bucket", le="0.01", **of) == 0.0
    assert scraped.value("trunkline_queue_wait_seconds_bucket", le="0.05", **of) == 1.0
    assert scraped.value("trunkline_rejections_total", reason="DRAINING") == 1.0


def test_gauges_are_read_at_the_scrape(scraped: Scraped) -> None:
    held = {"one": 5}
    scraped.metrics.watch(
        Gauges(
            queue_depth=lambda: {"one": 2},
            held_bytes=lambda: held,
            sessions=lambda: {("one", True): 3, ("one", False): 1},
            ready=lambda: bool(held),
        )
    )
    assert scraped.value("trunkline_queue_depth", tenant="one") == 2.0
    assert scraped.value("trunkline_held_bytes", tenant="one") == 5.0
    assert scraped.value("trunkline_sessions", tenant="one", state="attached") == 3.0
    assert scraped.value("trunkline_sessions", tenant="one", state="detached") == 1.0
    assert scraped.value("trunkline_ready") == 1.0
    held.clear()
    assert scraped.value("trunkline_held_bytes", tenant="one") is None
    assert scraped.value("trunkline_ready") == 0.0


def test_nothing_but_names_from_a_bounded_set_becomes_a_label(scraped: Scraped) -> None:
    for number in range(100):
        scraped.metrics.rejected(f"hidden state {number} of request 1b4e28ba is not finite")
        scraped.metrics.request_done("one", f"kind{number}", f"error {number}", 0.0)
    for reason in REASONS:
        scraped.metrics.rejected(reason)
    text = scraped.get()
    assert "1b4e28ba" not in text and "kind7" not in text
    reasons = {
        dict(labels)["reason"] for _, labels in scraped.samples() if "reason" in dict(labels)
    }
    assert reasons == REASONS | {"OTHER"}
    assert {key for _, labels in scraped.samples() for key, _ in labels} <= LABELS
    assert {"open", "forward", "backward", "fetch"} <= KINDS
    assert {"RESOURCE_EXHAUSTED", "UNAUTHENTICATED", "STALE_SESSION"} <= REASONS


def test_a_tenant_that_left_leaves_no_series(scraped: Scraped) -> None:
    for tenant in ("leaves", "stays"):
        fill(scraped.metrics, tenant)
    scraped.metrics.forget("leaves")
    scraped.metrics.forget("never came")
    text = scraped.get()
    assert "leaves" not in text and "_created" not in text
    assert 'tenant="stays"' in text


def test_only_the_metrics_are_served(scraped: Scraped) -> None:
    for path in ("/", "/metrics/", "/debug"):
        with pytest.raises(HTTPError) as refused:
            scraped.get(path)
        assert refused.value.code == 404
        refused.value.close()


def test_a_port_that_is_taken_or_none_is_refused(scraped: Scraped) -> None:
    for address in (f"127.0.0.1:{scraped.port}", "127.0.0.1:70000", "192.0.2.1:0"):
        with pytest.raises(InvalidInputError, match="cannot serve metrics on"):
            serve_metrics(scraped.metrics, address)


def test_an_ipv6_address_is_served() -> None:
    try:
        served = Scraped("[::1]:0")
    except InvalidInputError:
        pytest.skip("this machine has no IPv6")
    assert "trunkline" in served.get()
    served.close()
