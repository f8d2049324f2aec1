"""Jobs of the memory worker, its retrieval, and what a judge that errs does to memories by two policies."""

from __future__ import annotations

import statistics
import time
from typing import Any

import psycopg
from creditmesh.events.v1 import turn_completed_pb2
from creditmesh.memory.v1 import memory_service_pb2

from benchmarks.processes import Cpu
from memory_worker.clients.hashed_embedder import vector_of
from tests.support.mesh import Mesh
from tests.support.noise import run

TURNS = 2000
JOB_USERS = 200
ITEMS_OF_A_USER = 1000
READERS = 100
READS = 1000
WORDS = (
    "tea", "coffee", "jazz", "rock", "hiking", "chess", "sailing", "opera", "cats", "dogs", "rain", "snow", "bread",
    "cheese", "trains", "bikes", "novels", "poems", "maps", "clocks", "gardens", "rivers", "bridges", "lamps",
)


def memory_jobs(bench: Any, mesh: Mesh) -> list[tuple[str, str, str]]:
    for number in range(JOB_USERS):
        mesh.credit(f"memory-{number}", 10**12)
    turns = [
        turn_completed_pb2.TurnCompleted(
            user_id=f"memory-{number % JOB_USERS}", conversation_id="c", message_id=f"m{number}",
            messages=[turn_completed_pb2.TurnMessage(
                role=turn_completed_pb2.TurnMessage.ROLE_USER,
                text=f"I like {WORDS[number % len(WORDS)]} of kind {number}.",
            )],
        )
        for number in range(TURNS)
    ]
    assert mesh.memory is not None
    pids = {**{name: pid for name, pid in bench.pids.items() if name == "postgresql"},
            "llm": mesh.llm.pid, "tokenstore": mesh.tokenstore.pid, "memory": mesh.memory.pid}
    before, begun = Cpu(pids), time.monotonic()
    for first in range(0, TURNS, 500):
        request = memory_service_pb2.SubmitTurnsRequest(turns=turns[first:first + 500])
        mesh.memories.SubmitTurns(request, timeout=30)
    while mesh.rows(mesh.memory_url, "SELECT count(*) FROM memory.job WHERE state = 4")[0][0] < TURNS:
        time.sleep(0.1)
    seconds = time.monotonic() - begun
    cpu = ", ".join(f"{name} {value:.2f}" for name, value in before.milliseconds_per(TURNS).items())
    calls = mesh.rows(mesh.memory_url, "SELECT sum(calls) FROM memory.job")[0][0]
    return [(
        "turns worked, one fact each, model instant", f"{TURNS / seconds:.0f} turns/s",
        f"{TURNS} turns of {JOB_USERS} users, {calls / TURNS:.2f} model calls each, all charged (goal: 150/s); CPU"
        f" ms/turn: {cpu}",
    )]


def memory_reads(bench: Any, mesh: Mesh) -> list[tuple[str, str, str]]:
    contents = [f"The user likes {WORDS[n % len(WORDS)]} and {WORDS[(n * 7 + 3) % len(WORDS)]} number {n}"
                for n in range(ITEMS_OF_A_USER)]
    vectors = ["[" + ",".join(map(repr, vector_of(text))) + "]" for text in contents]
    with psycopg.connect(mesh.memory_url, autocommit=True, options="-c search_path=memory") as connection:
        connection.execute("CREATE TEMP TABLE sample (n int, content text, embedding vector)")
        with connection.cursor().copy("COPY sample FROM STDIN") as copy:
            for number, (text, vector) in enumerate(zip(contents, vectors, strict=True)):
                copy.write_row((number, text, vector))
        connection.execute("""
            INSERT INTO item SELECT 'reader-' || u, gen_random_uuid(), 1 + n %% 3, 't', content, md5(content), 0.8, 0.5,
                0, false, 1, 1, now(), NULL, NULL, now(), now(), NULL, '', '', NULL, 0, 'hashed/1:256', embedding, NULL
            FROM sample, generate_series(1, %s) u
        """, (READERS,))
        connection.execute("ANALYZE item")
        total = connection.execute("SELECT count(*) FROM item").fetchone()
    took: list[float] = []
    for number in range(READS):
        request = memory_service_pb2.RetrieveRequest(
            user_id=f"reader-{1 + number % READERS}", query=f"what about {WORDS[number % len(WORDS)]}?", limit=8
        )
        begun = time.perf_counter()
        mesh.memories.Retrieve(request, timeout=30)
        took.append(1000 * (time.perf_counter() - begun))
    took.sort()
    return [(
        f"Retrieve, {ITEMS_OF_A_USER} items a user, {total[0] if total else 0} in all, one at a time",
        f"p50 {statistics.median(took):.1f} ms, p99 {took[int(0.99 * READS)]:.1f} ms",
        "exact scan of the user's vectors in pgvector, 256 dimensions (goal: p99 <= 15 ms at 1 million items)",
    ), *noise()]


def noise() -> list[tuple[str, str, str]]:
    """Of a scripted judge, by policy: means of five worlds of 2 100 facts."""
    rows = []
    for flips in (0.0, 0.01, 0.05, 0.10, 0.20):
        texts = []
        for policy in ("set", "set-once", "legacy"):
            worlds = [run(policy, flips, seed=seed).per_thousand() for seed in range(5)]
            texts.append(f"{policy}: " + ", ".join(
                f"{statistics.mean(world[name] for world in worlds):.1f} {name}" for name in worlds[0]
            ))
        rows.append((f"judge wrong in {flips:.0%}, per 1 000 facts", texts[0], f"{texts[1]}; {texts[2]}"))
    return rows
