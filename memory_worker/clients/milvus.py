"""Milvus as the vector index. Its client blocks, so that it has threads of its own; every call has a time limit,
without which a frozen server would hold it for ever."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

import grpc
from pymilvus import DataType, MilvusClient, MilvusException

from memory_worker.domain.item import MemoryType
from memory_worker.usecases.memory_ports import IndexAway, IndexEntry, Vector

COLLECTION_MISSING = 100
MOST_THREADS = 8
PAGE = 1000
logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it logs requests, and each failure several times


def user_key(user_id: str) -> str:
    """What the index knows a user by: SHA-256, hexadecimal; no filter can be broken out of, and nobody is named."""
    return hashlib.sha256(user_id.encode()).hexdigest()


class MilvusIndex:
    """Implements VectorIndex: a collection for each embedder. `search_seconds` bounds searches, which somebody waits
    for; `seconds` everything else."""

    def __init__(self, uri: str, *, token: str, prefix: str, search_seconds: float, seconds: float) -> None:
        self._uri = uri
        self._token = token
        self._prefix = prefix
        self._search_seconds = search_seconds
        self._seconds = seconds
        self._threads = ThreadPoolExecutor(MOST_THREADS, thread_name_prefix="milvus")
        self._client: MilvusClient | None = None
        self._ready: set[str] = set()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._client is not None:
            self._client.close()

    async def search(
        self, embedder: str, user_id: str, vector: Vector, *, types: Sequence[MemoryType], most: int
    ) -> list[UUID]:
        kinds = ", ".join(str(int(each)) for each in types)

        def work(client: MilvusClient) -> list[UUID]:
            found = client.search(
                self._name_of(embedder), [list(vector)], anns_field="vector", limit=most,
                filter=f'user_key == "{user_key(user_id)}" and type in [{kinds}]', timeout=self._search_seconds,
            )
            return [UUID(hit["item_id"]) for hit in found[0]]

        found: list[UUID] = await self._do(work, self._search_seconds)
        return found

    async def put(self, embedder: str, entries: Sequence[IndexEntry]) -> None:
        name = self._name_of(embedder)
        rows = [
            {
                "item_id": str(each.item_id), "user_key": user_key(each.user_id), "type": int(each.type),
                "version": each.version, "vector": list(each.vector),
            }
            for each in entries
        ]

        def work(client: MilvusClient) -> None:
            self._make_sure_of(client, name, len(entries[0].vector))
            try:
                client.upsert(name, rows, timeout=self._seconds)
            except MilvusException as error:
                if error.code != COLLECTION_MISSING:
                    raise
                self._ready.discard(name)  # it was emptied
                self._make_sure_of(client, name, len(entries[0].vector))
                client.upsert(name, rows, timeout=self._seconds)

        await self._do(work, 3 * self._seconds)

    async def remove(self, embedder: str, item_ids: Sequence[UUID]) -> None:
        await self._do(self._where_there(
            lambda client, name: client.delete(name, ids=[str(each) for each in item_ids], timeout=self._seconds),
            embedder,
        ), self._seconds)

    async def forget(self, embedder: str, user_id: str) -> None:
        await self._do(self._where_there(
            lambda client, name: client.delete(
                name, filter=f'user_key == "{user_key(user_id)}"', timeout=self._seconds
            ), embedder,
        ), self._seconds)

    async def count(self, embedder: str, user_id: str) -> int:
        rows = await self._do(self._where_there(
            lambda client, name: client.query(
                name, filter=f'user_key == "{user_key(user_id)}"', output_fields=["count(*)"], timeout=self._seconds
            ), embedder,
        ), self._seconds)
        return int(rows[0]["count(*)"]) if rows else 0

    async def versions(self, embedder: str, item_ids: Sequence[UUID]) -> dict[UUID, int]:
        ids = [str(each) for each in item_ids]
        rows = await self._do(self._where_there(
            lambda client, name: client.get(
                name, ids=ids, output_fields=["item_id", "version"], timeout=self._seconds
            ), embedder,
        ), self._seconds)
        return _versions_in(rows or [])

    async def everything(self, embedder: str) -> AsyncIterator[dict[UUID, int]]:
        after = ""
        while True:
            rows = await self._do(self._where_there(self._page(after), embedder), self._seconds)
            if not rows:
                return
            yield _versions_in(rows)
            after = max(row["item_id"] for row in rows)

    def _page(self, after: str) -> Callable[[MilvusClient, str], Any]:
        def work(client: MilvusClient, name: str) -> Any:
            # An iterator answers in the order of the key, which a plain query does not promise.
            iterator = client.query_iterator(
                name, batch_size=PAGE, filter=f'item_id > "{after}"', output_fields=["item_id", "version"],
                timeout=self._seconds,
            )
            try:
                return iterator.next()
            finally:
                iterator.close()

        return work

    async def drop(self, embedder: str) -> None:
        name = self._name_of(embedder)
        self._ready.discard(name)
        await self._do(lambda client: client.drop_collection(name, timeout=self._seconds), self._seconds)

    def _name_of(self, embedder: str) -> str:
        """Collection names hold letters, digits and underscores only."""
        return f"{self._prefix}{re.sub(r'[^A-Za-z0-9_]', '_', embedder)}"

    def _make_sure_of(self, client: MilvusClient, name: str, dimensions: int) -> None:
        if name in self._ready:
            return
        if not client.has_collection(name, timeout=self._seconds):
            schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
            schema.add_field("item_id", DataType.VARCHAR, max_length=36, is_primary=True)
            schema.add_field("user_key", DataType.VARCHAR, max_length=64)
            schema.add_field("type", DataType.INT8)
            schema.add_field("version", DataType.INT64)
            schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dimensions)
            indexes = client.prepare_index_params()
            indexes.add_index("vector", index_type="AUTOINDEX", metric_type="COSINE")
            client.create_collection(
                name, schema=schema, index_params=indexes, consistency_level="Strong", timeout=self._seconds
            )
        client.load_collection(name, timeout=self._seconds)
        self._ready.add(name)

    def _where_there(self, work: Callable[[MilvusClient, str], Any], embedder: str) -> Callable[[MilvusClient], Any]:
        """What is not there has nothing in it."""
        name = self._name_of(embedder)

        def guarded(client: MilvusClient) -> Any:
            if not client.has_collection(name, timeout=self._seconds):
                return None
            if name not in self._ready:
                client.load_collection(name, timeout=self._seconds)
                self._ready.add(name)
            return work(client, name)

        return guarded

    async def _do(self, work: Callable[[MilvusClient], Any], seconds: float) -> Any:
        """In a thread. The time limit is ours, too: connecting and retries of the client have their own ideas."""

        def with_client() -> Any:
            if self._client is None:
                self._client = MilvusClient(self._uri, token=self._token, timeout=seconds)
            return work(self._client)

        try:
            async with asyncio.timeout(seconds + 0.05):
                return await asyncio.get_running_loop().run_in_executor(self._threads, with_client)
        except (MilvusException, grpc.RpcError, TimeoutError) as error:
            self._ready.clear()  # a server that comes back has to load its collections again
            code = error.code() if isinstance(error, grpc.Call) else getattr(error, "code", "")
            raise IndexAway(f"{type(error).__name__} {code}".strip()) from error


def _versions_in(rows: Sequence[dict[str, Any]]) -> dict[UUID, int]:
    return {UUID(row["item_id"]): int(row["version"]) for row in rows}
