"""What the background check of the books says, for dashboards and alerts."""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from servicekit.core.clock import Clock
from tokenstore_service.domain.verification import Finding
from tokenstore_service.usecases.verify_ledger import Summary


class PrometheusVerifyMetrics:
    """Implements VerifyMetrics."""

    def __init__(self, *, clock: Clock, registry: CollectorRegistry = REGISTRY) -> None:
        self._clock = clock
        self._found = Counter(
            "ledger_findings", "Findings of the background check, every round anew.", ["kind"], registry=registry
        )
        self._last = Gauge(
            "ledger_last_round_findings", "Findings of the last whole round.", registry=registry,
            multiprocess_mode="mostrecent",
        )
        self._accounts = Gauge(
            "ledger_last_round_accounts", "Accounts checked in the last whole round.", registry=registry,
            multiprocess_mode="mostrecent",
        )
        self._seconds = Gauge(
            "ledger_last_round_seconds", "How long the last whole round took.", registry=registry,
            multiprocess_mode="mostrecent",
        )
        self._at = Gauge(
            "ledger_last_round_timestamp_seconds", "When the last whole round ended.", registry=registry,
            multiprocess_mode="mostrecent",
        )

    def found(self, finding: Finding) -> None:
        self._found.labels(finding.kind).inc()

    def round_finished(self, summary: Summary, *, seconds: float) -> None:
        self._last.set(summary.findings)
        self._accounts.set(summary.accounts)
        self._seconds.set(seconds)
        self._at.set(self._clock.now().timestamp())
