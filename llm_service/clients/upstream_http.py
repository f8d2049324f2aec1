"""HTTP to model servers: one connection pool, addresses that may be asked, answers bounded in size.

Redirects are not followed. A host name is looked up for each new connection and only addresses that the policy allows
are connected to, so that a name that changes its address later gains nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import socket
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import aiohttp
import orjson
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from llm_service.clients.upstream_failures import failure_of, retry_after_of
from llm_service.domain.deployment import Deployment
from llm_service.domain.routing import FailureKind
from llm_service.domain.upstream_address import Reach, is_allowed
from llm_service.usecases.ports import UpstreamFailure

MOST_ERROR_BYTES = 64 * 1024
READ_BYTES = 2**15
"""Beyond twice this, a connection is not read until its client takes what came: a slow client costs no memory."""
MOST_ANSWER_BYTES = 64 * 1024 * 1024
OWN_HEADERS = frozenset({
    "authorization", "host", "content-type", "content-length", "transfer-encoding", "accept", "connection", "expect",
    "api-key", "x-api-key", "upgrade", "te", "trailer",
})


class AddressRefused(OSError):
    """Every address of the host is one that may not be asked."""


class CheckedResolver(AbstractResolver):
    """Looks names up and leaves out what may not be asked."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach
        self._inner = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        allowed = [
            each for each in found
            if is_allowed(ipaddress.ip_address(each["host"].partition("%")[0]), self._reach)
        ]
        if not allowed:
            raise AddressRefused(f"{host} has no address that may be asked")
        return allowed

    async def close(self) -> None:
        await self._inner.close()


class UpstreamHttp:
    """Posts JSON to model servers. Timeouts between reads are the caller's."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    @contextlib.asynccontextmanager
    async def post(
        self, deployment: Deployment, path: str, body: bytes, headers: dict[str, str], *, query: dict[str, str],
        on_sent: Callable[[], None],
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer with status 200. Raises UpstreamFailure for any other, and for whatever breaks on the way."""
        url = _checked_url(deployment.base_url, path, tuple(query.items()), self._reach)
        own = {name: value for name, value in deployment.extra_headers if name.lower() not in OWN_HEADERS}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=deployment.timeouts.connect)
        try:
            async with self._open_session().post(
                url, data=body, headers=own | headers, timeout=timeout, allow_redirects=False,
                trace_request_ctx=on_sent,
            ) as response:
                if response.status != 200:
                    raise await _failure_of(response)
                yield response
        except AddressRefused:
            raise _unavailable("its address may not be asked", FailureKind.MISCONFIGURED) from None
        except (aiohttp.ClientError, asyncio.IncompleteReadError, ConnectionError) as error:
            refused = isinstance(error.__cause__, AddressRefused) or isinstance(
                getattr(error, "os_error", None), AddressRefused
            )
            kind = FailureKind.MISCONFIGURED if refused else FailureKind.UNAVAILABLE
            raise _unavailable(type(error).__name__, kind) from None
        except TimeoutError as error:
            # aiohttp's own connect timeout; the caller's timeout arrives as a cancellation.
            raise _unavailable("the connect timeout passed") from error

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            tracing = aiohttp.TraceConfig()
            tracing.on_request_headers_sent.append(_tell_sent)
            connector = aiohttp.TCPConnector(
                limit=0, keepalive_timeout=60, ttl_dns_cache=60, resolver=CheckedResolver(self._reach)
            )
            self._session = aiohttp.ClientSession(
                connector=connector, auto_decompress=True, trust_env=False, cookie_jar=aiohttp.DummyCookieJar(),
                read_bufsize=READ_BYTES, trace_configs=[tracing],
            )
        return self._session


@functools.lru_cache(maxsize=1024)
def _checked_url(base_url: str, path: str, query: tuple[tuple[str, str], ...], reach: Reach) -> URL:
    """Raises UpstreamFailure for a literal address that may not be asked: it passes no resolver."""
    url = URL(base_url.rstrip("/") + path, encoded=True)
    with contextlib.suppress(ValueError):
        if not is_allowed(ipaddress.ip_address(url.host or ""), reach):
            raise _unavailable("its address may not be asked", FailureKind.MISCONFIGURED)
    return url.update_query(query) if query else url


async def _tell_sent(_session: aiohttp.ClientSession, context: SimpleNamespace, _params: Any) -> None:
    context.trace_request_ctx()


def _unavailable(detail: str, kind: FailureKind = FailureKind.UNAVAILABLE) -> UpstreamFailure:
    return UpstreamFailure("UPSTREAM_UNAVAILABLE", detail, kind=kind)


async def read_json(response: aiohttp.ClientResponse) -> Any:
    """The whole answer. Raises UpstreamFailure when it is too long or no JSON."""
    data = await _read_at_most(response, MOST_ANSWER_BYTES)
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        raise _unavailable("the answer is no JSON") from None


async def _read_at_most(response: aiohttp.ClientResponse, limit: int) -> bytes:
    pieces: list[bytes] = []
    size = 0
    async for piece in response.content.iter_any():
        size += len(piece)
        if size > limit:
            raise UpstreamFailure("UPSTREAM_UNAVAILABLE", "the answer is too long", http_status=response.status)
        pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


async def _failure_of(response: aiohttp.ClientResponse) -> UpstreamFailure:
    error: Any = None
    with contextlib.suppress(orjson.JSONDecodeError, UpstreamFailure, aiohttp.ClientError):
        document = orjson.loads(await _read_at_most(response, MOST_ERROR_BYTES))
        if isinstance(document, list) and document:
            document = document[0]
        error = document.get("error", document) if isinstance(document, dict) else None
        if isinstance(error, str):
            error = {"message": error}
    return failure_of(error, http_status=response.status, retry_after_seconds=retry_after_of(response.headers))
