"""Taking up calls faster than grpc.aio does by itself.

grpc.aio waits for one call of a method at a time, and to take one up costs several turns of the event loop. While many
calls run, a turn takes milliseconds: then no more than some hundreds a second are taken up, whatever waits, and what is
batched behind them comes in small batches. A busy method has acceptors of its own here, each waiting for a call.

They need private names of grpc's. With a version that lacks one, grpc.aio takes up the calls alone, and it is logged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import grpc.aio
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # compiled

from servicekit.telemetry.logs import EventLogger

log = EventLogger(__name__)

ACCEPTORS = 32
"""Of each busy method: so many calls can one turn of the event loop take up."""
_NEEDED = ("_MethodResolver", "_RequestCallError", "_handle_rpc", "_schedule_rpc_coro")


class AcceptingServer:
    """A grpc.aio server and acceptors for its busy methods; `busy` maps full method names, which are registered with
    the server, to their handlers."""

    def __init__(self, server: grpc.aio.Server, busy: Mapping[str, Any]) -> None:
        self._server = server
        self._core: Any = getattr(server, "_server", None)
        self._busy = dict(busy)
        self._acceptors: list[asyncio.Task[None]] = []
        self._calls: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        await self._server.start()
        if not hasattr(self._core, "_request_registered_call") or not all(hasattr(cygrpc, each) for each in _NEEDED):
            log.warning("grpc_accepts_alone", version=grpc.__version__)
            return
        resolver = cygrpc._MethodResolver([], self._busy)
        self._acceptors = [
            asyncio.create_task(self._accept(method, resolver), name=f"accept-{method}")
            for method in self._busy for _ in range(ACCEPTORS)
        ]

    async def stop(self, grace: float | None) -> None:
        """No new calls; running ones get `grace` seconds."""
        await self._server.stop(grace)
        await asyncio.gather(*self._acceptors)

    async def _accept(self, method: str, resolver: Any) -> None:
        name, loop = method.encode(), asyncio.get_running_loop()
        while self._core.is_running():
            try:
                call = await self._core._request_registered_call(name)
            except cygrpc._RequestCallError:
                continue  # the server stops, or the client left in the same moment
            except Exception as error:  # noqa: BLE001 - logged; grpc.aio goes on accepting
                log.error("acceptor_failed", error=error, method=method)
                return
            handling = cygrpc._handle_rpc(method, resolver, (), call, loop, False)
            task = loop.create_task(cygrpc._schedule_rpc_coro(handling, call, loop, method))
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)
