"""Milvus beside PostgreSQL: refused, frozen, emptied, wrong. Whatever it does, what is found is the same."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from creditmesh.memory.v1 import memory_service_pb2 as pb
from pymilvus import MilvusClient

from memory_worker.clients.hashed_embedder import HashedEmbedder, vector_of
from memory_worker.clients.milvus import user_key
from tests.support.load import wait_until
from tests.support.memories import index_status, items, remember
from tests.support.mesh import Mesh
from tests.support.milvus import Milvus

COLLECTION = "creditmesh_" + "".join(letter if letter.isalnum() else "_" for letter in HashedEmbedder.name)
KINDS = ("tea", "jazz", "chess", "opera", "hiking", "sailing", "novels", "cats")
QUERY = "does the user like jazz from the south?"
SEARCH_SECONDS = 1.0


def told(mesh: Mesh) -> bool:
    status = index_status(mesh)
    return bool(status.waiting == 0 and status.indexed == status.items)


def make(mesh: Mesh, user: str, content: str) -> Any:
    item = {"user_id": user, "type": "MEMORY_TYPE_PREFERENCE", "content": content}
    return mesh.memories.CreateItem(pb.CreateItemRequest(item=item), timeout=10).item


def look(mesh: Mesh, user: str = "u") -> tuple[list[str], bool, float]:
    """What is found, whether degraded, and the seconds that took."""
    begun = time.monotonic()
    answer = mesh.memories.Retrieve(pb.RetrieveRequest(user_id=user, query=QUERY, limit=3), timeout=10)
    return [each.item.content for each in answer.items], answer.degraded, time.monotonic() - begun


@pytest.fixture
def mesh(new_mesh: Callable[..., Mesh], milvus: Milvus) -> Mesh:
    made = new_mesh()
    made.start_memory(
        MEMORY_VECTOR_INDEX="milvus", MEMORY_MILVUS_URI=milvus.uri, MEMORY_MILVUS_SEARCH_SECONDS=str(SEARCH_SECONDS),
        MEMORY_COMPARE_SECONDS="1",
    )
    for user in ("u", "other"):
        for number, kind in enumerate(KINDS):
            make(made, user, f"The user likes {kind} from the south, number {number}")
    wait_until(lambda: told(made), what="the index")
    return made


def test_a_search_is_the_index_and_the_live_rows(mesh: Mesh, milvus: Milvus) -> None:
    wait_until(lambda: not look(mesh)[1], what="an answer of the index")
    found, degraded, _ = look(mesh)
    assert not degraded
    assert found[0] == "The user likes jazz from the south, number 1"
    # What is deleted is not served, even while the index still has it.
    [jazz] = [each for each in items(mesh, "u") if "jazz" in each.content]
    client = MilvusClient(milvus.uri)
    mesh.memories.DeleteItem(pb.DeleteItemRequest(user_id="u", item_id=jazz.item_id), timeout=10)
    assert all("jazz" not in each for each in look(mesh)[0])
    wait_until(lambda: told(mesh) and not client.get(COLLECTION, ids=[jazz.item_id]), what="the deletion in the index")
    mesh.memories.RestoreItem(pb.RestoreItemRequest(user_id="u", item_id=jazz.item_id), timeout=10)
    wait_until(lambda: told(mesh) and bool(client.get(COLLECTION, ids=[jazz.item_id])), what="its return")
    # Nothing in the index names a user or says what was said.
    rows = client.query(COLLECTION, filter='item_id > ""', output_fields=["*"], limit=100)
    assert {row["user_key"] for row in rows} == {user_key("u"), user_key("other")}
    assert {name for row in rows for name in row} == {"item_id", "user_key", "type", "version", "vector"}
    client.close()


def test_jobs_recall_by_the_index(mesh: Mesh) -> None:
    mesh.credit("u", 10**9)
    job = remember(mesh, "u", "I dislike jazz from the south, number 1.", "m1")
    assert [each.recall for each in job.decisions] == ["index"]
    assert "The user likes jazz from the south, number 1" not in [each.content for each in items(mesh, "u")]


def test_refused(mesh: Mesh, milvus: Milvus) -> None:
    before, _, _ = look(mesh)
    milvus.kill()
    after, degraded, seconds = look(mesh)
    assert (after, degraded) == (before, True), "the same, told as degraded"
    assert seconds < SEARCH_SECONDS + 0.5
    new = make(mesh, "u", "The user likes jazz from the south very much")
    assert new.content in look(mesh)[0]
    assert index_status(mesh).waiting == 1
    with pytest.raises(grpc.RpcError) as refused:
        index_status(mesh, compare=True)
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
    # An erasure does not wait for it, and says what is still to be done.
    assert mesh.memories.EraseUser(pb.EraseUserRequest(user_id="other"), timeout=20).index_pending
    milvus.start()
    wait_until(lambda: told(mesh), what="the index, told of all", seconds=60)
    client = MilvusClient(milvus.uri)
    client.load_collection(COLLECTION)
    left = client.query(COLLECTION, filter=f'user_key == "{user_key("other")}"', output_fields=["item_id"])
    assert list(left) == []
    client.close()
    drift = index_status(mesh, compare=True).drift
    assert (drift.missing, drift.stale, drift.orphaned) == (0, 0, 0)
    wait_until(lambda: not look(mesh)[1], what="answers of the index again", seconds=20)


def test_frozen(mesh: Mesh, milvus: Milvus) -> None:
    before, _, _ = look(mesh)
    milvus.freeze()
    try:
        took = []
        for _ in range(40):
            found, degraded, seconds = look(mesh)
            assert (found, degraded) == (before, True)
            took.append(seconds)
        took.sort()
        assert took[-1] < SEARCH_SECONDS + 1.0, "nobody waits longer than the index may take"
        assert took[len(took) // 2] < SEARCH_SECONDS / 2, "and hardly anybody waits: it rests"
    finally:
        milvus.thaw()
    wait_until(lambda: not look(mesh)[1], what="answers of the index again", seconds=20)
    assert look(mesh)[0] == before


def test_emptied(mesh: Mesh, milvus: Milvus) -> None:
    """An index that lacks what is there is not believed, and is filled again."""
    before, _, _ = look(mesh)
    milvus.empty()
    assert look(mesh)[:2] == (before, True)
    wait_until(lambda: look(mesh)[:2] == (before, False), what="the index, filled again", seconds=60)
    assert index_status(mesh, compare=True).drift.missing == 0


def test_wrong(mesh: Mesh, milvus: Milvus) -> None:
    """Rows that are not there, vectors that are not theirs: never served, and mended."""
    client = MilvusClient(milvus.uri)
    foreign = {"item_id": "00000000-0000-7000-8000-000000000001", "user_key": user_key("u"), "type": 1, "version": 1,
               "vector": list(vector_of(QUERY))}
    [cats] = [each for each in items(mesh, "u") if "cats" in each.content]
    wrong = {**foreign, "item_id": cats.item_id, "version": 77}
    before, _, _ = look(mesh)
    client.upsert(COLLECTION, [foreign, wrong])
    assert look(mesh)[0] == before
    wait_until(
        lambda: not client.get(COLLECTION, ids=[foreign["item_id"]])
        and client.get(COLLECTION, ids=[cats.item_id])[0]["version"] == 1,
        what="the index, mended", seconds=30,
    )
    assert look(mesh)[:2] == (before, False)
    client.close()
