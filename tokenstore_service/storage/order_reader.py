"""Reads of orders."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from servicekit.db.database import Database
from tokenstore_service.domain.order import Order, OrderStatus, OrderStep
from tokenstore_service.storage.row_mapping import ORDER_COLUMNS, order_from_row, order_step_from_row

ORDER = f"SELECT {ORDER_COLUMNS} FROM credit_order WHERE order_id = %s"
STEPS = """
SELECT user_id, order_id, number, status, at, actor, note FROM order_step
WHERE user_id = %s AND order_id = %s ORDER BY number
"""
# Ids are UUIDv7: their order is that of creation.
ORDERS_OF_USER = f"""
SELECT {ORDER_COLUMNS} FROM credit_order
WHERE user_id = %(user_id)s AND (%(status)s::smallint IS NULL OR status = %(status)s)
    AND (%(before)s::uuid IS NULL OR order_id < %(before)s)
ORDER BY order_id DESC LIMIT %(limit)s
"""
ORDERS_TO_REFUND = f"""
SELECT {ORDER_COLUMNS} FROM credit_order
WHERE refund_due AND (%(before)s::uuid IS NULL OR order_id < %(before)s) ORDER BY order_id DESC LIMIT %(limit)s
"""
PENDING = f"""
SELECT {ORDER_COLUMNS} FROM credit_order WHERE status = 1 AND created_at < %s ORDER BY created_at, order_id LIMIT %s
"""


class PostgresOrderReader:
    """Implements OrderReader."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def order(self, order_id: UUID) -> Order | None:
        rows = await self._rows(ORDER, (order_id,))
        return order_from_row(rows[0]) if rows else None

    async def steps(self, user_id: str, order_id: UUID) -> list[OrderStep]:
        return [order_step_from_row(row) for row in await self._rows(STEPS, (user_id, order_id))]

    async def orders_of_user(
        self, user_id: str, status: OrderStatus | None, *, before: UUID | None, limit: int
    ) -> list[Order]:
        arguments = {
            "user_id": user_id, "status": None if status is None else int(status), "before": before, "limit": limit
        }
        return [order_from_row(row) for row in await self._rows(ORDERS_OF_USER, arguments)]

    async def orders_to_refund(self, *, before: UUID | None, limit: int) -> list[Order]:
        rows = await self._rows(ORDERS_TO_REFUND, {"before": before, "limit": limit})
        return [order_from_row(row) for row in rows]

    async def pending_orders(self, *, created_before: datetime, limit: int) -> list[Order]:
        return [order_from_row(row) for row in await self._rows(PENDING, (created_before, limit))]

    async def _rows(self, statement: str, arguments: Any) -> list[Any]:
        async with self._database.connection() as connection:
            return await (await connection.execute(statement, arguments, binary=True)).fetchall()
