"""Prometheus metrics of jobs and retrieval. No label holds a user or content."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.registry import REGISTRY

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

    def ended(self, outcome: str) -> None:
        self._jobs.labels(outcome).inc()
