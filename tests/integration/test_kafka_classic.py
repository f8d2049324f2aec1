"""The consumer beside a broker that does not know the newer protocol: the one inside librdkafka."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from servicekit.kafka.consumer import Batch, KafkaConsumer, Partition


async def consume_all() -> list[bytes | None]:
    """The 20 messages that were sent."""
    cluster = Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "ignored:1"})
    metadata: Any = await asyncio.to_thread(cluster.list_topics, "t", 10)
    servers = ",".join(f"{broker.host}:{broker.port}" for broker in metadata.brokers.values())
    for number in range(20):
        cluster.produce("t", str(number).encode(), b"k")
    assert await asyncio.to_thread(cluster.flush, 20) == 0
    offsets: dict[Partition, int] = {}
    values: list[bytes | None] = []

    async def load_offsets(partitions: Sequence[Partition]) -> Mapping[Partition, int]:
        return {partition: offsets.get(partition, 0) for partition in partitions}

    async def handle(batch: Batch) -> None:
        for move in batch.moves:
            assert offsets.get((move.topic, move.partition), 0) == move.first
            offsets[(move.topic, move.partition)] = move.next
        values.extend(record.value for record in batch.records)

    consumer = KafkaConsumer(
        bootstrap_servers=servers, group="g", topics=["t"], client_id="test", load_offsets=load_offsets, handle=handle,
        protocol="auto",
    )
    task = asyncio.create_task(consumer.run())
    async with asyncio.timeout(40):
        while len(values) < 20:
            await asyncio.sleep(0.05)
    await consumer.stop()
    await task
    return values


async def test_the_consumer_falls_back_to_the_classic_protocol() -> None:
    assert await consume_all() == [str(number).encode() for number in range(20)]


async def test_a_broker_that_fails_while_partitions_are_assigned_does_not_end_the_consumer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What librdkafka raises inside the callback comes out as something that Python can not catch by its class."""
    failures = [TopicPartition("no-such-topic", 7)]

    class FailingFirst(Consumer):
        def get_watermark_offsets(self, partition: TopicPartition, timeout: float = 10.0) -> tuple[int, int]:
            asked = failures.pop() if failures else partition
            found: Any = super().get_watermark_offsets(asked, timeout=1.0)
            return found

    monkeypatch.setattr("servicekit.kafka.consumer.Consumer", FailingFirst)
    assert await consume_all() == [str(number).encode() for number in range(20)]
    assert not failures
