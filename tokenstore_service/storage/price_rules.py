"""Price rules in PostgreSQL, and the price book in memory that follows them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from psycopg import errors

from servicekit.core.errors import DomainError
from servicekit.db.database import Database
from servicekit.telemetry.logs import EventLogger
from tokenstore_service.domain.errors import PriceRuleOverlap
from tokenstore_service.domain.price_rule import PriceBook, PriceRule, PriceRuleStatus, overlapping_rule
from tokenstore_service.storage.row_mapping import PRICE_RULE_COLUMNS, price_rule_from_row, price_rule_to_row
from tokenstore_service.usecases.ports import VersionTaken

log = EventLogger(__name__)

REFRESH_SECONDS = 1.0

ALL = f"SELECT {PRICE_RULE_COLUMNS} FROM price_rule"
STAMP = "SELECT count(*), max(created_at) FROM price_rule"
# Rules change rarely: one at a time, so that two can not overlap each other unseen.
LOCK = "LOCK TABLE price_rule IN SHARE ROW EXCLUSIVE MODE"
NEWEST_VERSIONS = f"SELECT DISTINCT ON (rule_id) {PRICE_RULE_COLUMNS} FROM price_rule ORDER BY rule_id, version DESC"
BY_KEY = f"{ALL} WHERE idempotency_key = %s"
NEWEST = f"{ALL} WHERE rule_id = %s ORDER BY version DESC LIMIT 1"
VERSION = f"{ALL} WHERE rule_id = %s AND version = %s"
INSERT = f"""
INSERT INTO price_rule ({PRICE_RULE_COLUMNS}, idempotency_key) VALUES ({', '.join(['%s'] * 32)})
"""
NEWEST_OF_ALL = f"""
SELECT first_made, {PRICE_RULE_COLUMNS} FROM (
    SELECT *, min(created_at) OVER (PARTITION BY rule_id) AS first_made,
        max(version) OVER (PARTITION BY rule_id) AS newest_version
    FROM price_rule
) AS versions
WHERE version = newest_version
    AND (%(scene)s = '' OR scene = %(scene)s) AND (%(provider)s = '' OR provider = %(provider)s)
    AND (%(model)s = '' OR model = %(model)s) AND (%(status)s::smallint IS NULL OR status = %(status)s)
    AND (%(after_at)s::timestamptz IS NULL OR (first_made, rule_id) > (%(after_at)s, %(after_id)s))
ORDER BY first_made, rule_id LIMIT %(limit)s
"""


class PostgresPriceRules:
    """The rules themselves."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, rule: PriceRule, *, idempotency_key: str) -> PriceRule:
        try:
            async with self._database.transaction() as connection:
                await connection.execute(LOCK)
                rows = await (await connection.execute(NEWEST_VERSIONS)).fetchall()
                other = overlapping_rule(map(price_rule_from_row, rows), rule)
                if other is not None:
                    raise PriceRuleOverlap(
                        f"rule {other.rule_id} v{other.version} matches the same calls at the same time with the same"
                        " priority: change that rule, or give this one another priority or validity",
                        rule_id=other.rule_id, version=other.version,
                    )
                await connection.execute(INSERT, (*price_rule_to_row(rule), idempotency_key))
        except errors.UniqueViolation as error:
            stored = await self.by_key(idempotency_key)
            if stored is None:
                raise VersionTaken from error
            return stored
        return rule

    async def by_key(self, idempotency_key: str) -> PriceRule | None:
        return await self._one(BY_KEY, (idempotency_key,))

    async def newest(self, rule_id: str) -> PriceRule | None:
        return await self._one(NEWEST, (rule_id,))

    async def version(self, rule_id: str, version: int) -> PriceRule | None:
        return await self._one(VERSION, (rule_id, version))

    async def newest_of_all(
        self, *, scene: str, provider: str, model: str, status: PriceRuleStatus | None,
        after: tuple[datetime, str] | None, limit: int,
    ) -> list[tuple[datetime, PriceRule]]:
        after_at, after_id = after or (None, None)
        async with self._database.connection() as connection:
            cursor = await connection.execute(NEWEST_OF_ALL, {
                "scene": scene, "provider": provider, "model": model, "status": status and int(status),
                "after_at": after_at, "after_id": after_id, "limit": limit,
            })
            return [(row[0], price_rule_from_row(row[1:])) for row in await cursor.fetchall()]

    async def _one(self, statement: str, arguments: tuple[Any, ...]) -> PriceRule | None:
        async with self._database.connection() as connection:
            row = await (await connection.execute(statement, arguments)).fetchone()
            return price_rule_from_row(row) if row else None


class FollowedPrices:
    """The price book, loaded again within a second of any change by any replica."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._book = PriceBook()
        self._stamp: tuple[Any, ...] | None = None
        self._missing: set[tuple[str, int]] = set()

    @property
    def book(self) -> PriceBook:
        return self._book

    async def ensure(self, versions: Iterable[tuple[str, int]]) -> None:
        unknown = {key for key in versions if self._book.version(*key) is None} - self._missing
        if unknown:
            await self.refresh()
            self._missing |= {key for key in unknown if self._book.version(*key) is None}
            if len(self._missing) > 10_000:
                self._missing.clear()

    async def refresh(self) -> None:
        async with self._database.connection() as connection:
            stamp = await (await connection.execute(STAMP)).fetchone()
            if stamp == self._stamp:
                return
            rows = await (await connection.execute(ALL)).fetchall()
        self._book = PriceBook([price_rule_from_row(row) for row in rows])
        self._stamp = stamp
        self._missing = set()
        log.info("prices_loaded", versions=len(rows))

    async def follow(self) -> None:
        """Runs until it is cancelled."""
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            try:
                await self.refresh()
            except DomainError:
                log.warning("prices_not_refreshed")
