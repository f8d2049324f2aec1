"""Policies of users in PostgreSQL, and all of them in memory: only users who differ from the defaults have one."""

from __future__ import annotations

from dataclasses import asdict

from psycopg.types.json import Jsonb

from llm_service.domain.rate_limit import Limits
from llm_service.storage.model_registry import RAISE_REVISION
from llm_service.usecases.ports import UserPolicy
from servicekit.db.database import Database

COLUMNS = "user_id, limits, keep_no_answers, updated_at"
SET = f"""
INSERT INTO user_policy ({COLUMNS}) VALUES (%s, %s, %s, %s)
ON CONFLICT (user_id) DO UPDATE SET
    limits = excluded.limits, keep_no_answers = excluded.keep_no_answers, updated_at = excluded.updated_at
"""
FORGET_ANSWERS = "DELETE FROM call_answer WHERE user_id = %s"
DELETE = "DELETE FROM user_policy WHERE user_id = %s"
GET = f"SELECT {COLUMNS} FROM user_policy WHERE user_id = %s"
LIST = f"SELECT {COLUMNS} FROM user_policy WHERE user_id > %s ORDER BY user_id LIMIT %s"
ALL = f"SELECT {COLUMNS} FROM user_policy"


class PostgresUserPolicies:
    """Implements UserPolicyStore and UserPolicies. `refresh` is called when the registry's revision rises."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[str, UserPolicy] = {}

    def of(self, user_id: str) -> UserPolicy | None:
        return self._known.get(user_id) if self._known else None

    async def refresh(self) -> None:
        async with self._database.connection() as connection:
            rows = await (await connection.execute(ALL)).fetchall()
        self._known = {row[0]: _from_row(row) for row in rows}

    async def get_policy(self, user_id: str) -> UserPolicy | None:
        async with self._database.connection() as connection:
            row = await (await connection.execute(GET, (user_id,))).fetchone()
        return _from_row(row) if row else None

    async def set_policy(self, policy: UserPolicy) -> None:
        limits = None if policy.limits is None else Jsonb(asdict(policy.limits))
        async with self._database.transaction() as connection:
            await connection.execute(SET, (policy.user_id, limits, policy.keep_no_answers, policy.updated_at))
            if policy.keep_no_answers:
                await connection.execute(FORGET_ANSWERS, (policy.user_id,))
            await connection.execute(RAISE_REVISION)
        self._known[policy.user_id] = policy

    async def delete_policy(self, user_id: str) -> None:
        async with self._database.transaction() as connection:
            await connection.execute(DELETE, (user_id,))
            await connection.execute(RAISE_REVISION)
        self._known.pop(user_id, None)

    async def list_policies(self, *, after: str, limit: int) -> list[UserPolicy]:
        async with self._database.connection() as connection:
            rows = await (await connection.execute(LIST, (after, limit))).fetchall()
        return [_from_row(row) for row in rows]


def _from_row(row: tuple[object, ...]) -> UserPolicy:
    user_id, limits, keep_no_answers, updated_at = row
    return UserPolicy(
        str(user_id), None if limits is None else Limits(**limits), bool(keep_no_answers), updated_at  # type: ignore[arg-type]  # as the table says
    )
