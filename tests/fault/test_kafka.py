"""A real Apache Kafka broker between the services, and what can go wrong with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from confluent_kafka import Consumer, Producer
from creditmesh.events.v1 import charge_requested_pb2

from deploy.local.kafka import Kafka
from servicekit.core.faults import FaultPoint
from tests.support.load import Load, assert_exactly_once, wait_until
from tests.support.mesh import Mesh
from tests.support.ports import free_port
from tests.support.upstream import Upstream

TOPIC = "creditmesh.charges.v1"


@pytest.fixture
def own_kafka(scratch: Path) -> Iterator[Kafka]:
    """A broker that a test may kill."""
    broker = Kafka(scratch / f"kafka-{uuid4().hex[:8]}", port=free_port())
    broker.start()
    yield broker
    broker.stop()


def prepared(
    new_mesh: Callable[..., Mesh], upstream: Upstream, broker: Kafka, prefix: str
) -> tuple[Mesh, Load, str]:
    topics = f"{prefix}."
    servers = broker.bootstrap_servers
    mesh = new_mesh(
        LLM_KAFKA_BOOTSTRAP_SERVERS=servers, TOKENSTORE_KAFKA_BOOTSTRAP_SERVERS=servers,
        LLM_KAFKA_TOPIC_PREFIX=topics, TOKENSTORE_KAFKA_TOPIC_PREFIX=topics, TOKENSTORE_KAFKA_GROUP=prefix,
    )
    mesh.start()
    mesh.register("pro", upstream.base_url, "ok,words=10,pause=0.01")
    load = Load(mesh, prefix)
    load.give_credit()
    return mesh, load, topics + TOPIC


def produce(broker: Kafka, topic: str, messages: list[tuple[bytes | None, bytes, list[tuple[str, bytes]]]]) -> None:
    producer = Producer({"bootstrap.servers": broker.bootstrap_servers, "partitioner": "murmur2_random"})
    for key, value, headers in messages:
        producer.produce(topic, value, key, headers=list(headers))
    assert producer.flush(20) == 0


def charge(user: str, event_id: str, *, output_tokens: int = 10) -> tuple[bytes, bytes, list[tuple[str, bytes]]]:
    event = charge_requested_pb2.ChargeRequested(
        event_id=event_id, user_id=user, scene="chat", provider="LOCAL", model="pro",
        usage={"input_tokens": 10, "output_tokens": output_tokens},
    )
    return user.encode(), event.SerializeToString(), [("ce_type", b"credit.charge.requested")]


def entries_of(mesh: Mesh, user: str) -> dict[str, Any]:
    return {entry.event_id: entry for entry in mesh.transactions(user)}


def test_charges_go_through_kafka_to_the_ledger(
    new_mesh: Callable[..., Mesh], upstream: Upstream, kafka: Kafka
) -> None:
    mesh, load, _topic = prepared(new_mesh, upstream, kafka, "through")
    load.run(60)
    result = assert_exactly_once(load, upstream)
    assert result.charged == load.outcomes["ok"] == 60
    assert "kafka_assigned" in mesh.tokenstore.text()


def test_duplicates_disorder_conflicts_and_poison(
    new_mesh: Callable[..., Mesh], upstream: Upstream, kafka: Kafka
) -> None:
    mesh, _load, topic = prepared(new_mesh, upstream, kafka, "poison")
    first, second = charge("bob", "e1"), charge("bob", "e2")
    json_event = b'{"event_id":"e3","user_id":"bob","usage":{"input_tokens":"5"},"unknown":1}'
    produce(kafka, topic, [
        second, first, first, second, charge("bob", "e1", output_tokens=11),
        (b"bob", b"\xff\xfe not protobuf", [("x", b"y")]), (None, b"", []),
        (b"bob", json_event, [("content-type", b"application/json")]), first,
    ])
    wait_until(lambda: len(entries_of(mesh, "bob")) == 3, what="three entries")
    entries = entries_of(mesh, "bob")
    assert set(entries) == {"e1", "e2", "e3"}
    assert entries["e1"].usage.output_tokens == 10
    issues = mesh.rows(mesh.tokenstore_url, "SELECT event_id, kind FROM tokenstore.charge_issue")
    assert issues == [("e1", "CONFLICT")]
    assert mesh.findings() == []
    dead = read_all(kafka, "poison.creditmesh.dlq.v1", expected=2)
    values = {bytes(message.value() or b"") for message in dead}
    assert values == {b"\xff\xfe not protobuf", b""}
    headers = dict(next(message for message in dead if message.value()).headers())
    assert headers["x"] == b"y"
    assert headers["dlq_topic"] == topic.encode()


def read_all(broker: Kafka, topic: str, *, expected: int) -> list[Any]:
    consumer = Consumer({
        "bootstrap.servers": broker.bootstrap_servers, "group.id": uuid4().hex, "auto.offset.reset": "earliest",
        "group.protocol": "consumer",
    })
    consumer.subscribe([topic])
    found: list[Any] = []
    give_up_at = time.monotonic() + 20
    while len(found) < expected and time.monotonic() < give_up_at:
        found += [message for message in consumer.consume(100, timeout=0.5) if message.error() is None]
    consumer.close()
    assert len(found) == expected
    return found


@pytest.mark.parametrize("point", [FaultPoint.BEFORE_APPLY_COMMIT, FaultPoint.AFTER_APPLY_COMMIT])
def test_the_consumer_is_killed_around_its_commit(
    new_mesh: Callable[..., Mesh], upstream: Upstream, kafka: Kafka, point: FaultPoint
) -> None:
    mesh, load, _topic = prepared(new_mesh, upstream, kafka, f"consumer-{point}")
    load.run(10)
    mesh.tokenstore.kill()
    mesh.tokenstore.start(TOKENSTORE_FAULT=f"{point}:15")
    mesh.wait_until_serving()
    load.run(60)
    assert mesh.tokenstore.wait() == -9
    mesh.tokenstore.start()
    mesh.wait_until_serving()
    load.run(10)
    assert_exactly_once(load, upstream)


def test_the_broker_is_killed_and_restarted_under_load(
    new_mesh: Callable[..., Mesh], upstream: Upstream, own_kafka: Kafka
) -> None:
    mesh, load, _topic = prepared(new_mesh, upstream, own_kafka, "broker")
    thread = load.run_in_background(300)
    wait_until(lambda: load.outcomes["ok"] >= 50)
    own_kafka.kill()
    thread.join(60)
    assert load.outcomes["ok"] == 300, f"the calls themselves do not need the broker: {load.outcomes}"
    assert mesh.outbox_size() > 0
    own_kafka.start()
    result = assert_exactly_once(load, upstream)
    assert result.charged == 300


def test_two_consumers_and_a_rebalance_in_between(
    new_mesh: Callable[..., Mesh], upstream: Upstream, kafka: Kafka
) -> None:
    mesh, load, topic = prepared(new_mesh, upstream, kafka, "rebalance")
    load.users = 32
    load.give_credit()
    second = new_mesh()
    second.tokenstore.environ.update({
        name: mesh.tokenstore.environ[name]
        for name in mesh.tokenstore.environ if name.startswith("TOKENSTORE_") and name != "TOKENSTORE_LISTEN"
    })
    thread = load.run_in_background(600)
    wait_until(lambda: load.outcomes["ok"] >= 100)
    second.tokenstore.start()
    wait_until(lambda: "kafka_assigned" in second.tokenstore.text(), what="the second consumer's partitions")
    wait_until(lambda: load.outcomes["ok"] >= 400)
    second.tokenstore.kill()
    thread.join(60)
    result = assert_exactly_once(load, upstream)
    assert result.charged == load.outcomes["ok"] == 600
    moved = mesh.rows(
        mesh.tokenstore_url, "SELECT sum(next_offset) FROM tokenstore.consumer_offset WHERE topic = %s", (topic,)
    )
    assert moved[0][0] >= 600
