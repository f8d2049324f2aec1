"""A broker that does not know the newer consumer protocol: the one inside librdkafka."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from confluent_kafka import Producer

from servicekit.kafka.consumer import Batch, KafkaConsumer, Partition


async def test_the_consumer_falls_back_to_the_classic_protocol() -> None:
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
    assert values == [str(number).encode() for number in range(20)]
