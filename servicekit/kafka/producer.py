"""The outbox's way into Kafka: idempotent, acks=all, each message confirmed by its own delivery report."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from datetime import UTC
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer

from servicekit.core.errors import DependencyUnavailable
from servicekit.kafka.events import Headers, event_headers
from servicekit.outbox.message import OutboxMessage

DELIVERY_TIMEOUT_MS = 30_000


class KafkaProducer:
    """A producer with a thread of its own for delivery reports."""

    def __init__(self, bootstrap_servers: str, *, client_id: str, extra: dict[str, Any] | None = None) -> None:
        self._producer = Producer({
            "bootstrap.servers": bootstrap_servers,
            "client.id": client_id,
            "enable.idempotence": True,
            "acks": "all",
            "linger.ms": 2,
            "delivery.timeout.ms": DELIVERY_TIMEOUT_MS,
            "partitioner": "murmur2_random",  # as Java's clients, so that tools agree on partitions
            "log.connection.close": False,
            **(extra or {}),
        })
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="kafka-producer", daemon=True)
        self._thread.start()

    async def send(
        self, records: Sequence[tuple[str, bytes | None, bytes | None, Headers]]
    ) -> list[Exception | None]:
        """Sends (topic, key, value, headers) each; for each None, or why the broker did not confirm it."""
        loop = asyncio.get_running_loop()
        finished: asyncio.Future[None] = loop.create_future()
        outcomes: list[Exception | None] = [None] * len(records)
        left = len(records)
        lock = threading.Lock()

        def finish() -> None:
            if not finished.done():
                finished.set_result(None)

        def report(index: int, error: KafkaError | None) -> None:
            nonlocal left
            if error is not None:
                outcomes[index] = KafkaException(error)
            with lock:
                left -= 1
                last = left == 0
            if last:
                loop.call_soon_threadsafe(finish)

        for index, (topic, key, value, headers) in enumerate(records):
            def delivered(error: KafkaError | None, _message: Any, index: int = index) -> None:
                report(index, error)

            try:
                self._producer.produce(topic, value, key, headers=list(headers), on_delivery=delivered)
            except (BufferError, KafkaException) as error:
                report(index, None)
                outcomes[index] = error
        if records:
            await finished
        return outcomes

    async def reachable(self) -> bool:
        """Whether a broker answers."""
        try:
            await asyncio.to_thread(self._producer.list_topics, timeout=1.5)
        except KafkaException:
            return False
        return True

    def close(self) -> None:
        self._producer.flush(5.0)
        self._closing.set()
        self._thread.join(timeout=5.0)

    def _poll(self) -> None:
        while not self._closing.is_set():
            self._producer.poll(0.1)


class KafkaPublisher:
    """Publishes outbox messages as CloudEvents, keyed by their key."""

    def __init__(self, producer: KafkaProducer, *, source: str) -> None:
        self._producer = producer
        self._source = source

    async def publish(self, messages: Sequence[OutboxMessage]) -> Sequence[Exception | None]:
        outcomes = await self._producer.send([
            (
                message.topic, message.key.encode(), message.payload,
                event_headers(
                    event_id=message.event_id, event_type=message.event_type, source=self._source,
                    time=message.created_at.astimezone(UTC), traceparent=message.traceparent,
                ),
            )
            for message in messages
        ])
        if outcomes and all(outcome is not None for outcome in outcomes):
            raise DependencyUnavailable("Kafka") from outcomes[0]
        return outcomes
