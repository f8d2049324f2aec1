"""Erased is erased: rows, vectors, logs, and the bytes of the files that PostgreSQL and Milvus keep."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from creditmesh.memory.v1 import memory_service_pb2 as pb

from deploy.local.postgres import Postgres
from tests.support.databases import Databases
from tests.support.load import wait_until
from tests.support.memories import index_status, remember
from tests.support.mesh import Mesh
from tests.support.milvus import Milvus

CANARY, BYSTANDER = "canary-7d1f0c55e2", "bystander-93b6aa"


@pytest.fixture
def own_postgres(scratch: Path) -> Iterator[Postgres]:
    """Its log segments are removed, not used again as they are, so that what they held goes."""
    server = Postgres(scratch / "erasure", settings={"wal_recycle": "off", "shared_buffers": "32MB"})
    server.start()
    yield server
    server.stop()


def verify(mesh: Mesh, milvus: Milvus, user: str, *more: str) -> tuple[int, str]:
    environ = {"PATH": os.environ["PATH"], "MEMORY_DATABASE_URL": mesh.memory_url, "MEMORY_AUTH": "none",
               "MEMORY_VECTOR_INDEX": "milvus", "MEMORY_MILVUS_URI": milvus.uri}
    done = subprocess.run(
        [sys.executable, "-m", "memory_worker", "verify-erasure", user, *more], env=environ, capture_output=True,
        text=True, timeout=120, check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_nothing_of_an_erased_user_is_left(own_postgres: Postgres, scratch: Path, milvus: Milvus) -> None:
    logs = scratch / "erasure-logs"
    mesh = Mesh(Databases(own_postgres), logs, name="erasure", settings={})
    try:
        mesh.start_memory(MEMORY_VECTOR_INDEX="milvus", MEMORY_MILVUS_URI=milvus.uri)
        for user, word in (("gone", CANARY), ("stays", BYSTANDER)):
            mesh.credit(user, 10**9)
            remember(mesh, user, f"I like {word}. I live in {word}.", "m1")
            remember(mesh, user, f"I dislike {word}.", "m2")
        wait_until(lambda: index_status(mesh).waiting == 0, what="the index")
        everywhere = [part for folder in (scratch / "erasure", milvus.folder, logs) for part in ("--files", str(folder))]
        code, text = verify(mesh, milvus, "gone", "--canary", CANARY, *everywhere, "--rewrite")
        assert code == 1
        for place in ("memory.item", "memory.item_version", "memory.decision", "memory.model_answer",
                      "vectors in the vector database", "in the file"):
            assert place in text, "what is there is found, or the search proves nothing"
        assert str(logs) not in text, "no log has ever held it"
        assert str(milvus.folder) not in text, "the vector database is told no text"
        answer = mesh.memories.EraseUser(pb.EraseUserRequest(user_id="gone"), timeout=20)
        assert answer.erased["item"] == 3
        assert not answer.index_pending
        code, text = verify(mesh, milvus, "gone", "--canary", CANARY, *everywhere)
        assert code == 1
        assert "rows in" not in text, "no row is left, but the bytes of dead ones are"
        mesh.stop()  # its connections remember nothing, but its last transactions would be in the way of the rewriting
        code, text = verify(mesh, milvus, "gone", "--canary", CANARY, *everywhere, "--rewrite")
        assert (code, text.startswith("nothing of gone is left")) == (0, True), text
        with psycopg.connect(mesh.memory_url) as connection:
            found = connection.execute("SELECT content FROM memory.item WHERE user_id = 'stays' AND status = 1").fetchall()
        assert sorted(content for (content,) in found) == [f"The user dislikes {BYSTANDER}", f"The user lives in {BYSTANDER}"]
        code, text = verify(mesh, milvus, "stays")
        assert code == 1
    finally:
        mesh.stop()


def test_verify_erasure_says_what_it_needs(databases: Databases) -> None:
    environ = {"PATH": os.environ["PATH"], "MEMORY_DATABASE_URL": databases.make("memory"), "MEMORY_AUTH": "none"}
    command = [sys.executable, "-m", "memory_worker", "verify-erasure", "u", "--files", "."]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "needs --canary" in done.stderr) == (2, True)
    done = subprocess.run(command[:-2], env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "nothing of u is left in rows\n")
