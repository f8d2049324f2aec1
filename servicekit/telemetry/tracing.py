"""Traces by OpenTelemetry: off until `configure`, and then nothing but a few comparisons; W3C traceparent throughout.

A span is made only where a trace is recorded. Contexts travel as traceparent text, because batches mix the work of many
calls and no ambient context could tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

TRACEPARENT = "traceparent"
Attributes = Mapping[str, str | int | float | bool | Sequence[str]]

__all__ = [
    "TRACEPARENT", "Attributes", "Span", "SpanKind", "configure", "context_of", "end", "is_on", "metadata_of", "start",
    "traceparent_of",
]

Span = trace.Span
_tracer: trace.Tracer | None = None


def configure(*, service: str, endpoint: str, ratio: float, exporter: SpanExporter | None = None) -> Callable[[], None]:
    """Sends spans to an OTLP collector over gRPC (`http://host:4317`; https = TLS). Returns what ends it, flushing."""
    global _tracer
    if not endpoint and exporter is None:
        return lambda: None
    # Imported here: most processes send no traces, and need not carry the weight.
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    if exporter is None:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"))
    provider = TracerProvider(
        resource=Resource.create({"service.name": service, "service.namespace": "creditmesh"}),
        sampler=ParentBased(TraceIdRatioBased(ratio)),
    )
    provider.add_span_processor(BatchSpanProcessor(exporter))
    _tracer = provider.get_tracer("creditmesh")

    def shut_down() -> None:
        global _tracer
        _tracer = None
        provider.shutdown()

    return shut_down


def is_on() -> bool:
    return _tracer is not None


def context_of(traceparent: str) -> SpanContext | None:
    """None for what is no traceparent (W3C Trace Context, version 00)."""
    parts = traceparent.split("-")
    if len(parts) < 4 or len(parts[1]) != 32 or len(parts[2]) != 16:
        return None
    try:
        flags = TraceFlags(int(parts[3], 16))
        context = SpanContext(int(parts[1], 16), int(parts[2], 16), is_remote=True, trace_flags=flags)
    except ValueError:
        return None
    return context if context.is_valid else None


def start(
    name: str, *, kind: SpanKind, parent: str = "", attributes: Attributes | None = None, links: Sequence[str] = (),
    starts_trace: bool = True,
) -> Span | None:
    """A span below `parent`; None while tracing is off, when the trace is not recorded, and when it would begin a trace
    without `starts_trace`."""
    if _tracer is None:
        return None
    above = context_of(parent) if parent else None
    if above is None and not starts_trace:
        return None
    context = trace.set_span_in_context(trace.NonRecordingSpan(above)) if above is not None else None
    linked = [Link(each) for text in links if (each := context_of(text)) is not None]
    span = _tracer.start_span(name, context=context, kind=kind, attributes=dict(attributes or {}), links=linked)
    return span if span.is_recording() else None


def traceparent_of(span: Span | None, otherwise: str = "") -> str:
    """What goes to the next service; what came, where there is no span."""
    if span is None:
        return otherwise
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def end(span: Span | None, *, error: str = "", attributes: Attributes | None = None) -> None:
    """`error` is a reason, never a text that could hold content."""
    if span is None:
        return
    for name, value in (attributes or {}).items():
        span.set_attribute(name, value)
    if error:
        span.set_attribute("error.type", error)
        span.set_status(Status(StatusCode.ERROR, error))
    span.end()


def metadata_of(traceparent: str) -> tuple[tuple[str, str], ...]:
    """As gRPC metadata."""
    return ((TRACEPARENT, traceparent),) if traceparent else ()

