"""Products and reward rules in PostgreSQL."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime

from psycopg import errors

from servicekit.db.database import Database
from tokenstore_service.domain.order import Product, ProductStatus
from tokenstore_service.domain.reward import RewardRule
from tokenstore_service.storage.row_mapping import (
    PRODUCT_COLUMNS,
    REWARD_COLUMNS,
    product_from_row,
    product_to_row,
    reward_rule_from_row,
    reward_rule_to_row,
)

ADD_PRODUCT = f"""
INSERT INTO product ({PRODUCT_COLUMNS}, idempotency_key) VALUES ({', '.join(['%s'] * 17)})
ON CONFLICT (idempotency_key) DO NOTHING
"""
PRODUCT_BY_KEY = f"SELECT {PRODUCT_COLUMNS} FROM product WHERE idempotency_key = %s"
PRODUCT = f"SELECT {PRODUCT_COLUMNS} FROM product WHERE product_id = %s"
LOCKED_PRODUCT = f"{PRODUCT} FOR UPDATE"
PRODUCTS = f"""
SELECT {PRODUCT_COLUMNS} FROM product
WHERE status = %(status)s
    AND (%(after_id)s::text IS NULL OR (sort_order, product_id) > (%(after_order)s::int, %(after_id)s))
ORDER BY sort_order, product_id LIMIT %(limit)s
"""
CHANGE_PRODUCT = f"""
UPDATE product SET ({PRODUCT_COLUMNS}) = ROW({', '.join(['%s'] * 16)}) WHERE product_id = %s
"""
REWARD_BY_KEY = f"SELECT {REWARD_COLUMNS} FROM reward_rule WHERE idempotency_key = %s"
# Rules change rarely: one at a time, so that versions have no gaps.
LOCK_REWARDS = "LOCK TABLE reward_rule IN SHARE ROW EXCLUSIVE MODE"
REWARD = f"SELECT {REWARD_COLUMNS} FROM reward_rule WHERE source = %s ORDER BY version DESC LIMIT 1"
ADD_REWARD = f"INSERT INTO reward_rule ({REWARD_COLUMNS}, idempotency_key) VALUES ({', '.join(['%s'] * 11)})"
REWARDS = f"""
SELECT {REWARD_COLUMNS} FROM (SELECT DISTINCT ON (source) * FROM reward_rule ORDER BY source, version DESC) AS newest
WHERE %(after)s::text IS NULL OR source > %(after)s ORDER BY source LIMIT %(limit)s
"""
REWARD_VERSIONS = f"""
SELECT {REWARD_COLUMNS} FROM reward_rule
WHERE source = %(source)s AND (%(before)s::int IS NULL OR version < %(before)s) ORDER BY version DESC LIMIT %(limit)s
"""


class PostgresCatalog:
    """Implements Catalog."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add_product(self, product: Product, *, idempotency_key: str) -> Product | None:
        async with self._database.connection() as connection:
            with contextlib.suppress(errors.UniqueViolation):  # the sku is taken
                await connection.execute(ADD_PRODUCT, (*product_to_row(product), idempotency_key))
            row = await (await connection.execute(PRODUCT_BY_KEY, (idempotency_key,))).fetchone()
        return product_from_row(row) if row else None

    async def product(self, product_id: str) -> Product | None:
        async with self._database.connection() as connection:
            row = await (await connection.execute(PRODUCT, (product_id,))).fetchone()
        return product_from_row(row) if row else None

    async def products(
        self, status: ProductStatus, *, after: tuple[int, str] | None, limit: int
    ) -> list[Product]:
        after_order, after_id = after or (None, None)
        async with self._database.connection() as connection:
            cursor = await connection.execute(PRODUCTS, {
                "status": int(status), "after_order": after_order, "after_id": after_id, "limit": limit,
            })
            return [product_from_row(row) for row in await cursor.fetchall()]

    async def change_product(
        self, product_id: str, changes: Mapping[str, object], *, now: datetime
    ) -> Product | None:
        async with self._database.transaction() as connection:
            row = await (await connection.execute(LOCKED_PRODUCT, (product_id,))).fetchone()
            if row is None:
                return None
            changed = replace(product_from_row(row), updated_at=now, **changes)  # type: ignore[arg-type]  # checked
            await connection.execute(CHANGE_PRODUCT, (*product_to_row(changed), product_id))
        return changed

    async def add_reward_rule(self, rule: RewardRule, *, idempotency_key: str) -> RewardRule:
        async with self._database.transaction() as connection:
            await connection.execute(LOCK_REWARDS)
            row = await (await connection.execute(REWARD_BY_KEY, (idempotency_key,))).fetchone()
            if row is not None:
                return reward_rule_from_row(row)
            row = await (await connection.execute(REWARD, (rule.source,))).fetchone()
            stored = replace(rule, version=1 + (reward_rule_from_row(row).version if row else 0))
            await connection.execute(ADD_REWARD, (*reward_rule_to_row(stored), idempotency_key))
        return stored

    async def reward_rule(self, source: str) -> RewardRule | None:
        async with self._database.connection() as connection:
            row = await (await connection.execute(REWARD, (source,))).fetchone()
        return reward_rule_from_row(row) if row else None

    async def reward_rules(self, source: str, *, after: tuple[str, int] | None, limit: int) -> list[RewardRule]:
        async with self._database.connection() as connection:
            if source:
                arguments = {"source": source, "before": after[1] if after else None, "limit": limit}
                cursor = await connection.execute(REWARD_VERSIONS, arguments)
            else:
                cursor = await connection.execute(REWARDS, {"after": after[0] if after else None, "limit": limit})
            return [reward_rule_from_row(row) for row in await cursor.fetchall()]
