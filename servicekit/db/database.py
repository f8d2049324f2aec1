"""PostgreSQL by psycopg: a pool that waits for the database, transactions, and what an error means."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import psycopg
from psycopg import AsyncConnection, errors
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from servicekit.core.backoff import Backoff
from servicekit.core.errors import DependencyUnavailable
from servicekit.telemetry.logs import EventLogger

log = EventLogger(__name__)

Connection = AsyncConnection[TupleRow]

AWAY = (
    psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout, errors.TransactionTimeout,
    errors.IdleInTransactionSessionTimeout,
)
"""The database does not answer, or ended the session."""
TRANSIENT = (
    errors.SerializationFailure, errors.DeadlockDetected, errors.LockNotAvailable, errors.AdminShutdown,
    errors.CrashShutdown, errors.CannotConnectNow, *AWAY,
)
"""Errors after which the same transaction may be tried again: 40001, 40P01, 55P03, 57P*, 08*, 25P03, 25P04, and no
connection."""

KNOWS_TRANSACTION_TIMEOUT = 170_000
BY_KEY_ONLY = "-c enable_seqscan=off -c enable_hashjoin=off -c enable_mergejoin=off -c random_page_cost=0.05"
"""For writers that touch rows by key alone. A statement that is prepared while its table is empty would otherwise keep
a sequential scan as its generic plan for ever."""


def is_transient(error: BaseException) -> bool:
    """Whether trying the same transaction again can help."""
    return isinstance(error, TRANSIENT) and not isinstance(error, errors.QueryCanceled)


async def _bound(connection: Connection, *, seconds: float) -> None:
    if seconds and connection.info.server_version >= KNOWS_TRANSACTION_TIMEOUT:
        await connection.execute(f"SET transaction_timeout = {int(seconds * 1000)}".encode())


class Database:
    """A pool of connections to one schema of one database."""

    def __init__(
        self, url: str, *, schema: str, application_name: str, pool_size: int, statement_seconds: float = 30.0,
        lock_seconds: float = 10.0, by_key_only: bool = False, connect_seconds: float = 5.0,
        transaction_seconds: float = 0.0,
    ) -> None:
        """`transaction_seconds`: a session whose transaction lasts longer is ended by the server, from PostgreSQL 17 on
        (0 = never)."""
        options = (
            f"-c search_path={schema} -c statement_timeout={int(statement_seconds * 1000)}"
            f" -c lock_timeout={int(lock_seconds * 1000)} -c idle_in_transaction_session_timeout=60000"
            f" -c default_transaction_isolation=read\\ committed -c timezone=UTC"
            + (f" {BY_KEY_ONLY}" if by_key_only else "")
        )
        self._connect_seconds = connect_seconds
        self._pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            url, min_size=min(2, pool_size), max_size=pool_size, open=False, timeout=connect_seconds,
            reconnect_timeout=2.0, configure=functools.partial(_bound, seconds=transaction_seconds),
            kwargs={
                "autocommit": True, "prepare_threshold": 0, "options": options, "application_name": application_name,
                "connect_timeout": 5, "keepalives_idle": 15, "tcp_user_timeout": 15000,
            },
        )

    async def open(self) -> None:
        """Returns when the database answers; waits for it with back-off and says so."""
        backoff = Backoff(first_seconds=0.2, most_seconds=5.0)
        await self._pool.open(wait=False)
        while not await self.answers():
            seconds = backoff.next_seconds()
            log.warning("waiting_for_database", next_try_seconds=round(seconds, 2))
            await asyncio.sleep(seconds)

    async def close(self) -> None:
        await self._pool.close()

    async def answers(self) -> bool:
        """Whether a query works now."""
        try:
            async with self._pool.connection(timeout=2.0) as connection:
                await connection.execute("SELECT 1")
        except TRANSIENT:
            return False
        return True

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection in autocommit: each statement is a transaction. Raises DependencyUnavailable."""
        try:
            async with self._pool.connection() as connection:
                yield connection
        except errors.QueryCanceled:
            raise
        except AWAY as error:
            log.warning("database_error", kind=type(error).__name__, sqlstate=getattr(error, "sqlstate", None))
            raise DependencyUnavailable("PostgreSQL") from error

    @contextlib.asynccontextmanager
    async def transaction(
        self, *, read_only_snapshot: bool = False, pipelined: bool = False
    ) -> AsyncIterator[Connection]:
        """A transaction: committed when the body ends, rolled back when it raises. `pipelined`: statements travel when
        one's rows are fetched, and with the COMMIT. Raises DependencyUnavailable."""
        async with AsyncExitStack() as stack:
            connection = await stack.enter_async_context(self.connection())
            if pipelined:
                await stack.enter_async_context(connection.pipeline())
            await stack.enter_async_context(connection.transaction())
            if read_only_snapshot:
                await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            yield connection

    @contextlib.asynccontextmanager
    async def raw_connection(self) -> AsyncIterator[Connection]:
        """As connection, with the driver's own errors, for callers that retry themselves."""
        async with self._pool.connection() as connection:
            yield connection

    def statistics(self) -> dict[str, Any]:
        return dict(self._pool.get_stats())
