"""Leases for background work: of several replicas one does a job at a time, and another takes over when it is gone."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import Column, DateTime, MetaData, Table, Text
from sqlalchemy import text as sql

from servicekit.db.database import Database

CREATE = """
CREATE TABLE job_lease (
    name text PRIMARY KEY,
    owner text NOT NULL DEFAULT '',
    lease_until timestamptz NOT NULL DEFAULT 'epoch',
    cursor text NOT NULL DEFAULT ''
);
"""
ADD = "INSERT INTO job_lease (name) VALUES (%(name)s) ON CONFLICT DO NOTHING"
CLAIM = """
UPDATE job_lease SET owner = %(owner)s, lease_until = now() + %(lease)s
WHERE name = %(name)s AND (owner = %(owner)s OR lease_until <= now()) RETURNING cursor
"""
RELEASE = "UPDATE job_lease SET lease_until = 'epoch' WHERE owner = %s"
MOVE = "UPDATE job_lease SET cursor = %(cursor)s WHERE name = %(name)s AND owner = %(owner)s AND lease_until > now()"


def lease_table(metadata: MetaData) -> None:
    """Adds the table to a service's metadata, for the migration drift test."""
    Table(
        "job_lease", metadata,
        Column("name", Text, primary_key=True),
        Column("owner", Text, nullable=False, server_default=""),
        Column("lease_until", DateTime(timezone=True), nullable=False, server_default=sql("'epoch'")),
        Column("cursor", Text, nullable=False, server_default=""),
    )


class Leases:
    """One replica's leases. `cursor` is what a job remembers, so that whoever goes on knows where."""

    def __init__(self, database: Database, *, owner: str) -> None:
        self._database = database
        self._owner = owner

    async def claim(self, name: str, *, seconds: float) -> str | None:
        """Takes or renews the lease. Returns the job's cursor, or None while another replica has it."""
        arguments = {"name": name, "owner": self._owner, "lease": timedelta(seconds=seconds)}
        async with self._database.connection() as connection:
            await connection.execute(ADD, arguments)
            row = await (await connection.execute(CLAIM, arguments)).fetchone()
        return None if row is None else str(row[0])

    async def release(self) -> None:
        """Gives back all that this replica has, so that nobody waits for them to run out."""
        async with self._database.connection() as connection:
            await connection.execute(RELEASE, (self._owner,))

    async def move(self, name: str, cursor: str) -> bool:
        """False when the lease is lost."""
        async with self._database.connection() as connection:
            moved = await connection.execute(MOVE, {"name": name, "owner": self._owner, "cursor": cursor})
            return moved.rowcount == 1
