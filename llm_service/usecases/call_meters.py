"""What is measured of calls, for dashboards; see telemetry/call_metrics.py."""

from __future__ import annotations

from typing import Protocol

from llm_service.domain.call import CallRecord
from llm_service.usecases.running_calls import RunningAttempt, RunningCall


class CallMeters(Protocol):
    """Told at the ends, never for a token."""

    def attempt_ended(self, call: RunningCall, attempt: RunningAttempt, *, seconds: float) -> None: ...

    def call_ended(self, call: RunningCall, record: CallRecord, *, seconds: float) -> None: ...

    def malformed(self, call: RunningCall, events: int) -> None: ...


class NoMeters:
    """Measures nothing."""

    def attempt_ended(self, call: RunningCall, attempt: RunningAttempt, *, seconds: float) -> None: ...

    def call_ended(self, call: RunningCall, record: CallRecord, *, seconds: float) -> None: ...

    def malformed(self, call: RunningCall, events: int) -> None: ...
