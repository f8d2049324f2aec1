"""Topics that a service needs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]  # exported, not declared

from servicekit.core.backoff import Backoff
from servicekit.telemetry.logs import EventLogger

log = EventLogger(__name__)

PARTITIONS = 16
"""Chosen once: more partitions later would send a key's newer messages elsewhere while older ones still wait."""


async def ensure_topics(bootstrap_servers: str, topics: Sequence[str], *, partitions: int = PARTITIONS) -> None:
    """Waits for a broker and makes the topics that are missing, replicated as the broker's default says."""
    admin = AdminClient({"bootstrap.servers": bootstrap_servers, "log.connection.close": False})
    backoff = Backoff(first_seconds=0.2, most_seconds=5.0)
    while True:
        try:
            known = (await asyncio.to_thread(admin.list_topics, timeout=2.0)).topics
            missing = [name for name in topics if name not in known]
            if missing:
                for future in admin.create_topics([NewTopic(name, partitions, -1) for name in missing]).values():
                    await asyncio.to_thread(future.exception, 10)
                backoff.next_seconds()
                continue
            return
        except KafkaException as error:
            seconds = backoff.next_seconds()
            log.warning("waiting_for_kafka", reason=str(error), next_try_seconds=round(seconds, 2))
            await asyncio.sleep(seconds)
