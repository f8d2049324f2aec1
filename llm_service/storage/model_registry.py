"""Registered models in PostgreSQL, and the directory in memory that follows them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from psycopg import errors
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from llm_service.domain.deployment import Capabilities, Deployment, Directory, Provider, Timeouts
from llm_service.domain.errors import SecretKeyMissing
from llm_service.domain.quirks import Quirks
from llm_service.domain.rate_limit import Limits
from llm_service.storage import tables
from llm_service.storage.sealed_keys import KeySealer
from servicekit.core.errors import DomainError
from servicekit.db.database import Connection, Database
from servicekit.telemetry.logs import EventLogger

log = EventLogger(__name__)

REFRESH_SECONDS = 1.0

COLUMNS = [name for name in tables.model.columns.keys() if name != "idempotency_key"]
INSERT = f"""
INSERT INTO model ({', '.join(COLUMNS)}, idempotency_key)
VALUES ({', '.join(f'%({name})s' for name in COLUMNS)}, %(idempotency_key)s)
"""
REPLACE = f"""
UPDATE model SET {', '.join(f'{name} = %({name})s' for name in COLUMNS if name not in ('model_id', 'created_at'))}
WHERE model_id = %(model_id)s
"""
DEACTIVATE_OTHERS = "UPDATE model SET active = false WHERE alias = %(alias)s AND model_id <> %(model_id)s AND active"
DELETE = "DELETE FROM model WHERE model_id = %s"
GET = "SELECT * FROM model WHERE model_id = %s"
BY_KEY = "SELECT * FROM model WHERE idempotency_key = %s"
ALL = "SELECT * FROM model ORDER BY alias, priority, model_id"
LIST = """
SELECT * FROM model
WHERE (%(alias)s = '' OR alias = %(alias)s)
    AND (%(after_id)s::text IS NULL
        OR (alias, priority, model_id) > (%(after_alias)s, %(after_priority)s, %(after_id)s))
ORDER BY alias, priority, model_id LIMIT %(limit)s
"""
SEALED = "SELECT model_id, sealed_key FROM model WHERE sealed_key IS NOT NULL ORDER BY model_id FOR UPDATE"
RESEAL = "UPDATE model SET sealed_key = %s WHERE model_id = %s"
REVISION = "SELECT revision FROM registry_revision"
RAISE_REVISION = "UPDATE registry_revision SET revision = revision + 1"


class PostgresModelRegistry:
    """Implements ModelRegistry."""

    def __init__(self, database: Database, sealer: KeySealer) -> None:
        self._database = database
        self._sealer = sealer

    async def add(self, deployment: Deployment, *, idempotency_key: str) -> Deployment:
        try:
            async with self._database.transaction() as connection:
                arguments = {**self._to_row(deployment), "idempotency_key": idempotency_key or None}
                await connection.execute(INSERT, arguments)
                await connection.execute(RAISE_REVISION)
        except errors.UniqueViolation:
            stored = await self.by_key(idempotency_key)
            assert stored is not None
            return stored
        return deployment

    async def by_key(self, idempotency_key: str) -> Deployment | None:
        return await self._one(BY_KEY, idempotency_key)

    async def get(self, model_id: str) -> Deployment | None:
        return await self._one(GET, model_id)

    async def list_models(
        self, *, alias: str, after: tuple[str, int, str] | None, limit: int
    ) -> list[Deployment]:
        after_alias, after_priority, after_id = after or (None, None, None)
        async with self._database.connection() as connection:
            rows = await _rows(connection, LIST, {
                "alias": alias, "after_alias": after_alias, "after_priority": after_priority, "after_id": after_id,
                "limit": limit,
            })
        return [self._from_row(row) for row in rows]

    async def replace(self, deployment: Deployment, *, exclusive: bool = False) -> bool:
        async with self._database.transaction() as connection:
            changed = await connection.execute(REPLACE, self._to_row(deployment))
            if exclusive:
                await connection.execute(
                    DEACTIVATE_OTHERS, {"alias": deployment.alias, "model_id": deployment.model_id}
                )
            await connection.execute(RAISE_REVISION)
            return changed.rowcount == 1

    async def delete(self, model_id: str) -> bool:
        async with self._database.transaction() as connection:
            deleted = await connection.execute(DELETE, (model_id,))
            await connection.execute(RAISE_REVISION)
            return deleted.rowcount == 1

    async def reseal(self) -> int:
        """Raises SecretKeyMissing, with nothing changed, when a key can not be opened."""
        changed = 0
        async with self._database.transaction() as connection:
            for row in await _rows(connection, SEALED, ()):
                if self._sealer.is_newest(row["sealed_key"]):
                    continue
                api_key = self._sealer.open(row["sealed_key"], model_id=row["model_id"])
                sealed = self._sealer.seal(api_key, model_id=row["model_id"])
                await connection.execute(RESEAL, (sealed, row["model_id"]))
                changed += 1
            if changed:
                await connection.execute(RAISE_REVISION)
        return changed

    async def read_all(self) -> tuple[int, list[Deployment]]:
        """The revision, and the models as of it; a model whose key can not be opened is out of service, loudly."""
        async with self._database.transaction(read_only_snapshot=True) as connection:
            revision = await self.revision(connection)
            rows = await _rows(connection, ALL, {})
        return revision, [self._from_row(row) for row in rows]

    @staticmethod
    async def revision(connection: Connection) -> int:
        row = await (await connection.execute(REVISION)).fetchone()
        return int(row[0]) if row else 0

    async def _one(self, statement: str, key: str) -> Deployment | None:
        async with self._database.connection() as connection:
            rows = await _rows(connection, statement, (key,))
        return self._from_row(rows[0]) if rows else None

    def _to_row(self, deployment: Deployment) -> dict[str, Any]:
        return {
            "model_id": deployment.model_id, "alias": deployment.alias, "provider": int(deployment.provider),
            "base_url": deployment.base_url, "upstream_model": deployment.upstream_model,
            "sealed_key": self._sealer.seal(deployment.api_key, model_id=deployment.model_id),
            "active": deployment.active, "priority": deployment.priority, "weight": deployment.weight,
            "context_window": deployment.context_window, "max_output_tokens": deployment.max_output_tokens,
            "timeouts": Jsonb(asdict(deployment.timeouts)), "extra_headers": Jsonb(list(deployment.extra_headers)),
            "price_provider": deployment.price_provider, "created_at": deployment.created_at,
            "updated_at": deployment.updated_at, "limits": Jsonb(asdict(deployment.limits)),
            "capabilities": Jsonb(_given(asdict(deployment.capabilities))),
            "default_params": Jsonb(dict(deployment.default_params)),
            "quirks": Jsonb(_given(asdict(deployment.quirks))), "hedge_after": deployment.hedge_after,
            "max_retries": deployment.max_retries, "bills_failed_attempts": deployment.bills_failed_attempts,
            "tokenizer": deployment.tokenizer,
        }

    def _from_row(self, row: Mapping[str, Any]) -> Deployment:
        deployment = Deployment(
            model_id=row["model_id"], alias=row["alias"], provider=Provider(row["provider"]),
            base_url=row["base_url"], upstream_model=row["upstream_model"], api_key="", active=row["active"],
            priority=row["priority"], weight=row["weight"], context_window=row["context_window"],
            max_output_tokens=row["max_output_tokens"], timeouts=Timeouts(**row["timeouts"]),
            extra_headers=tuple((name, value) for name, value in row["extra_headers"]),
            price_provider=row["price_provider"], created_at=row["created_at"], updated_at=row["updated_at"],
            limits=Limits(**row["limits"]), capabilities=Capabilities(**row["capabilities"]),
            default_params=row["default_params"],
            quirks=Quirks(**{**row["quirks"], "drop_params": tuple(row["quirks"].get("drop_params", ()))}),
            hedge_after=row["hedge_after"], max_retries=row["max_retries"],
            bills_failed_attempts=row["bills_failed_attempts"], tokenizer=row["tokenizer"],
        )
        try:
            return replace(deployment, api_key=self._sealer.open(row["sealed_key"], model_id=row["model_id"]))
        except SecretKeyMissing as error:
            log.error("model_key_not_opened", model_id=row["model_id"], reason=error.message)
            return replace(deployment, active=False)


class FollowedDirectory:
    """The directory, read again within a second of any change by any replica; `also` is read with it."""

    def __init__(
        self, database: Database, registry: PostgresModelRegistry, *, also: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        self._database = database
        self._registry = registry
        self._also = also
        self._directory = Directory()
        self._revision = -1
        self._changed = asyncio.Event()

    @property
    def revision(self) -> int:
        return self._revision

    async def changed(self, revision: int) -> None:
        while self._revision <= revision:
            event = self._changed
            await event.wait()

    @property
    def directory(self) -> Directory:
        return self._directory

    async def refresh(self) -> None:
        async with self._database.connection() as connection:
            if await self._registry.revision(connection) == self._revision:
                return
        self._revision, deployments = await self._registry.read_all()
        if self._also is not None:
            await self._also()
        self._directory = Directory(deployments)
        self._changed.set()
        self._changed = asyncio.Event()
        log.info("models_loaded", models=len(deployments), revision=self._revision)

    async def follow(self) -> None:
        """Runs until it is cancelled."""
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            try:
                await self.refresh()
            except DomainError:
                log.warning("models_not_refreshed")


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Without what is not set."""
    return {name: value for name, value in values.items() if value not in (None, "", ())}


async def _rows(connection: Connection, statement: str, arguments: Any) -> list[dict[str, Any]]:
    cursor = connection.cursor(row_factory=dict_row)
    return await (await cursor.execute(statement, arguments)).fetchall()
