"""Prometheus metrics of jobs and retrieval. No label holds a user or content."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.registry import REGISTRY

from memory_worker.usecases.memory_ports import IndexStatus
from memory_worker.usecases.vector_index import Drift

DRIFTS = ("missing", "stale", "orphaned")
ENDS = ("DONE", "DEAD", "QUEUED", "WAITING_FOR_CREDIT")


class MemoryMetrics:
    """What is counted."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._jobs = Counter("memory_jobs", "Tries of jobs, by what became of them.", ["outcome"], registry=registry)
        for end in ENDS:
            self._jobs.labels(end)
        self.expired = Counter("memory_items_expired", "Items whose time ran out.", registry=registry)
        self.items = Gauge("memory_items", "Active items.", registry=registry)
        self.unindexed = Gauge(
            "memory_items_unindexed", "Active items without a vector of the embedder in use.", registry=registry
        )

        self.waiting = Gauge(
            "memory_index_waiting", "Items that the vector database is still to be told of.", registry=registry
        )
        self.index_failures = Counter(
            "memory_index_failures", "Searches that the vector database did not answer.", registry=registry
        )
        self._drift = Gauge(
            "memory_index_drift", "What the last comparison with the vector database found, by kind.", ["kind"],
            registry=registry,
        )
        for kind in DRIFTS:
            self._drift.labels(kind)

    def indexed(self, status: IndexStatus) -> None:
        self.items.set(status.items)
        self.unindexed.set(status.items - status.indexed)

    def drifted(self, drift: Drift) -> None:
        for kind in DRIFTS:
            self._drift.labels(kind).set(getattr(drift, kind))

    def ended(self, outcome: str) -> None:
        self._jobs.labels(outcome).inc()
