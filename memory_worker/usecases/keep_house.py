"""What is done now and then: items that expired, answers that are no longer needed, how far the index is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta

from memory_worker.usecases.ports import Embedder, MemoryStore, ModelCallFailed
from servicekit.core.errors import DomainError
from servicekit.telemetry.logs import EventLogger

log = EventLogger(__name__)

SECONDS = 30.0
MOST_AT_ONCE = 500


async def index_anew(memories: MemoryStore, embedder: Embedder) -> int:
    """Vectors of the embedder in use for all items that have another's: after it was changed. Answers how many."""
    done = 0
    try:
        while found := await memories.unindexed(embedder.name, limit=MOST_AT_ONCE):
            for item in found:
                vectors = await embedder.embed(
                    item.user_id, [item.content], skip_charge=True,
                    request_id=f"memory:index:{item.item_id}:{item.version}:{embedder.name}"[:128],
                )
                await memories.set_vector(item, vectors[0], embedder.name)
            done += len(found)
    except ModelCallFailed as failure:
        log.warning("indexing_put_off", reason=failure.reason, done=done)
    if done:
        log.info("indexed_anew", items=done, embedder=embedder.name)
    return done


async def keep_house(
    memories: MemoryStore, embedder: Embedder, *, answers_kept: timedelta, expired: Callable[[int], None],
    indexed: Callable[[int, int], None],
) -> None:
    """Runs until it is cancelled; replicas may do the same at once. `expired` and `indexed` are told of it."""
    while True:
        try:
            while (count := await memories.expire(limit=MOST_AT_ONCE)) > 0:
                expired(count)
                if count < MOST_AT_ONCE:
                    break
            await memories.prune(older_than=answers_kept, limit=MOST_AT_ONCE)
            await index_anew(memories, embedder)
            indexed(*await memories.index_status(embedder.name))
        except DomainError as error:
            log.warning("housekeeping_failed", reason=str(error))
        await asyncio.sleep(SECONDS)
