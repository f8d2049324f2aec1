"""A consumer whose offsets are committed in the same transaction as its effects.

The handler gets a batch with, for each partition, the offset that it begins at and the one after it; it moves the
stored offset from the one to the other in its own transaction (`OffsetStore`), or raises StaleConsumer when the stored
offset is another: then this consumer is a zombie, or lost an answer, and starts again from what is stored.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition

from servicekit.core.backoff import Backoff
from servicekit.core.offsets import OffsetMove, StaleConsumer
from servicekit.telemetry.logs import EventLogger

log = EventLogger(__name__)

Partition = tuple[str, int]
POLL_SECONDS = 0.1
LEAVE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class KafkaRecord:
    """One message, as it came."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]


@dataclass(frozen=True, slots=True)
class Batch:
    """Records in order per partition, and what they do to the offsets."""

    records: Sequence[KafkaRecord]
    moves: Sequence[OffsetMove]


def _bytes(value: Any) -> bytes | None:
    return value.encode() if isinstance(value, str) else value


class KafkaConsumer:
    """Consumes topics in a thread of its own and hands batches to a coroutine of the event loop, one at a time."""

    def __init__(
        self, *, bootstrap_servers: str, group: str, topics: Sequence[str], client_id: str,
        load_offsets: Callable[[Sequence[Partition]], Awaitable[Mapping[Partition, int]]],
        handle: Callable[[Batch], Awaitable[None]], most_records: int = 1000, protocol: str = "auto",
    ) -> None:
        self._bootstrap_servers = bootstrap_servers
        self._group = group
        self._topics = list(topics)
        self._client_id = client_id
        self._load_offsets = load_offsets
        self._handle = handle
        self._most_records = most_records
        self._protocol = protocol
        self._stopping = threading.Event()
        self._stop_asked = asyncio.Event()
        self._ended = asyncio.Event()
        self._next: dict[Partition, int] = {}
        self._not_assigned: Exception | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.assigned: frozenset[Partition] = frozenset()

    async def run(self) -> None:
        """Consumes until it is cancelled or stopped."""
        self._loop = asyncio.get_running_loop()
        self._ended.clear()
        finished = self._loop.create_future()
        thread = threading.Thread(target=self._run_thread, args=(finished,), name="kafka-consumer", daemon=True)
        thread.start()
        stop_asked = asyncio.create_task(self._stop_asked.wait())
        try:
            await asyncio.wait([finished, stop_asked], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop_asked.cancel()
            self._stopping.set()
            await self._wait_for_thread(finished)
            self._ended.set()

    async def stop(self) -> None:
        """Finishes the batch at hand and leaves the group."""
        self._stopping.set()
        self._stop_asked.set()
        if self._loop is not None:
            await self._ended.wait()

    @staticmethod
    async def _wait_for_thread(finished: asyncio.Future[None]) -> None:
        """Leaving the group needs a broker; without one librdkafka would wait for a long time, and we do not."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_SECONDS):
                await asyncio.shield(finished)

    def _run_thread(self, finished: asyncio.Future[None]) -> None:
        assert self._loop is not None
        protocols = ["consumer", "classic"] if self._protocol == "auto" else [self._protocol]
        backoff = Backoff(first_seconds=0.2, most_seconds=5.0)
        while not self._stopping.is_set():
            try:
                self._consume(protocols[0], backoff)
            except KafkaException as error:
                code = error.args[0].code() if error.args and isinstance(error.args[0], KafkaError) else None
                unsupported = {KafkaError.UNSUPPORTED_VERSION, KafkaError._UNSUPPORTED_FEATURE}  # noqa: SLF001
                if code in unsupported and len(protocols) > 1:
                    log.info("kafka_classic_protocol", reason=str(error))
                    protocols.pop(0)
                    continue
                log.error("kafka_consumer_failed", reason=str(error))
                self._stopping.wait(backoff.next_seconds())
            except StaleConsumer as error:
                log.warning("kafka_consumer_stale", reason=str(error))
                self._stopping.wait(backoff.next_seconds())
            except Exception as error:  # noqa: BLE001 - logged; nothing was committed, so it begins again
                log.error("kafka_consumer_failed", error=error)
                self._stopping.wait(backoff.next_seconds())

        def finish() -> None:
            if not finished.done():
                finished.set_result(None)

        self._loop.call_soon_threadsafe(finish)

    def _consume(self, protocol: str, backoff: Backoff) -> None:
        consumer = Consumer(self._settings(protocol))
        self._next.clear()
        self._not_assigned = None
        try:
            consumer.subscribe(
                self._topics, on_assign=self._try_to_assign, on_revoke=self._on_revoke, on_lost=self._on_revoke
            )
            while not self._stopping.is_set():
                messages = consumer.consume(self._most_records, timeout=POLL_SECONDS)
                if self._not_assigned is not None:
                    raise self._not_assigned
                batch = self._batch_of(messages)
                if batch.moves:
                    self._wait_for(self._handle(batch))
                    for move in batch.moves:
                        self._next[(move.topic, move.partition)] = move.next
                    self._show_lag(consumer, batch)
                    backoff.reset()
        finally:
            consumer.close()
            self.assigned = frozenset()

    def _settings(self, protocol: str) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "bootstrap.servers": self._bootstrap_servers,
            "group.id": self._group,
            "client.id": self._client_id,
            "group.protocol": protocol,
            # Offsets are kept with the effects; what Kafka is told is a hint for lag dashboards.
            "enable.auto.commit": True,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "error",
            "isolation.level": "read_committed",
            "fetch.wait.max.ms": 20,
            "fetch.error.backoff.ms": 50,
            "log.connection.close": False,
        }
        if protocol == "classic":
            settings["partition.assignment.strategy"] = "cooperative-sticky"
        return settings

    def _try_to_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Keeps what goes wrong for `_consume`: raised here, a KafkaException would come out of consume() as a bare
        KafkaError, which is no exception that Python can catch by its class, and would end the thread for good."""
        try:
            self._on_assign(consumer, partitions)
        except Exception as error:  # noqa: BLE001 - raised again by `_consume`
            self._not_assigned = error

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        keys = [(partition.topic, partition.partition) for partition in partitions]
        stored = self._wait_for(self._load_offsets(keys))
        for partition in partitions:
            key = (partition.topic, partition.partition)
            low, _high = consumer.get_watermark_offsets(partition, timeout=10.0)
            if key not in stored or stored[key] < low:
                if stored.get(key, 0) < low:
                    log.error("kafka_records_gone", topic=key[0], partition=key[1], stored=stored.get(key, 0), low=low)
                partition.offset = OFFSET_BEGINNING if key not in stored else low
            else:
                partition.offset = stored[key]
            self._next[key] = stored.get(key, 0)
        consumer.incremental_assign(partitions)
        self.assigned = frozenset(self._next)
        log.info("kafka_assigned", partitions=sorted(f"{topic}/{number}" for topic, number in keys))

    def _on_revoke(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        for partition in partitions:
            self._next.pop((partition.topic, partition.partition), None)
        self.assigned = frozenset(self._next)
        log.info("kafka_revoked", partitions=sorted(f"{part.topic}/{part.partition}" for part in partitions))

    def _batch_of(self, messages: Sequence[Message]) -> Batch:
        records: list[KafkaRecord] = []
        ends: dict[Partition, int] = {}
        for message in messages:
            error = message.error()
            if error is not None:
                if error.retriable() or error.code() in {KafkaError._ALL_BROKERS_DOWN, KafkaError._TRANSPORT}:  # noqa: SLF001
                    log.warning("kafka_error", reason=str(error))
                    continue
                raise KafkaException(error)
            topic, partition, offset = message.topic(), message.partition(), message.offset()
            assert topic is not None
            assert partition is not None
            assert offset is not None
            if (topic, partition) not in self._next:
                continue  # revoked while it waited in librdkafka's queue
            pairs: Any = message.headers() or ()
            headers = [(key, _bytes(value) or b"") for key, value in pairs]
            records.append(
                KafkaRecord(topic, partition, offset, _bytes(message.key()), _bytes(message.value()), headers)
            )
            ends[(topic, partition)] = offset + 1
        moves = [OffsetMove(topic, number, self._next[(topic, number)], end) for (topic, number), end in ends.items()]
        return Batch(records, moves)

    def _show_lag(self, consumer: Consumer, batch: Batch) -> None:
        try:
            consumer.store_offsets(offsets=[TopicPartition(m.topic, m.partition, m.next) for m in batch.moves])
        except KafkaException:
            log.info("kafka_offset_hint_not_stored")  # revoked meanwhile; the stored offsets are what counts

    def _wait_for(self, work: Any) -> Any:
        assert self._loop is not None
        future: Future[Any] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result()
