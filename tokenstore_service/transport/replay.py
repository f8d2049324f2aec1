"""Messages sent again: out of the dead letters to where they came from, or of a topic since a time. What was applied
before is a duplicate and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from tokenstore_service.wire.charges import DEAD_LETTERS_TOPIC

POLL_SECONDS = 1.0
FLUSH_SECONDS = 60.0


@dataclass(slots=True)
class Replayed:
    """How many messages were read and sent again."""

    read: int = 0
    sent: int = 0


def replay(
    bootstrap_servers: str, *, topic: str, since: datetime | None, prefix: str, dry_run: bool, reason: str = ""
) -> Replayed:
    """An empty topic = the dead letters, each to the topic that it came from; `reason` = only those whose reason holds
    this text. Raises KafkaException."""
    consumer = Consumer({
        "bootstrap.servers": bootstrap_servers, "group.id": "creditmesh-replay", "enable.auto.commit": False,
        "auto.offset.reset": "error", "enable.partition.eof": False,
    })
    producer = Producer({"bootstrap.servers": bootstrap_servers, "enable.idempotence": True, "acks": "all"})
    done = Replayed()
    failed: list[KafkaError] = []

    def delivered(error: KafkaError | None, _message: Message) -> None:
        if error is not None:
            failed.append(error)

    try:
        for message in _messages(consumer, topic or prefix + DEAD_LETTERS_TOPIC, since):
            done.read += 1
            found: Any = message.headers() or []
            headers = [(name, value) for name, value in found if isinstance(value, bytes)]
            target = topic
            if not topic:
                said = dict(headers)
                target = said.get("dlq_topic", b"").decode()
                if not target or reason.encode() not in said.get("dlq_reason", b""):
                    continue
                headers = [(name, value) for name, value in headers if not name.startswith("dlq_")]
            done.sent += 1
            if not dry_run:
                producer.produce(
                    target, message.value(), message.key(), headers=[*headers], on_delivery=delivered
                )
                producer.poll(0)
        producer.flush(FLUSH_SECONDS)
    finally:
        consumer.close()
    if failed:
        raise KafkaException(failed[0])
    return done


def _messages(consumer: Consumer, topic: str, since: datetime | None) -> Iterator[Message]:
    """What is in the topic now, from a time or from the beginning; what comes later is left alone."""
    partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
    ends: dict[int, int] = {}
    begins: list[TopicPartition] = []
    for partition in partitions:
        low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=10)
        begin = low
        if since is not None:
            (found,) = consumer.offsets_for_times(
                [TopicPartition(topic, partition, int(since.timestamp() * 1000))], timeout=10
            )
            begin = found.offset if found.offset >= 0 else high
        if begin < high:
            ends[partition] = high
            begins.append(TopicPartition(topic, partition, begin))
    consumer.assign(begins)
    while ends:
        message: Any = consumer.poll(POLL_SECONDS)
        if message is None:
            continue
        if message.error():
            raise KafkaException(message.error())
        if message.offset() < ends.get(message.partition(), 0):
            yield message
        if message.offset() >= ends.get(message.partition(), 0) - 1:
            ends.pop(message.partition(), None)
