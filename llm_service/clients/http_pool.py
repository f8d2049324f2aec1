"""Connections to model servers: kept open between requests, opened only to addresses that may be asked.

A host name is looked up at most once a minute and its addresses are checked then and for each new connection, so that a
name that changes its address later gains nothing.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import socket
import ssl
from collections.abc import Callable
from typing import NamedTuple, cast

from llm_service.clients.http_connection import HttpConnection
from llm_service.domain.upstream_address import Address
from servicekit.dialing import AddressInfo, dial

IDLE_SECONDS = 60.0
LOOKUP_SECONDS = 60.0


class AddressRefused(OSError):
    """Every address of the host is one that may not be asked."""


class Origin(NamedTuple):
    """Where a connection leads."""

    is_tls: bool
    host: str
    port: int


class HttpPool:
    """Gives each request a connection of its own, an idle one first."""

    def __init__(self, is_allowed: Callable[[Address], bool]) -> None:
        self._is_allowed = is_allowed
        self._idle: dict[Origin, list[HttpConnection]] = {}
        self._open: set[HttpConnection] = set()
        self._lookups: dict[Origin, tuple[float, asyncio.Task[list[AddressInfo]]]] = {}
        self._sweeper: asyncio.TimerHandle | None = None

    async def connection(self, origin: Origin, *, timeout: float) -> HttpConnection:
        """An open connection. Raises AddressRefused, another OSError, or TimeoutError after `timeout` seconds."""
        idle = self._idle.get(origin)
        while idle:
            if (connection := idle.pop()).is_open:
                return connection
        async with asyncio.timeout(timeout):
            return await self._connect(origin)

    async def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in list(self._open):
            connection.abort()
        for _, lookup in self._lookups.values():
            lookup.cancel()
        await asyncio.sleep(0)  # the transports close in the next turn of the loop

    async def _connect(self, origin: Origin) -> HttpConnection:
        infos = [info for info in await self._addresses(origin) if self._is_allowed(_address_of(info))]
        if not infos:
            raise AddressRefused(f"{origin.host} has no address that may be asked")
        try:
            connection = await dial(
                lambda: HttpConnection(
                    on_idle=functools.partial(self._rest, origin), on_lost=functools.partial(self._forget, origin)
                ),
                infos, host=origin.host, tls=_tls() if origin.is_tls else None,
            )
        except OSError:
            self._lookups.pop(origin, None)
            raise
        if connection.is_open:
            self._open.add(connection)
        return connection

    async def _addresses(self, origin: Origin) -> list[AddressInfo]:
        loop = asyncio.get_running_loop()
        until, lookup = self._lookups.get(origin, (0.0, None))
        if lookup is None or (lookup.done() and (loop.time() >= until or lookup.exception() is not None)):
            lookup = loop.create_task(_look_up(origin.host, origin.port), name="look-up")
            self._lookups[origin] = (loop.time() + LOOKUP_SECONDS, lookup)
            lookup.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        return await asyncio.shield(lookup)

    def _rest(self, origin: Origin, connection: HttpConnection) -> None:
        connection.idle_since = asyncio.get_running_loop().time()
        self._idle.setdefault(origin, []).append(connection)
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(IDLE_SECONDS / 2, self._sweep)

    def _forget(self, origin: Origin, connection: HttpConnection) -> None:
        self._open.discard(connection)
        if connection in (idle := self._idle.get(origin, [])):
            idle.remove(connection)

    def _sweep(self) -> None:
        """Closes what nobody needed for long."""
        loop = asyncio.get_running_loop()
        for connections in self._idle.values():
            for connection in list(connections):
                if loop.time() - connection.idle_since >= IDLE_SECONDS:
                    connections.remove(connection)
                    connection.abort()
        self._idle = {origin: connections for origin, connections in self._idle.items() if connections}
        self._sweeper = loop.call_later(IDLE_SECONDS / 2, self._sweep) if self._idle else None


async def _look_up(host: str, port: int) -> list[AddressInfo]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return cast("list[AddressInfo]", found)


def _address_of(info: AddressInfo) -> Address:
    return ipaddress.ip_address(info[4][0].partition("%")[0])


@functools.cache
def _tls() -> ssl.SSLContext:
    """The system's certificate authorities, or those of SSL_CERT_FILE."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context
