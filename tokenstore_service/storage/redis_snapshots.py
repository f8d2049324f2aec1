"""Balances in Redis: one key for each user, moved forward by a script that never lets an older state in (I12)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import orjson
from redis.asyncio import Redis, RedisCluster
from redis.exceptions import RedisError

from servicekit.core.clock import Clock
from servicekit.telemetry.logs import EventLogger
from tokenstore_service.domain.account import Account

log = EventLogger(__name__)

KEEP_MS = 5_000
"""A snapshot that could not be moved forward, because Redis was away just then, is gone after this."""
TIMEOUT_SECONDS = 0.25
REST_SECONDS = 1.0
"""For so long Redis is left alone after it failed, so that its absence costs the callers nothing."""

SET_IF_NEWER = f"""
local known = redis.call('HGET', KEYS[1], 'version')
if known and tonumber(known) > tonumber(ARGV[1]) then return 0 end
redis.call('HSET', KEYS[1], 'version', ARGV[1], 'account', ARGV[2])
redis.call('PEXPIRE', KEYS[1], {KEEP_MS})
return 1
"""


def _key(user_id: str) -> str:
    return f"creditmesh:balance:{{{user_id}}}"


class RedisSnapshots:
    """Implements SnapshotCache on one Redis (redis://) or a cluster (redis+cluster://)."""

    def __init__(self, url: str, *, clock: Clock) -> None:
        options: dict[str, Any] = {"socket_timeout": TIMEOUT_SECONDS, "socket_connect_timeout": TIMEOUT_SECONDS}
        self._redis: Any
        if url.startswith("redis+cluster://"):
            self._redis = RedisCluster.from_url(url.replace("redis+cluster://", "redis://", 1), **options)
        else:
            self._redis = Redis.from_url(url, **options)
        self._clock = clock
        self._away_until = 0.0

    async def close(self) -> None:
        await self._redis.aclose()

    async def get(self, user_ids: Sequence[str]) -> dict[str, Account]:
        if self._clock.monotonic() < self._away_until:
            return {}
        try:
            pipeline = self._redis.pipeline(transaction=False) if len(user_ids) > 1 else None
            if pipeline is None:
                answers = [await self._redis.hget(_key(user_ids[0]), "account")]
            else:
                for user_id in user_ids:
                    pipeline.hget(_key(user_id), "account")
                answers = await pipeline.execute()
        except (RedisError, OSError, TimeoutError) as error:
            self._rest(error)
            return {}
        found = (_account_from_text(answer) for answer in answers if answer)
        return {account.user_id: account for account in found}

    async def put(self, accounts: Sequence[Account]) -> None:
        if self._clock.monotonic() < self._away_until:
            return
        try:
            pipeline = self._redis.pipeline(transaction=False)
            for account in accounts:
                pipeline.eval(
                    SET_IF_NEWER, 1, _key(account.user_id), account.version, _account_to_text(account)
                )
            await pipeline.execute()
        except (RedisError, OSError, TimeoutError) as error:
            self._rest(error)

    def _rest(self, error: BaseException) -> None:
        self._away_until = self._clock.monotonic() + REST_SECONDS
        log.warning("redis_away", kind=type(error).__name__)


def _account_to_text(account: Account) -> bytes:
    return orjson.dumps([
        account.user_id, account.balance_micros, account.held_micros, account.overdraft_limit_micros,
        account.total_recharged_micros, account.total_rewarded_micros, account.total_consumed_micros, account.seq,
        account.updated_at, account.version,
    ])


def _account_from_text(text: bytes) -> Account:
    names = (
        "user_id", "balance_micros", "held_micros", "overdraft_limit_micros", "total_recharged_micros",
        "total_rewarded_micros", "total_consumed_micros", "seq", "updated_at", "version",
    )
    values = dict(zip(names, orjson.loads(text), strict=True))
    updated_at = values.pop("updated_at")
    return Account(**values, updated_at=None if updated_at is None else datetime.fromisoformat(updated_at))
