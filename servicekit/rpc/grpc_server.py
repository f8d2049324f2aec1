"""A gRPC server on asyncio, over `servicekit.http2`.

grpc.aio takes up calls one after the other, wakes the event loop from a thread of its own for every step of a call, and
costs several times what a call's own work costs. Here a call is a task that begins in the turn of the loop in which its
request has arrived, and what is answered within one turn is one write.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import ssl
from collections.abc import Mapping, Sequence
from typing import Any

import grpc

from servicekit.http2.headers import RequestHeaders
from servicekit.http2.server import ServerConnection
from servicekit.rpc.grpc_call import Call, Handler
from servicekit.settings import split_address
from servicekit.telemetry.logs import EventLogger

log = EventLogger(__name__)

BACKLOG = 1024
HANDSHAKE_SECONDS = 20.0


class GrpcServer:
    """Serves handlers on the sockets it is given; `tls` demands h2 by ALPN."""

    def __init__(self, sockets: Sequence[socket.socket], *, tls: ssl.SSLContext | None = None) -> None:
        self.sockets = list(sockets)
        self.handlers: dict[str, Handler] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.connections: dict[int, ServerConnection] = {}
        self.calls_begun = 0
        self.calls_succeeded = 0
        self.calls_failed = 0
        self._numbers = itertools.count(1)
        self._tls = tls
        self._listeners: list[asyncio.Server] = []
        self._is_stopping = False

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Handler]) -> None:
        """As generated code calls it."""
        self.handlers.update({f"/{service}/{name}": handler for name, handler in handlers.items()})

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        options: dict[str, Any] = {"ssl_handshake_timeout": HANDSHAKE_SECONDS} if self._tls else {}
        if self._tls:
            options["ssl"] = self._tls
        self._listeners = [
            await loop.create_server(lambda: ServerConnection(self), sock=each, backlog=BACKLOG, **options)
            for each in self.sockets
        ]

    async def stop(self, grace: float | None) -> None:
        """No new calls; running ones get `grace` seconds, the rest is cancelled and waited for."""
        self._is_stopping = True
        for listener in self._listeners:
            listener.close()
        for connection in tuple(self.connections.values()):
            connection.go_away()
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=grace or 0)
        for connection in tuple(self.connections.values()):
            for call in tuple(connection.streams.values()):
                assert isinstance(call, Call)
                call.give_up(grpc.StatusCode.UNAVAILABLE, "the server is stopping")
        if self.tasks:
            await asyncio.wait(self.tasks)
        for connection in tuple(self.connections.values()):
            connection.close()
        for socket_ in self.sockets:
            socket_.close()

    # What connections ask

    def begin(self, connection: ServerConnection, stream_id: int, headers: RequestHeaders) -> Call:
        self.calls_begun += 1
        return Call(connection, stream_id, headers, self)

    def ended(self, call: Call) -> None:
        if call.succeeded:
            self.calls_succeeded += 1
        else:
            self.calls_failed += 1

    def opened(self, connection: ServerConnection) -> None:
        connection.number = next(self._numbers)
        self.connections[connection.number] = connection
        if self._is_stopping:
            connection.go_away()

    def closed(self, connection: ServerConnection) -> None:
        self.connections.pop(connection.number, None)


def listen(address: str, *, share: bool = False) -> list[socket.socket]:
    """Sockets bound to each address of `host:port`; `[::]` takes IPv4 too. `share` lets other processes bind the same.
    Raises OSError."""
    host, port = split_address(address)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    try:
        for family, _, _, _, where in dict.fromkeys(found):
            dual = family == socket.AF_INET6 and where[0] == "::" and socket.has_dualstack_ipv6()
            sockets.append(socket.create_server(
                where[:2], family=family, backlog=BACKLOG, reuse_port=share, dualstack_ipv6=dual
            ))
            # Accepted sockets inherit it; asyncio sets it only where the protocol's number was given.
            sockets[-1].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError:
        for each in sockets:
            each.close()
        raise
    return sockets


def tls_context(certificate: Any, key: Any, client_ca: Any | None = None) -> ssl.SSLContext:
    """From PEM files. With `client_ca`, clients must show a certificate of that authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["h2"])
    if client_ca is not None:
        context.load_verify_locations(client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context
