"""Spans of requests, sent to an OpenTelemetry collector when the host asks for it.

A span tells the kind of a request, its tenant and how large it was. It never has tensors, ids of
tokens or the text of an error, which may quote what a client sent.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from shared.errors import InvalidInputError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Tracer

_SEND_S = 3.0  # a collector that is away may hold up the trunk's end no longer

_tracer: Tracer | None = None


def open_tracing(otlp_endpoint: str) -> Callable[[], None]:
    """Sends spans from now on; returns what sends the last ones and stops.

    Args:
        otlp_endpoint: Where a collector takes OTLP over gRPC, such as ``http://localhost:4317``;
            empty sends none.

    Raises:
        InvalidInputError: If OpenTelemetry is not installed.
    """
    if not otlp_endpoint:
        return lambda: None
    exporter = _module("opentelemetry.exporter.otlp.proto.grpc.trace_exporter")
    export = _module("opentelemetry.sdk.trace.export")
    sender = exporter.OTLPSpanExporter(endpoint=otlp_endpoint, timeout=_SEND_S)
    return trace_to(export.BatchSpanProcessor(sender))


def trace_to(processor: SpanProcessor) -> Callable[[], None]:
    """Gives spans to a processor from now on; returns what shuts it down and stops.

    Args:
        processor: Takes the spans that end.

    Raises:
        InvalidInputError: If OpenTelemetry is not installed.
    """
    global _tracer
    resources = _module("opentelemetry.sdk.resources")
    resource = resources.Resource.create({"service.name": "trunkd"})
    provider = _module("opentelemetry.sdk.trace").TracerProvider(resource=resource)
    provider.add_span_processor(processor)
    _tracer = provider.get_tracer("trunk_service")

    def close() -> None:
        global _tracer
        _tracer = None
        provider.shutdown()

    return close


@contextlib.contextmanager
def span(
    kind: str, tenant: str, *, tokens: int | None = None, bytes: int | None = None
) -> Iterator[None]:
    """Times what runs inside as a span; does nothing unless tracing is on.

    Args:
        kind: What is done, such as ``forward``.
        tenant: For whom.
        tokens: Batch rows times tokens.
        bytes: Bytes of the tensors that came.
    """
    tracer = _tracer
    if tracer is None:
        yield
        return
    attributes = {"kind": kind, "tenant": tenant, "tokens": tokens, "bytes": bytes}
    known = {key: value for key, value in attributes.items() if value is not None}
    status = importlib.import_module("opentelemetry.trace").StatusCode
    # Off, since a recorded exception has its message and the values in its traceback.
    with tracer.start_as_current_span(
        f"trunk.{kind}", attributes=known, record_exception=False, set_status_on_exception=False
    ) as current:
        try:
            yield
        except BaseException as error:
            current.set_attribute("error.type", type(error).__name__)
            current.set_status(status.ERROR)
            raise


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InvalidInputError(
            "sending spans needs OpenTelemetry: `pip install trunkline[otel]`"
        ) from error
