"""Spans: what they tell and what they never do."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from shared.errors import InvalidInputError, TensorError
from trunk_service.tracing import open_tracing, span, trace_to


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    close = trace_to(SimpleSpanProcessor(exporter))
    yield exporter
    close()


def test_a_span_tells_kind_tenant_and_sizes(spans: InMemorySpanExporter) -> None:
    with span("forward", "ward-7", tokens=64, bytes=4096):
        pass
    with span("step", "ward-7"):
        pass
    forward, step = spans.get_finished_spans()
    assert forward.name == "trunk.forward"
    assert dict(forward.attributes or {}) == {
        "kind": "forward",
        "tenant": "ward-7",
        "tokens": 64,
        "bytes": 4096,
    }
    assert dict(step.attributes or {}) == {"kind": "step", "tenant": "ward-7"}
    assert (forward.end_time or 0) >= (forward.start_time or 0)
    assert forward.resource.attributes["service.name"] == "trunkd"


def test_a_failure_has_its_class_and_not_its_text(spans: InMemorySpanExporter) -> None:
    with pytest.raises(TensorError), span("forward", "ward-7"):
        raise TensorError("the patient's hidden states are not finite")
    (failed,) = spans.get_finished_spans()
    assert not failed.status.is_ok and failed.status.description is None
    assert (failed.attributes or {})["error.type"] == "TensorError"
    assert "patient" not in failed.to_json()


def test_without_an_endpoint_nothing_is_traced() -> None:
    close = open_tracing("")
    with span("forward", "ward-7"):
        pass
    close()


def test_closing_ends_tracing() -> None:
    exporter = InMemorySpanExporter()
    trace_to(SimpleSpanProcessor(exporter))()
    with span("forward", "ward-7"):
        pass
    assert exporter.get_finished_spans() == ()


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(InvalidInputError, match=r"pip install trunkline\[otel\]"):
        open_tracing("http://localhost:4317")
