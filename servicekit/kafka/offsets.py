"""Consumer offsets in the service's own database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import BigInteger, Column, Integer, MetaData, Table, Text

from servicekit.core.offsets import OffsetMove, StaleConsumer
from servicekit.db.database import Connection, Database
from servicekit.kafka.consumer import Partition

CREATE = """
CREATE TABLE consumer_offset (
    topic text NOT NULL,
    partition integer NOT NULL,
    next_offset bigint NOT NULL,
    PRIMARY KEY (topic, partition)
);
"""
LOAD = """
SELECT topic, partition, next_offset FROM consumer_offset
WHERE (topic, partition) IN (SELECT * FROM unnest(%(topics)s::text[], %(partitions)s::int[]))
"""
ADD = """
INSERT INTO consumer_offset (topic, partition, next_offset)
SELECT topic, partition, 0 FROM unnest(%(topics)s::text[], %(partitions)s::int[]) AS wanted (topic, partition)
ORDER BY 1, 2 ON CONFLICT DO NOTHING
"""
# Compare and set: zero rows for a partition = a zombie, or an answer that was lost.
MOVE = """
UPDATE consumer_offset AS stored SET next_offset = moved.next
FROM unnest(%(topics)s::text[], %(partitions)s::int[], %(firsts)s::bigint[], %(nexts)s::bigint[])
    AS moved (topic, partition, first, next)
WHERE stored.topic = moved.topic AND stored.partition = moved.partition AND stored.next_offset = moved.first
"""


def offset_table(metadata: MetaData) -> None:
    """Adds the table to a service's metadata, for the migration drift test."""
    Table(
        "consumer_offset", metadata,
        Column("topic", Text, primary_key=True),
        Column("partition", Integer, primary_key=True, autoincrement=False),
        Column("next_offset", BigInteger, nullable=False),
    )


async def load_offsets(database: Database, partitions: Sequence[Partition]) -> Mapping[Partition, int]:
    """The stored offsets; partitions that were never consumed get 0 and begin at their beginning."""
    arguments = {"topics": [topic for topic, _ in partitions], "partitions": [number for _, number in partitions]}
    async with database.connection() as connection:
        await connection.execute(ADD, arguments)
        rows = await (await connection.execute(LOAD, arguments)).fetchall()
    return {(topic, partition): offset for topic, partition, offset in rows}


async def move_offsets(connection: Connection, moves: Sequence[OffsetMove]) -> None:
    """Moves the stored offsets inside the caller's transaction. Raises StaleConsumer when one is not as expected."""
    cursor = await connection.execute(MOVE, {
        "topics": [move.topic for move in moves], "partitions": [move.partition for move in moves],
        "firsts": [move.first for move in moves], "nexts": [move.next for move in moves],
    })
    if cursor.rowcount != len(moves):
        raise StaleConsumer(f"{cursor.rowcount} of {len(moves)} stored offsets were as expected")
