"""A server's life: start in order, be ready when what it needs is ready, drain, stop in reverse."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack

from servicekit.rpc.grpc_server import GrpcServer
from servicekit.rpc.server import HealthBoard
from servicekit.telemetry.logs import EventLogger

log = EventLogger(__name__)

READINESS_SECONDS = 0.5
NOT_READY_SECONDS = 0.1
"""Between two looks while something is missing."""
CHECK_TIMEOUT_SECONDS = 2.0


class Readiness:
    """Shows SERVING while every check passes. A check raises, or answers False, when it does not."""

    def __init__(self, board: HealthBoard, checks: Mapping[str, Callable[[], Awaitable[bool]]]) -> None:
        self._board = board
        self._checks = checks
        self._draining = False
        self._failing: set[str] | None = None

    async def begin(self) -> None:
        """NOT_SERVING until the checks have passed once; the library would say SERVING meanwhile."""
        await self._board.show(serving=False)

    async def watch(self) -> None:
        """Runs until it is cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(NOT_READY_SECONDS if self._failing else READINESS_SECONDS)

    async def refresh(self) -> None:
        failing = {name for name, check in self._checks.items() if not await self._passes(check)}
        if self._draining or failing == self._failing:
            return
        log.info("readiness", serving=not failing, waiting_for=sorted(failing))
        self._failing = failing
        await self._board.show(serving=not failing)

    async def drain(self) -> None:
        self._draining = True
        await self._board.drain()

    @staticmethod
    async def _passes(check: Callable[[], Awaitable[bool]]) -> bool:
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_SECONDS):
                return await check()
        except Exception:  # noqa: BLE001 - whatever a check raises, the dependency is not ready
            return False


@contextlib.asynccontextmanager
async def background(work: Callable[[], Awaitable[None]], *, name: str) -> AsyncIterator[None]:
    """Runs `work` beside the body; a crash is logged and the work begun again after a second."""

    async def supervise() -> None:
        while True:
            try:
                await work()
                return
            except Exception as error:  # noqa: BLE001 - logged, and tried again
                log.error("background_failed", error=error, task=name)
                await asyncio.sleep(1.0)

    task = asyncio.create_task(supervise(), name=name)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def stop_signal() -> asyncio.Event:
    """An event that SIGTERM or SIGINT sets."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


async def serve_until_stopped(
    server: GrpcServer, *, readiness: Readiness, stop: asyncio.Event, drain_seconds: float, stack: AsyncExitStack,
    after_drain: Callable[[], Awaitable[None]], on_drain: Callable[[], None] = lambda: None,
) -> None:
    """Serves until `stop`; then NOT_SERVING, no new calls, running ones get `drain_seconds`, the rest is cancelled.

    `on_drain` ends what would go on for ever, such as watches. `after_drain` runs when no RPC is left; what entered
    `stack` is closed last, in reverse order.
    """
    # What start-up made stays: collecting it again and again would stop every call for tens of milliseconds.
    gc.collect()
    gc.freeze()
    # And what one batch of calls makes is no reason to look for garbage: almost all of it goes by its reference counts.
    gc.set_threshold(20_000, 10, 10)
    await readiness.begin()
    await server.start()
    async with background(readiness.watch, name="readiness"):
        await stop.wait()
        log.info("draining", seconds=drain_seconds)
        await readiness.drain()
        on_drain()
        await server.stop(drain_seconds)
        await after_drain()
    await stack.aclose()
    log.info("stopped")
