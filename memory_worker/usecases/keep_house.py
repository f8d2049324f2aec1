"""What is done now and then: items that expired, answers that are no longer needed, how far the index is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta

from memory_worker.usecases.ports import MemoryStore
from servicekit.core.errors import DomainError
from servicekit.telemetry.logs import EventLogger

log = EventLogger(__name__)

SECONDS = 30.0
MOST_AT_ONCE = 500


async def keep_house(
    memories: MemoryStore, *, embedder: str, answers_kept: timedelta, expired: Callable[[int], None],
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
            indexed(*await memories.index_status(embedder))
        except DomainError as error:
            log.warning("housekeeping_failed", reason=str(error))
        await asyncio.sleep(SECONDS)
