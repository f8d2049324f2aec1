"""Jobs of the memory worker, its retrieval, and what a judge that errs does to memories by two policies."""

from __future__ import annotations

import statistics
import threading
import time
from typing import Any

import numpy as np
import psycopg
from creditmesh.events.v1 import turn_completed_pb2
from creditmesh.memory.v1 import memory_service_pb2

from benchmarks.processes import Cpu
from memory_worker.clients.hashed_embedder import HashedEmbedder, vector_of
from memory_worker.clients.minilm import MiniLmEmbedder
from tests.support.mesh import Mesh
from tests.support.noise import run
from tests.support.pairs import RELATIONS, distractors, labelled_pairs

TURNS = 2000
JOB_USERS = 200
ITEMS_OF_A_USER = 1000
READERS = 1000
READS = 1000
NEAREST = 5
FLOORS = (0.1, 0.2, 0.3, 0.4, 0.5)
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
    before, begun, ages = Cpu(pids), time.monotonic(), OpenTransactions(mesh.memory_url)
    for first in range(0, TURNS, 500):
        request = memory_service_pb2.SubmitTurnsRequest(turns=turns[first:first + 500])
        mesh.memories.SubmitTurns(request, timeout=30)
    while mesh.rows(mesh.memory_url, "SELECT count(*) FROM memory.job WHERE state = 4")[0][0] < TURNS:
        time.sleep(0.1)
    seconds = time.monotonic() - begun
    longest = ages.stop()
    cpu = ", ".join(f"{name} {value:.2f}" for name, value in before.milliseconds_per(TURNS).items())
    calls = mesh.rows(mesh.memory_url, "SELECT sum(calls) FROM memory.job")[0][0]
    return [(
        "turns worked, one fact each, model instant", f"{TURNS / seconds:.0f} turns/s",
        f"{TURNS} turns of {JOB_USERS} users, {calls / TURNS:.2f} model calls each, all charged (goal: 150/s); CPU"
        f" ms/turn: {cpu}",
    ), (
        "open transactions of the worker meanwhile", f"p95 {longest[int(0.95 * len(longest))]:.1f} ms, longest"
        f" {longest[-1]:.1f} ms",
        f"age of the oldest in {len(longest)} looks, 16 jobs at once (bar: p95 < 20 ms); no model is asked in one",
    )]


class OpenTransactions:
    """Looks every some milliseconds how old the oldest open transaction of the worker is."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._ended = threading.Event()
        self._ages: list[float] = []
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        with psycopg.connect(self._url, autocommit=True) as connection:
            while not self._ended.wait(0.02):
                row = connection.execute("""
                    SELECT coalesce(max(extract(epoch FROM clock_timestamp() - xact_start)), 0) * 1000
                    FROM pg_stat_activity
                    WHERE application_name = 'memory_worker' AND state <> 'idle' AND datname = current_database()
                """).fetchone()
                self._ages.append(float(row[0]) if row else 0.0)

    def stop(self) -> list[float]:
        """Milliseconds, ascending."""
        self._ended.set()
        self._thread.join()
        return sorted(self._ages)


def memory_reads(bench: Any, mesh: Mesh) -> list[tuple[str, str, str]]:
    contents = [f"The user likes {WORDS[n % len(WORDS)]} and {WORDS[(n * 7 + 3) % len(WORDS)]} number {n}"
                for n in range(ITEMS_OF_A_USER)]
    vectors = ["[" + ",".join(map(repr, vector_of(text))) + "]" for text in contents]
    with psycopg.connect(mesh.memory_url, autocommit=True, options="-c search_path=memory") as connection:
        connection.execute("CREATE TEMP TABLE sample (n int, content text, vector vector)")
        with connection.cursor().copy("COPY sample FROM STDIN") as copy:
            for number, (text, vector) in enumerate(zip(contents, vectors, strict=True)):
                copy.write_row((number, text, vector))
        with connection.transaction():  # the worker would make vectors of items that it sees without
            # Item by item, not user by user: a user's rows lie as far apart as they would.
            connection.execute("""
                INSERT INTO item (
                    user_id, item_id, type, title, content, digest, confidence, importance, sensitivity, is_explicit,
                    status, version, valid_from, created_at, updated_at, conversation_id, message_id, confirmations
                )
                SELECT 'reader-' || u, uuidv7(), 1 + n %% 3, 't', content, md5(content), 0.8, 0.5, 0, false, 1, 1,
                    now(), now(), now(), '', '', 0
                FROM sample, generate_series(1, %s) u ORDER BY n
            """, (READERS,))
            connection.execute("""
                INSERT INTO embedding
                SELECT user_id, %s, item_id, 1, true, type, 0, NULL, vector FROM item JOIN sample USING (content)
                WHERE user_id LIKE 'reader-%%' ORDER BY n
            """, (HashedEmbedder.name,))
        connection.execute("VACUUM ANALYZE item, embedding")
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
    ), *recalls(), *noise()]


def recalls() -> list[tuple[str, str, str]]:
    """Whether the memory that a new one is about is among the five nearest, on 60 labelled pairs of each relation."""
    pairs, embedder = labelled_pairs(), MiniLmEmbedder()
    rows = []
    for name, make in (("minilm", embedder.vectors), ("hashed", lambda texts: [vector_of(text) for text in texts])):
        old, new, others = (
            np.array(make(texts)) for texts in ([a for a, _, _ in pairs], [b for _, b, _ in pairs], distractors(1000))
        )
        themes = np.array(make(list(dict.fromkeys(a for a, _, _ in pairs))))
        own = (old * new).sum(axis=1)
        for count in (50, 200, 1000):
            beside = new @ np.concatenate([themes, others[:count]]).T
            # Its own memory is among the themes, too, as near as itself: that one does not count.
            hit = (beside > own[:, None] + 1e-6).sum(axis=1) < NEAREST
            for relation in RELATIONS[:3] if count == 200 else ("conflict",):
                of = np.array([each == relation for _, _, each in pairs])
                told = ", ".join(
                    f"{100 * float((hit & (own >= floor))[of].mean()):.0f} % above {floor}" for floor in FLOORS
                )
                rows.append((
                    f"recall@5 of {relation}, {name}, {count} distractors", f"{100 * float(hit[of].mean()):.0f} %", told
                ))
    return rows


def noise() -> list[tuple[str, str, str]]:
    """Of a scripted judge, by policy and judgements that must agree: means of ten worlds of 2 100 facts."""
    rows = []
    for flips in (0.0, 0.01, 0.05, 0.10, 0.20):
        texts = []
        for policy in ("set-3", "set-2", "set-1", "legacy"):
            worlds = [run(policy, flips, seed=seed).per_thousand() for seed in range(10)]
            texts.append(f"{policy}: " + ", ".join(
                f"{statistics.mean(world[name] for world in worlds):.1f} {name}" for name in worlds[0]
            ))
        rows.append((f"judge wrong in {flips:.0%}, per 1 000 facts", texts[0], "; ".join(texts[1:])))
    return rows
