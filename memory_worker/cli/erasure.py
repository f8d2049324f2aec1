"""Proof that an erased user is gone: from rows, from the vector database, and byte by byte from files."""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from memory_worker.app import index_of
from memory_worker.config import Settings, load
from memory_worker.storage.tables import METADATA, SCHEMA
from memory_worker.usecases.memory_ports import IndexAway, VectorIndex
from servicekit.cli import fail
from servicekit.settings import ConfigurationError

CHUNK = 1 << 20
OF_A_USER = [table.name for table in METADATA.sorted_tables if "user_id" in table.c]


def rows_left(connection: psycopg.Connection[Any], user_id: str, canaries: Sequence[str]) -> dict[str, int]:
    """Rows of the user, and of anybody with one of the texts in it, by table; without those that have none."""
    left: dict[str, int] = {}
    for name in [table.name for table in METADATA.sorted_tables]:
        table = sql.Identifier(SCHEMA, name)
        found = 0
        if name in OF_A_USER:
            found += _count(connection, sql.SQL("SELECT count(*) FROM {} WHERE user_id = %s").format(table), user_id)
        for text in canaries:
            found += _count(
                connection, sql.SQL("SELECT count(*) FROM {} t WHERE strpos(t::text, %s) > 0").format(table), text
            )
        if found:
            left[name] = found
    return left


def _count(connection: psycopg.Connection[Any], statement: sql.Composed, argument: str) -> int:
    row = connection.execute(statement, (argument,)).fetchone()
    return int(row[0]) if row else 0


def rewrite(connection: psycopg.Connection[Any]) -> None:
    """Dead rows stay in the files, in free space and in the planner's statistics, until the tables are rewritten. Each
    is locked while it is."""
    for table in METADATA.sorted_tables:
        connection.execute(sql.SQL("VACUUM (FULL, ANALYZE) {}").format(sql.Identifier(SCHEMA, table.name)))
    connection.execute("VACUUM FULL pg_statistic")
    connection.execute("CHECKPOINT")
    connection.execute("SELECT pg_switch_wal()")
    connection.execute("CHECKPOINT")


def files_with(folder: Path, canaries: Sequence[str]) -> Iterator[Path]:
    """Files with one of the texts in them, byte by byte, in UTF-8."""
    needles = [text.encode() for text in canaries]
    longest = max(map(len, needles))
    for path in sorted(each for each in folder.rglob("*") if each.is_file() and not each.is_symlink()):
        tail = b""
        try:
            with path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    if any(needle in tail + chunk for needle in needles):
                        yield path
                        break
                    tail = chunk[-longest:]
        except FileNotFoundError:
            continue  # it went while we looked


async def indexed(index: VectorIndex, embedders: Sequence[str], user_id: str) -> int:
    """Vectors of the user. Raises IndexAway."""
    return sum([await index.count(embedder, user_id) for embedder in embedders])


def _verify(arguments: argparse.Namespace) -> None:
    try:
        settings: Settings = load(os.environ)
        index = index_of(settings)
    except ConfigurationError as error:
        fail(*error.problems, code=2)
    if arguments.files and not arguments.canary:
        fail("--files: needs --canary, a text that the user is known to have said", code=2)
    problems: list[str] = []
    try:
        with psycopg.connect(settings.full_database_url(), autocommit=True) as connection:
            if arguments.rewrite:
                rewrite(connection)
            for table, count in rows_left(connection, arguments.user, arguments.canary).items():
                problems.append(f"{count} rows in {SCHEMA}.{table}")
            found = connection.execute(f"SELECT name FROM {SCHEMA}.embedder").fetchall()  # noqa: S608 - our own name
    except psycopg.Error as error:
        fail(f"memory_worker: the database: {error}")
    if index is not None:
        try:
            count = asyncio.run(indexed(index, [name for (name,) in found], arguments.user))
        except IndexAway as away:
            fail(f"memory_worker: the vector database: {away}")
        finally:
            index.close()
        if count:
            problems.append(f"{count} vectors in the vector database")
    for folder in arguments.files:
        problems += [f"in the file {path}" for path in files_with(folder, arguments.canary)]
    if problems:
        fail(f"{arguments.user} is still there:", *(f"  {each}" for each in problems))
    looked = ["rows", *(["vectors"] if index is not None else []), *map(str, arguments.files)]
    print(f"nothing of {arguments.user} is left in {', '.join(looked)}")


def add_to(commands: Any) -> None:
    """Adds verify-erasure."""
    command = commands.add_parser(
        "verify-erasure", help="prove that nothing of an erased user is left (needs the database; exit code 1 if it is)"
    )
    command.add_argument("user")
    command.add_argument("--canary", action="append", default=[], help="a text that the user is known to have said")
    command.add_argument("--files", action="append", default=[], type=Path, help="folder to search for the canaries")
    command.add_argument(
        "--rewrite", action="store_true",
        help="rewrite the tables first, so that the bytes of dead rows leave PostgreSQL's files (locks each table)",
    )
    command.set_defaults(run=_verify)
