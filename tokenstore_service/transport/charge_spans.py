"""Spans of charges that came in: the last step of a call's trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from servicekit.telemetry import tracing

NAME = "apply credit.charge.requested"


@contextmanager
def applying(traceparents: Iterable[str], *, kind: tracing.SpanKind) -> Iterator[None]:
    """One span for each charge that belongs to a trace, from before the books are written until they are committed."""
    spans = []
    if tracing.is_on():
        spans = [
            tracing.start(NAME, kind=kind, parent=traceparent, starts_trace=False)
            for traceparent in traceparents if traceparent
        ]
    error = ""
    try:
        yield
    except Exception as raised:
        error = type(raised).__name__
        raise
    finally:
        for span in spans:
            tracing.end(span, error=error)
