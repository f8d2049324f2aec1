"""Limits shared by all replicas: GCRA and places in Redis, by Redis's own clock, in one script for each subject.

The keys of a subject share a hash slot. When Redis is away, each replica counts for itself: a limit may then be passed
as many times as there are replicas, but nobody is refused for Redis's sake.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis, RedisCluster
from redis.exceptions import RedisError

from llm_service.domain.rate_limit import Limits
from llm_service.usecases.admission import LocalLimiter
from llm_service.usecases.ports import Place
from servicekit.core.clock import Clock
from servicekit.core.ids import IdSource
from servicekit.telemetry.logs import EventLogger

log = EventLogger(__name__)

TIMEOUT_SECONDS = 0.25
REST_SECONDS = 1.0
LEASE_SECONDS = 30
"""A place whose process died is free after this."""
KEEP_EVERY_SECONDS = 10.0

# KEYS: places, requests, tokens. ARGV: most places, rpm, tpm, cost, ticket. Answers seconds to wait; 0 = entered.
ENTER = f"""
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local most, rpm, tpm, cost = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
if most > 0 then
    redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
    if redis.call('ZCARD', KEYS[1]) >= most then return '0.05' end
end
local function arrival(key, per, count)
    local known = math.max(tonumber(redis.call('GET', key) or '0'), now)
    local wait = known + math.min(count, per) * 60 / per - now - 60
    return wait, known + count * 60 / per
end
local wait, requests, tokens = 0, nil, nil
if rpm > 0 then local w, a = arrival(KEYS[2], rpm, 1) wait = math.max(wait, w) requests = a end
if tpm > 0 then local w, a = arrival(KEYS[3], tpm, cost) wait = math.max(wait, w) tokens = a end
if wait > 0 then return string.format('%.6f', wait) end
local function keep(key, at)
    redis.call('SET', key, string.format('%.6f', at), 'PX', math.ceil((at - now) * 1000) + 1000)
end
if requests then keep(KEYS[2], requests) end
if tokens then keep(KEYS[3], tokens) end
if most > 0 then
    redis.call('ZADD', KEYS[1], now + {LEASE_SECONDS}, ARGV[5])
    redis.call('EXPIRE', KEYS[1], {2 * LEASE_SECONDS})
end
return '0'
"""
# KEYS: places, tokens. ARGV: ticket, seconds of tokens to give back.
LEAVE = """
redis.call('ZREM', KEYS[1], ARGV[1])
local known = redis.call('GET', KEYS[2])
if known and ARGV[2] ~= '0' then
    redis.call('SET', KEYS[2], string.format('%.6f', tonumber(known) - tonumber(ARGV[2])), 'KEEPTTL')
end
return 0
"""
KEEP = f"""
local time = redis.call('TIME')
local until_ = tonumber(time[1]) + {LEASE_SECONDS}
for _, ticket in ipairs(ARGV) do redis.call('ZADD', KEYS[1], 'XX', until_, ticket) end
redis.call('EXPIRE', KEYS[1], {2 * LEASE_SECONDS})
return 0
"""


def _keys(subject: str) -> tuple[str, str, str]:
    begin = f"creditmesh:limit:{{{subject}}}"
    return f"{begin}:places", f"{begin}:requests", f"{begin}:tokens"


class RedisLimiter:
    """Implements Limiter on one Redis (redis://) or a cluster (redis+cluster://)."""

    def __init__(self, url: str, *, clock: Clock, ids: IdSource) -> None:
        options: dict[str, Any] = {"socket_timeout": TIMEOUT_SECONDS, "socket_connect_timeout": TIMEOUT_SECONDS}
        self._redis: Any
        if url.startswith("redis+cluster://"):
            self._redis = RedisCluster.from_url(url.replace("redis+cluster://", "redis://", 1), **options)
        else:
            self._redis = Redis.from_url(url, **options)
        self._clock = clock
        self._ids = ids
        self._local = LocalLimiter(clock)
        self._away_until = 0.0
        self._kept_at = 0.0
        self._leaving: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        while self._leaving:
            await asyncio.wait(set(self._leaving))
        await self._redis.aclose()

    async def enter(self, subject: str, limits: Limits, *, tokens: int) -> Place | float:
        if self._clock.monotonic() >= self._away_until:
            ticket = str(self._ids.new_id())
            try:
                wait = float(await self._redis.eval(
                    ENTER, 3, *_keys(subject), limits.max_concurrency, limits.rpm, limits.tpm, tokens, ticket
                ))
                return wait if wait > 0 else Place(subject, limits, ticket, tokens)
            except (RedisError, OSError, TimeoutError) as error:
                self._rest(error)
        return await self._local.enter(subject, limits, tokens=tokens)

    def leave(self, place: Place, *, used_tokens: int) -> None:
        self._local.wake(place.subject)
        if not place.ticket:
            self._local.leave(place, used_tokens=used_tokens)
            return
        task = asyncio.get_running_loop().create_task(self._leave(place, used_tokens))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def keep(self, places: Sequence[Place]) -> None:
        now = self._clock.monotonic()
        if now < max(self._away_until, self._kept_at + KEEP_EVERY_SECONDS):
            return
        self._kept_at = now
        tickets: dict[str, list[str]] = {}
        for place in places:
            if place.ticket and place.limits.max_concurrency:
                tickets.setdefault(place.subject, []).append(place.ticket)
        try:
            for subject, kept in tickets.items():
                await self._redis.eval(KEEP, 1, _keys(subject)[0], *kept)
        except (RedisError, OSError, TimeoutError) as error:
            self._rest(error)

    async def freed(self, subject: str, seconds: float) -> None:
        await self._local.freed(subject, seconds)

    async def _leave(self, place: Place, used_tokens: int) -> None:
        tpm = place.limits.tpm
        back = (place.tokens - used_tokens) * 60 / tpm if tpm else 0
        places, _, tokens = _keys(place.subject)
        try:
            await self._redis.eval(LEAVE, 2, places, tokens, place.ticket, f"{back:.6f}" if back else "0")
        except (RedisError, OSError, TimeoutError) as error:
            self._rest(error)

    def _rest(self, error: Exception) -> None:
        self._away_until = self._clock.monotonic() + REST_SECONDS
        log.warning("limits_counted_here", kind=type(error).__name__)
