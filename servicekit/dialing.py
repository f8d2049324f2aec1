"""Connecting to one of several addresses, whichever answers first (RFC 8305)."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import aiohappyeyeballs

NEXT_ADDRESS_SECONDS = 0.25
"""When one address of several does not answer, the next is tried beside it (RFC 8305, 5: 250 ms)."""

AddressInfo = tuple[int, int, int, str, tuple[str, int] | tuple[str, int, int, int]]
AnyProtocol = TypeVar("AnyProtocol", bound=asyncio.Protocol)


async def dial(
    make: Callable[[], AnyProtocol], addresses: Sequence[AddressInfo], *, host: str, tls: ssl.SSLContext | None
) -> AnyProtocol:
    """A protocol on a new connection; with `tls` the certificate must be of `host`. Raises OSError."""
    sock = await aiohappyeyeballs.start_connection(
        list(addresses), happy_eyeballs_delay=NEXT_ADDRESS_SECONDS, interleave=1
    )
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        options: dict[str, Any] = {"ssl": tls, "server_hostname": host} if tls else {}
        _, protocol = await asyncio.get_running_loop().create_connection(make, sock=sock, **options)
    except BaseException:
        sock.close()
        raise
    return protocol
