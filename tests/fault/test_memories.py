"""Jobs under kill -9, several workers on one user, Kafka between: each turn once, each call charged once."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from confluent_kafka import Producer
from creditmesh.memory.v1 import memory_pb2, memory_service_pb2

from deploy.local.kafka import Kafka
from servicekit.core.faults import FaultPoint
from tests.support.chat import Chat
from tests.support.load import wait_until
from tests.support.memories import contents, items, job_of, submit, turn, worked
from tests.support.mesh import Mesh
from tests.support.ports import free_port

POINTS = [
    f"{point}:{count}" for point, counts in (
        (FaultPoint.JOB_CLAIMED, (1, 2)), (FaultPoint.BEFORE_ASKING, (1, 3)), (FaultPoint.ANSWERED, (1, 2, 3)),
        (FaultPoint.ANSWER_KEPT, (1, 3)), (FaultPoint.RECALLED, (1, 4)), (FaultPoint.FACT_DECIDED, (1, 3)),
        (FaultPoint.JOB_FINISHED, (1,)),
    ) for count in counts
]
SAID = ("I live in Lisbon. I like tea. Never call me early.", "I moved to Porto. I dislike tea.")
WANTED = {"The user lives in Porto", "The user dislikes tea", "Never call me early"}


def assert_remembered(mesh: Mesh, user: str, job_ids: list[str]) -> None:
    """The end that every order of crashes must lead to."""
    done = [worked(mesh, job_id, seconds=90) for job_id in job_ids]
    assert [job.state for job in done] == [memory_pb2.JOB_STATE_DONE] * len(job_ids), done
    assert set(contents(mesh, user)) == WANTED
    mesh.wait_for_rest()
    charged = [each for each in mesh.transactions(user) if each.call_id]
    kept = mesh.rows(mesh.memory_url, "SELECT call_id, credit_micros FROM memory.model_answer WHERE user_id = %s", [user])
    assert sorted(each.call_id for each in charged) == sorted(call_id for call_id, _ in kept), "each call charged once"
    assert sum(job.credit_micros for job in done) == -sum(each.amount_micros for each in charged)
    assert sum(job.calls for job in done) == len(kept)
    vectors = mesh.rows(
        mesh.memory_url, """
        SELECT count(*) FROM memory.item i WHERE user_id = %s AND status = 1
            AND NOT EXISTS (SELECT 1 FROM memory.embedding e WHERE e.user_id = i.user_id AND e.item_id = i.item_id)
        """, [user],
    )
    assert vectors == [(0,)]
    for item in items(mesh, user):
        versions = mesh.rows(
            mesh.memory_url,
            "SELECT version, closed_at IS NULL FROM memory.item_version WHERE user_id = %s AND item_id = %s ORDER BY 1",
            [user, item.item_id],
        )
        assert [version for version, _ in versions] == list(range(1, item.version + 1))
        assert [is_open for _, is_open in versions] == [False] * (item.version - 1) + [True]


@pytest.mark.timeout(500)
def test_a_worker_is_killed_at_every_point(new_mesh: Callable[..., Mesh]) -> None:
    mesh = new_mesh()
    memory = mesh.start_memory()
    for number, point in enumerate(POINTS):
        user = f"victim-{number}"
        mesh.credit(user, 10**9)
        memory.kill()
        memory.start(MEMORY_FAULT=point)
        mesh.wait_for_memory()
        # One after the other, so that the second contradicts what the first said.
        job_ids = submit(mesh, *(
            turn(user, text, f"m{second}", occurred_at={"seconds": 1_790_000_000 + second})
            for second, text in enumerate(SAID)
        ))
        assert memory.wait() == -9, f"{point} was not reached"
        mesh.execute(mesh.memory_url, "UPDATE memory.job SET due_at = now() WHERE state = 2")  # not to wait for leases
        memory.start()
        mesh.wait_for_memory()
        assert_remembered(mesh, user, job_ids)
    assert mesh.findings() == []


@pytest.mark.timeout(400)
def test_four_workers_on_one_user(new_mesh: Callable[..., Mesh]) -> None:
    """No fact twice, no update lost, no deadlock: they take turns by the user's row, and decide again when it moved."""
    mesh = new_mesh()
    mesh.start_memory()
    others = [mesh.new_memory(f"127.0.0.1:{free_port()}") for _ in range(3)]
    try:
        for other in others:
            other.start()
        mesh.credit("crowded", 10**10)
        texts = [f"I like tea number {number % 7}. I live in Town{number}." for number in range(40)]
        # All at once, and all may be claimed at once: the one-job-a-user rule is for fairness and is taken away here.
        job_ids = submit(mesh, *(turn("crowded", text, f"m{number}") for number, text in enumerate(texts)))
        running = threading.Event()

        def push() -> None:
            while not running.wait(0.05):
                mesh.execute(mesh.memory_url, "UPDATE memory.job SET due_at = now() WHERE state = 2 AND tries < 3")

        pushing = threading.Thread(target=push)
        pushing.start()
        try:
            for job_id in job_ids:
                assert worked(mesh, job_id, seconds=120).state == memory_pb2.JOB_STATE_DONE
        finally:
            running.set()
            pushing.join()
        found = Counter(contents(mesh, "crowded"))
        assert max(found.values()) == 1
        assert sum(text.startswith("The user likes tea number") for text in found) == 7
        assert sum(text.startswith("The user lives in") for text in found) == 1, "every older town was superseded"
        mesh.wait_for_rest()
        charged = Counter(each.call_id for each in mesh.transactions("crowded") if each.call_id)
        assert max(charged.values()) == 1
        logs = mesh.memory.text() if mesh.memory else ""
        assert "DeadlockDetected" not in logs
        assert "job_failed" not in logs
    finally:
        for other in others:
            other.stop()


def test_a_user_with_thousands_of_turns_starves_nobody(new_mesh: Callable[..., Mesh]) -> None:
    mesh = new_mesh()
    mesh.start_memory()
    mesh.credit("heavy", 10**10)
    mesh.credit("light", 10**9)
    for first in range(0, 3000, 500):
        submit(mesh, *(turn("heavy", f"I like number {n}.", f"m{n}") for n in range(first, first + 500)))
    job_id = submit(mesh, turn("light", "I like tea.", "m1"))[0]
    assert worked(mesh, job_id, seconds=20).state == memory_pb2.JOB_STATE_DONE
    left = mesh.rows(mesh.memory_url, "SELECT count(*) FROM memory.job WHERE user_id = 'heavy' AND state < 4")[0][0]
    assert left > 2000, "it came before what was submitted long before it"


def test_turns_by_kafka(new_mesh: Callable[..., Mesh], kafka: Kafka) -> None:
    servers, prefix = kafka.bootstrap_servers, "turns."
    mesh = new_mesh(**{
        f"{service}_{name}": value for service in ("LLM", "TOKENSTORE", "MEMORY") for name, value in (
            ("KAFKA_BOOTSTRAP_SERVERS", servers), ("KAFKA_TOPIC_PREFIX", prefix),
        )
    }, TOKENSTORE_KAFKA_GROUP="turns-ts", MEMORY_KAFKA_GROUP="turns-memory")
    memory = mesh.start_memory()
    mesh.credit("u", 10**9)
    Chat(mesh, "u", title="t", use_memories=True).say("I live in Lisbon.")
    wait_until(lambda: contents(mesh, "u") == ["The user lives in Lisbon"], what="the first memory")
    producer = Producer({"bootstrap.servers": servers, "partitioner": "murmur2_random"})
    topic = f"{prefix}creditmesh.turns.v1"
    event = turn("u", "I like milk.", "by-hand").SerializeToString()
    for value in (b"\xff\xfe no turn", event, event, turn("", "x", "no-user").SerializeToString()):
        producer.produce(topic, value, b"u")
    assert producer.flush(20) == 0
    wait_until(lambda: len(items(mesh, "u")) == 2, what="the second memory")
    memory.kill()
    Chat(mesh, "u", title="t", use_memories=True).say("I have a cat.")
    memory.start()
    mesh.wait_for_memory()
    wait_until(lambda: len(items(mesh, "u")) == 3, what="what was said while the worker was away")
    assert mesh.rows(mesh.memory_url, "SELECT count(*) FROM memory.job") == [(3,)]
    assert memory.text().count("turn_undecodable") == 2


def test_llm_service_away_puts_jobs_off(new_mesh: Callable[..., Mesh]) -> None:
    mesh = new_mesh()
    mesh.start_memory()
    mesh.credit("u", 10**9)
    mesh.llm.kill()
    job_id = submit(mesh, turn("u", "I like tea.", "m1"))[0]
    wait_until(lambda: job_of(mesh, job_id).reason != "", what="the failed try")
    job = job_of(mesh, job_id)
    assert (job.state, job.calls) == (memory_pb2.JOB_STATE_QUEUED, 0)
    mesh.llm.start()
    mesh.wait_until_serving()
    assert worked(mesh, job_id).state == memory_pb2.JOB_STATE_DONE
    assert contents(mesh, "u") == ["The user likes tea"]


@pytest.mark.parametrize("pairs", [[("alice", "bob"), ("bob", "alice")]])
def test_two_users_interleaved_never_meet(new_mesh: Callable[..., Mesh], pairs: Any) -> None:
    mesh = new_mesh()
    mesh.start_memory()
    for user, _ in pairs:
        mesh.credit(user, 10**9)
    ids = submit(mesh, *(
        turn(user, f"I like {user}-{number}.", f"{user}-{number}") for number in range(6) for user, _ in pairs
    ))
    for job_id in ids:
        worked(mesh, job_id)
    for user, other in pairs:
        own = items(mesh, user)
        assert sorted(each.content for each in own) == [f"The user likes {user}-{number}" for number in range(6)]
        for each in own:
            request: dict[str, Any] = {"user_id": other, "item_id": each.item_id}
            with pytest.raises(grpc.RpcError):
                mesh.memories.GetItem(memory_service_pb2.GetItemRequest(**request), timeout=10)
