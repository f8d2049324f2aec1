"""Prometheus metrics of calls and models.

Names that begin with gen_ai are OpenTelemetry's (open-telemetry/semantic-conventions-genai) in Prometheus's spelling;
what has no standard begins with llm. No label holds a user, a prompt or a key: aliases and providers are few.
"""

from __future__ import annotations

import asyncio
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.registry import REGISTRY

from llm_service.domain.call import CallRecord, CallState, Operation
from llm_service.usecases.call_spans import PROVIDER_NAMES
from llm_service.usecases.model_health import ModelHealth
from llm_service.usecases.ports import ModelDirectory
from llm_service.usecases.running_calls import RunningAttempt, RunningCall, RunningCalls
from metering.usage import UsageSource

SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
"""The convention's buckets for durations."""
FIRST_TOKEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
GAP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
TOKENS = tuple(4**power for power in range(14))


class CallMetrics:
    """Implements CallMeters."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._children: dict[tuple[int, tuple[str, ...]], Any] = {}
        about = ["gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model"]
        self._duration = Histogram(
            "gen_ai_client_operation_duration_seconds", "Attempts: from asking a model server to its end.",
            [*about, "error_type"], buckets=SECONDS, registry=registry,
        )
        self._first_token = Histogram(
            "gen_ai_client_operation_time_to_first_chunk_seconds", "Attempts: from asking to the first token.", about,
            buckets=FIRST_TOKEN_SECONDS, registry=registry,
        )
        self._gap = Histogram(
            "gen_ai_client_operation_time_per_output_chunk_seconds",
            "Attempts: mean time between two output tokens.", about, buckets=GAP_SECONDS, registry=registry,
        )
        self._tokens = Histogram(
            "gen_ai_client_token_usage", "Billable tokens of calls.", [*about, "gen_ai_token_type"], buckets=TOKENS,
            registry=registry,
        )
        self._calls = Counter(
            "llm_calls", "Calls that ended, by state and how.", ["operation", "model", "state", "finish_reason"],
            registry=registry,
        )
        self._charged = Counter("llm_charge_micros", "Micro-credits charged.", ["model", "status"], registry=registry)
        self._estimated = Counter(
            "llm_estimated_calls", "Charged calls whose usage no model server reported.", ["model"], registry=registry
        )
        self._attempts = Counter(
            "llm_attempts", "Attempts, by why they were made and what became of them.", ["model", "kind", "outcome"],
            registry=registry,
        )
        self._latency = Histogram(
            "llm_first_token_seconds", "Calls: from arrival to the first token, hold included.", ["model"],
            buckets=FIRST_TOKEN_SECONDS, registry=registry,
        )
        self._queue = Histogram(
            "llm_queue_seconds", "Calls that waited for a place below a limit.", ["model"], buckets=SECONDS,
            registry=registry,
        )
        self._malformed = Counter(
            "llm_malformed_events", "Events of model servers that could not be read.", ["model"], registry=registry
        )
        self.swept = Counter("llm_swept_calls", "Calls that a sweeper ended, by state.", ["state"], registry=registry)
        for state in (CallState.SETTLED, CallState.UNKNOWN_OUTCOME):
            self.swept.labels(state.name)  # there from the start, so that the first one is an increase
        self.conversation_mismatches = Gauge(
            "llm_conversation_mismatches", "Conversations last used whose totals are not those of their calls.",
            registry=registry,
        )
        self._running = Gauge(
            "llm_running_calls", "Calls with a hold and no settlement yet.", registry=registry,
            multiprocess_mode="livesum",
        )
        self._held = Gauge(
            "llm_held_micros", "Micro-credits that running calls hold.", registry=registry, multiprocess_mode="livesum"
        )
        self._tasks = Gauge(
            "llm_tasks", "Tasks of the event loop.", registry=registry, multiprocess_mode="livesum"
        )
        self._breaker = Gauge(
            "llm_breaker_state", "Circuit breaker of a model: 0 closed, 1 half open, 2 open.", ["model", "model_id"],
            registry=registry, multiprocess_mode="livemax",
        )

    def attempt_ended(self, call: RunningCall, attempt: RunningAttempt, *, seconds: float) -> None:
        about = _about(call.record.operation, attempt)
        alias = call.record.model
        self._child(self._duration, *about, attempt.error_reason).observe(seconds)
        self._child(self._attempts, alias, attempt.kind.name, attempt.error_reason or "OK").inc()
        if attempt.first_token_seconds is None:
            return
        first = attempt.first_token_seconds - attempt.started_seconds
        self._child(self._first_token, *about).observe(first)
        tokens = attempt.usage.output_tokens if attempt.usage else attempt.counted_output_tokens
        if tokens > 1 and call.record.streamed:
            self._child(self._gap, *about).observe((seconds - first) / (tokens - 1))

    def call_ended(self, call: RunningCall, record: CallRecord, *, seconds: float) -> None:
        alias = record.model
        self._child(
            self._calls, record.operation.name, alias, record.state.name, record.finish_reason.name
        ).inc()
        if call.first_token_seconds is not None:
            self._child(self._latency, alias).observe(call.first_token_seconds - call.started_seconds)
        if call.queued_seconds:
            self._child(self._queue, alias).observe(call.queued_seconds)
        if record.charge is None or call.attempt is None:
            return
        about = _about(record.operation, call.attempt)
        self._child(self._tokens, *about, "input").observe(record.usage.input_tokens)
        self._child(self._tokens, *about, "output").observe(record.usage.output_tokens)
        self._child(self._charged, alias, record.charge.status.name).inc(record.charge.credit_micros)
        if record.usage.source is UsageSource.ESTIMATED:
            self._child(self._estimated, alias).inc()

    def _child(self, metric: Any, *labels: str) -> Any:
        """As metric.labels(...), without its lock and its checks after the first time."""
        key = (id(metric), labels)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = metric.labels(*labels)
        return child

    def malformed(self, call: RunningCall, events: int) -> None:
        self._malformed.labels(call.record.model).inc(events)

    def show(self, running: RunningCalls, models: ModelDirectory, health: ModelHealth) -> None:
        """What stands now; called with every heartbeat."""
        calls = running.all()
        self._running.set(len(calls))
        self._tasks.set(len(asyncio.all_tasks()))
        self._held.set(sum(call.record.hold_micros for call in calls))
        for deployment in models.directory.all():
            self._breaker.labels(deployment.alias, deployment.model_id).set(int(health.state(deployment)))


def _about(operation: Operation, attempt: RunningAttempt) -> tuple[str, str, str]:
    deployment = attempt.deployment
    return (
        "embeddings" if operation is Operation.EMBED else "chat",
        deployment.price_provider.lower() or PROVIDER_NAMES[deployment.provider], deployment.upstream_model,
    )
