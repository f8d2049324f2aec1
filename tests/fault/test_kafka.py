"""A real Apache Kafka broker between the services, and what can go wrong with it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from confluent_kafka import Consumer, Producer
from creditmesh.events.v1 import balance_changed_pb2, charge_requested_pb2, reward_requested_pb2, usage_recorded_pb2
from creditmesh.tokenstore.v1 import charge_service_pb2, pricing_service_pb2

from deploy.local.kafka import Kafka
from servicekit.core.faults import FaultPoint
from tests.support.load import Load, assert_exactly_once, wait_until
from tests.support.mesh import ROOT, Mesh
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
        *[(key.encode(), first[1], first[2]) for key in "abcdef"],  # the same event over other partitions
    ])
    wait_until(lambda: len(entries_of(mesh, "bob")) == 3, what="three entries")
    entries = entries_of(mesh, "bob")
    assert set(entries) == {"e1", "e2", "e3"}
    assert entries["e1"].usage.output_tokens == 10
    issues = mesh.rows(mesh.tokenstore_url, "SELECT event_id, kind FROM tokenstore.charge_issue ORDER BY kind")
    assert issues == [("e1", "CONFLICT"), ("", "UNDECODABLE"), ("", "UNDECODABLE")]
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


@pytest.mark.parametrize("point", [FaultPoint.APPLY_WRITTEN, FaultPoint.AFTER_APPLY_COMMIT])
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


def test_usage_and_rewards_of_other_services_come_by_kafka_and_balances_go_out(
    new_mesh: Callable[..., Mesh], upstream: Upstream, kafka: Kafka
) -> None:
    mesh = new_mesh(
        TOKENSTORE_KAFKA_BOOTSTRAP_SERVERS=kafka.bootstrap_servers, TOKENSTORE_KAFKA_TOPIC_PREFIX="foreign.",
        TOKENSTORE_KAFKA_GROUP="foreign", TOKENSTORE_LOW_BALANCE_CREDITS="1",
    )
    mesh.tokenstore.start()
    mesh.wait_for_tokenstore()
    wait_until(lambda: "kafka_assigned" in mesh.tokenstore.text(), what="partitions")
    mesh.prices.CreatePriceRule(pricing_service_pb2.CreatePriceRuleRequest(price_rule={
        "currency": "CNY", "credits_per_currency_unit": 100, "scene": "usage", "model": "voice",
        "unit_prices": [{"unit_type": "second", "price_micros": 10_000}],
    }, idempotency_key="voice"), timeout=10)
    usage_topic, rewards_topic = "foreign.creditmesh.usage.v1", "foreign.creditmesh.rewards.v1"
    json_type = ("content-type", b"application/json")
    document = (
        b'{"eventId":"u1","userId":"carol","productId":"voice","usageAmount":1.5,"unitType":"second","traceId":"t"}'
    )
    message = usage_recorded_pb2.UsageRecorded(
        user_id="carol", product_id="voice", usage_amount="0.25", unit_type="second"
    )
    produce(kafka, usage_topic, [
        (b"carol", document, [("ce_type", b"billing.usage.recorded"), json_type]),
        (b"carol", document, [json_type]),
        (b"carol", message.SerializeToString(), [("ce_id", b"u2")]),
        (b"carol", message.SerializeToString(), []),  # nobody says which event it is
    ])
    reward = reward_requested_pb2.RewardRequested(
        event_id="forum.post.liked:7:dave", user_id="carol", source="forum_like", source_ref_id="7"
    )
    produce(kafka, rewards_topic, [
        (b"carol", reward.SerializeToString(), [("ce_type", b"billing.reward.requested")]),
        (b"carol", reward.SerializeToString(), []),
        (b"carol", b'{"event_id":"x","user_id":"carol","source":"unheard_of"}', [json_type]),
    ])
    wait_until(lambda: len(entries_of(mesh, "carol")) == 3, what="three entries")
    entries = entries_of(mesh, "carol")
    assert {event: entry.amount_micros for event, entry in entries.items()} == {
        "u1": -1_500_000, "u2": -250_000, "forum.post.liked:7:dave": 1_000_000
    }
    assert entries["u1"].details == '{"traceId":"t"}'
    assert entries["forum.post.liked:7:dave"].actor == "kafka"
    request = charge_service_pb2.ListChargeIssuesRequest(kind=charge_service_pb2.CHARGE_ISSUE_KIND_UNDECODABLE)
    wait_until(lambda: len(mesh.charges.ListChargeIssues(request, timeout=5).issues) == 2, what="the issues")
    details = {issue.detail for issue in mesh.charges.ListChargeIssues(request, timeout=5).issues}
    assert any("event_id" in detail for detail in details)
    assert any("no reward" in detail for detail in details)
    # The balance fell below a threshold, and was told to whoever wants it.
    told = [
        balance_changed_pb2.BalanceChanged.FromString(message.value())
        for message in read_some(kafka, "foreign.creditmesh.balances.v1", until=lambda found: len(found) >= 2)
    ]
    assert {event.user_id for event in told} == {"carol"}
    assert 1_000_000 in {event.fell_below_micros for event in told}
    assert mesh.findings() == []


def read_some(broker: Kafka, topic: str, *, until: Callable[[list[Any]], bool]) -> list[Any]:
    consumer = Consumer({
        "bootstrap.servers": broker.bootstrap_servers, "group.id": uuid4().hex, "auto.offset.reset": "earliest",
        "group.protocol": "consumer",
    })
    consumer.subscribe([topic])
    found: list[Any] = []
    give_up_at = time.monotonic() + 20
    while not until(found) and time.monotonic() < give_up_at:
        found += [message for message in consumer.consume(100, timeout=0.5) if message.error() is None]
    consumer.close()
    return found


BREAK = """
CREATE FUNCTION tokenstore.break() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN IF NEW.event_id = 'broken' THEN RAISE EXCEPTION 'no' USING ERRCODE = '22000'; END IF; RETURN NEW; END $$;
CREATE TRIGGER break BEFORE INSERT ON tokenstore.ledger_entry FOR EACH ROW EXECUTE FUNCTION tokenstore.break()
"""


def test_what_the_database_never_takes_is_passed_by_and_sent_again_later(
    new_mesh: Callable[..., Mesh], upstream: Upstream, kafka: Kafka
) -> None:
    mesh, _load, topic = prepared(new_mesh, upstream, kafka, "permanent")
    mesh.execute(mesh.tokenstore_url, BREAK)
    produce(kafka, topic, [charge("erin", "before"), charge("erin", "broken"), charge("erin", "after"),
                           charge("frank", "other")])
    wait_until(lambda: set(entries_of(mesh, "erin")) == {"before", "after"}, what="the others")
    wait_until(lambda: len(entries_of(mesh, "frank")) == 1, what="the other account")
    read_all(kafka, "permanent.creditmesh.dlq.v1", expected=1)
    mesh.execute(mesh.tokenstore_url, "DROP TRIGGER break ON tokenstore.ledger_entry")
    environ = {
        **os.environ, "TOKENSTORE_KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
        "TOKENSTORE_KAFKA_TOPIC_PREFIX": "permanent.",
    }

    def replay(*arguments: str) -> str:
        program = "from tokenstore_service.cli import main; main()"
        return subprocess.run(
            [sys.executable, "-c", program, "replay", *arguments], cwd=ROOT, env=environ, capture_output=True,
            text=True, check=True, timeout=60,
        ).stdout

    assert "1 would be sent" in replay("--dead-letters", "--dry-run")
    assert "1 sent again" in replay("--dead-letters", "--reason", "booked")
    wait_until(lambda: set(entries_of(mesh, "erin")) == {"before", "after", "broken"}, what="the broken one")
    request = charge_service_pb2.ListChargeIssuesRequest(user_id="erin")
    (issue,) = mesh.charges.ListChargeIssues(request, timeout=5).issues
    done = mesh.charges.ResolveChargeIssue(charge_service_pb2.ResolveChargeIssueRequest(
        issue_id=issue.issue_id, action=charge_service_pb2.CHARGE_ISSUE_ACTION_RETRY
    ), timeout=5)
    assert done.result.status == charge_service_pb2.RECORD_STATUS_DUPLICATE, "it was read again, and is there already"
    assert done.issue.state == charge_service_pb2.CHARGE_ISSUE_STATE_RESOLVED
    replay("--topic", topic, "--since", "2026-01-01T00:00:00Z")
    time.sleep(1.0)
    assert len(entries_of(mesh, "erin")) == 3, "what was applied is not applied twice"
    assert mesh.findings() == []
