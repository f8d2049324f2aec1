"""One suite over both limiters: in the process, and in a real Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from llm_service.clients.redis_limits import RedisLimiter
from llm_service.domain.errors import RateLimited
from llm_service.domain.rate_limit import Limits
from llm_service.usecases.admission import Admission, LocalLimiter
from llm_service.usecases.ports import Limiter, Place
from servicekit.core.clock import SystemClock
from servicekit.core.ids import RandomIdSource
from tests.support.ports import free_port
from tests.support.redis import Redis

CLOCK = SystemClock()


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    server = Redis(Path(tmp_path_factory.mktemp("redis")))
    server.start()
    yield server
    server.stop()


@pytest.fixture(params=["local", "redis"])
async def limiter(request: pytest.FixtureRequest) -> AsyncIterator[Limiter]:
    if request.param == "local":
        yield LocalLimiter(CLOCK)
        return
    made = RedisLimiter(request.getfixturevalue("redis").url, clock=CLOCK, ids=RandomIdSource())
    yield made
    await made.close()


def subject(request: pytest.FixtureRequest) -> str:
    return f"model:{request.node.name}-{time.monotonic_ns()}"


async def taken(limiter: Limiter, name: str, limits: Limits, *, tokens: int = 1) -> Place:
    place = await limiter.enter(name, limits, tokens=tokens)
    assert isinstance(place, Place), place
    return place


async def settle(limiter: Limiter) -> None:
    """Leaving Redis is a task of its own."""
    for _ in range(20):
        await asyncio.sleep(0.005)


async def test_places_are_given_back(limiter: Limiter, request: pytest.FixtureRequest) -> None:
    name, limits = subject(request), Limits(max_concurrency=2)
    first = await taken(limiter, name, limits)
    await taken(limiter, name, limits)
    assert await limiter.enter(name, limits, tokens=1) == pytest.approx(0.05)
    await limiter.keep([first])
    limiter.leave(first, used_tokens=1)
    await settle(limiter)
    await taken(limiter, name, limits)


async def test_requests_and_tokens_are_counted_all_or_nothing(limiter: Limiter, request: pytest.FixtureRequest) -> None:
    name, limits = subject(request), Limits(rpm=3, tpm=600)
    first = await taken(limiter, name, limits, tokens=500)
    wait = await limiter.enter(name, limits, tokens=500)
    assert isinstance(wait, float)
    assert 35 < wait <= 40, "400 too many at 10 a second"
    limiter.leave(first, used_tokens=100)
    await settle(limiter)
    await taken(limiter, name, limits, tokens=450)
    await taken(limiter, name, limits, tokens=1)
    wait = await limiter.enter(name, limits, tokens=1)
    assert isinstance(wait, float)
    assert 15 < wait <= 20, "the refused one took no request; the fourth in a minute waits for a third of it"


async def test_more_than_a_minutes_worth_passes_after_a_minutes_rest(limiter: Limiter, request: pytest.FixtureRequest) -> None:
    name, limits = subject(request), Limits(tpm=100)
    await taken(limiter, name, limits, tokens=1000)
    assert isinstance(await limiter.enter(name, limits, tokens=1), float)


async def test_never_more_at_once_than_there_are_places(limiter: Limiter, request: pytest.FixtureRequest) -> None:
    name, limits = subject(request), Limits(max_concurrency=5)
    admission = Admission(limiter, clock=CLOCK, queue_seconds=10.0, most_waiting=100)
    running = most = 0
    order: list[int] = []

    async def one(number: int) -> None:
        nonlocal running, most
        place = await admission.enter(name, limits, tokens=1, deadline=None, what="it")
        order.append(number)
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        admission.leave(place, used_tokens=1)

    await asyncio.gather(*(one(number) for number in range(40)))
    assert most <= 5
    assert sorted(order) == list(range(40))
    if isinstance(limiter, LocalLimiter):  # answers of Redis overtake each other before the queue begins
        assert order[5:] == sorted(order[5:]), "first come, first served"


async def test_the_queue_is_short_and_knows_deadlines(limiter: Limiter, request: pytest.FixtureRequest) -> None:
    name, limits = subject(request), Limits(max_concurrency=1)
    admission = Admission(limiter, clock=CLOCK, queue_seconds=0.3, most_waiting=2)
    place = await admission.enter(name, limits, tokens=1, deadline=None, what="it")

    async def refused(deadline: float | None) -> float:
        began = CLOCK.monotonic()
        with pytest.raises(RateLimited) as caught:
            await admission.enter(name, limits, tokens=1, deadline=deadline, what="it")
        assert caught.value.retry_after_seconds
        return CLOCK.monotonic() - began

    waiting = [asyncio.create_task(refused(None)) for _ in range(2)]
    await asyncio.sleep(0.05)
    assert await refused(None) < 0.1, "the queue is full"
    assert all(0.2 < each < 1.0 for each in await asyncio.gather(*waiting))
    assert await refused(CLOCK.monotonic() + 0.1) < 0.25
    admission.leave(place, used_tokens=1)
    await settle(limiter)
    await admission.enter(name, limits, tokens=1, deadline=None, what="it")


async def test_without_redis_each_replica_counts_for_itself() -> None:
    limiter = RedisLimiter(f"redis://127.0.0.1:{free_port()}/0", clock=CLOCK, ids=RandomIdSource())
    limits = Limits(max_concurrency=1)
    place = await taken(limiter, "model:a", limits)
    assert await limiter.enter("model:a", limits, tokens=1) == 0.05
    limiter.leave(place, used_tokens=1)
    await taken(limiter, "model:a", limits)
    await limiter.close()


async def test_two_replicas_share_a_limit_and_a_dead_ones_places_come_back(redis: Redis, request: pytest.FixtureRequest) -> None:
    one, other = (RedisLimiter(redis.url, clock=CLOCK, ids=RandomIdSource()) for _ in range(2))
    name, limits = subject(request), Limits(max_concurrency=2, rpm=100)
    await taken(one, name, limits)
    await taken(other, name, limits)
    assert isinstance(await other.enter(name, limits, tokens=1), float)
    # As if 30 s had passed without a sign of life.
    key = f"creditmesh:limit:{{{name}}}:places"
    for member in await one._redis.zrange(key, 0, -1):
        await one._redis.zadd(key, {member: 1})
    await taken(other, name, limits)
    await one.close()
    await other.close()
