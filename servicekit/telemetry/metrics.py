"""Prometheus metrics of the kit, and the endpoint that shows a process's, or a group of workers', metrics."""

from __future__ import annotations

import os
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import REGISTRY

RPC_SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class RpcMetrics:
    """Rate, errors and duration of RPCs."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.handled = Counter(
            "grpc_server_handled", "RPCs that ended, by method and code.", ["method", "code"], registry=registry
        )
        self.seconds = Histogram(
            "grpc_server_handling_seconds", "Time from arrival to the end of an RPC.", ["method"],
            buckets=RPC_SECONDS_BUCKETS, registry=registry,
        )
        self.running = Gauge(
            "grpc_server_running", "RPCs that are running.", registry=registry, multiprocess_mode="livesum"
        )


class OutboxMetrics:
    """The way of events out of a service."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.published = Counter("outbox_published", "Events that the receiver confirmed.", registry=registry)
        self.failed = Counter("outbox_publish_failures", "Attempts to publish that failed.", registry=registry)
        self.waiting = Gauge(
            "outbox_waiting", "Events that wait in the lanes of this process, as last seen.", registry=registry,
            multiprocess_mode="livesum",
        )
        self.age = Gauge(
            "outbox_oldest_seconds", "Age of the oldest waiting event, as last seen.", registry=registry,
            multiprocess_mode="livemax",
        )


class ConsumerMetrics:
    """The way of events into a service."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.consumed = Counter("kafka_consumed", "Messages that were applied.", registry=registry)
        self.dead_letters = Counter("kafka_dead_letters", "Messages that could not be decoded.", registry=registry)


def serve_metrics(address: tuple[str, int]) -> Any:
    """Serves /metrics; of all workers when PROMETHEUS_MULTIPROC_DIR is set. Returns the HTTP server."""
    registry = REGISTRY
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]  # the library has no types here
    host, port = address
    server, _thread = start_http_server(port, addr=host, registry=registry)
    return server
