"""JSON to model servers: one request and its answer, and what their failures mean. Redirects are not followed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import orjson

from llm_service.clients.http_connection import HttpAnswer, HttpBroken
from llm_service.clients.http_pool import AddressRefused, HttpPool, Origin
from llm_service.clients.upstream_failures import failure_of, retry_after_of
from llm_service.domain.deployment import Deployment
from llm_service.domain.routing import FailureKind
from llm_service.domain.upstream_address import Reach, is_allowed
from llm_service.usecases.ports import UpstreamFailure

MOST_ERROR_BYTES = 64 * 1024
MOST_ANSWER_BYTES = 64 * 1024 * 1024
OWN_HEADERS = frozenset({
    "authorization", "host", "content-type", "content-length", "transfer-encoding", "accept", "accept-encoding",
    "connection", "expect", "api-key", "x-api-key", "upgrade", "te", "trailer",
})
PATH_SAFE = "/%:@!$&'()*+,;=~"
PORTS = {"http": 80, "https": 443}


class UpstreamHttp:
    """Posts JSON to model servers. Timeouts between reads are the caller's."""

    def __init__(self, reach: Reach) -> None:
        self._pool = HttpPool(lambda address: is_allowed(address, reach))

    async def close(self) -> None:
        await self._pool.close()

    @contextlib.asynccontextmanager
    async def post(
        self, deployment: Deployment, path: str, body: bytes, headers: dict[str, str], *, query: dict[str, str],
        on_sent: Callable[[], None],
    ) -> AsyncIterator[HttpAnswer]:
        """An answer with status 200. Raises UpstreamFailure for any other, and for whatever breaks on the way.

        Leaving it by an exception closes the connection, so that the server stops working for nobody.
        """
        origin, head = _begin_of_request(deployment.base_url, path, tuple(query.items()))
        request = _request(head, _own_headers(deployment.extra_headers) | headers, body)
        try:
            connection = await self._pool.connection(origin, timeout=deployment.timeouts.connect)
        except AddressRefused:
            raise _unavailable("its address may not be asked", FailureKind.MISCONFIGURED) from None
        except TimeoutError as error:
            # The caller's timeout arrives as a cancellation.
            raise _unavailable("the connect timeout passed") from error
        except OSError as error:
            raise _unavailable(type(error).__name__) from None
        try:
            connection.send(request)
            on_sent()
            answer = await connection.answer()
            failure = None if answer.status == 200 else await _failure_of(answer)
            if failure is None:
                yield answer
        except HttpBroken as error:
            connection.abort()
            raise _unavailable(str(error)) from None
        except BaseException:
            connection.abort()
            raise
        connection.release()
        if failure is not None:
            raise failure


@functools.lru_cache(maxsize=1024)
def _begin_of_request(base_url: str, path: str, query: tuple[tuple[str, str], ...]) -> tuple[Origin, str]:
    """Where a request goes, and its first lines."""
    parts = urlsplit(base_url.rstrip("/") + path)
    host = (parts.hostname or "").encode("idna").decode()
    path = quote(parts.path, safe=PATH_SAFE) or "/"
    target = f"{path}?{urlencode(query)}" if query else path
    port = parts.port or PORTS[parts.scheme]
    name = f"[{host}]" if ":" in host else host
    at = name if port == PORTS[parts.scheme] else f"{name}:{port}"
    head = f"POST {target} HTTP/1.1\r\nHost: {at}\r\nAccept-Encoding: identity\r\n"
    return Origin(parts.scheme == "https", host, port), head


@functools.lru_cache(maxsize=1024)
def _own_headers(extra: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Those that every request to a deployment carries; what its protocol says about them wins."""
    return {"user-agent": "creditmesh"} | {
        name.lower(): value for name, value in extra if name.lower() not in OWN_HEADERS
    }


def _request(head: str, headers: dict[str, str], body: bytes) -> bytes:
    """Raises UpstreamFailure for a header that would end its line."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if lines.count("\n") != len(headers) or lines.count("\r") != len(headers) or "\0" in lines:
        raise _unavailable("a header or the key has a line break", FailureKind.MISCONFIGURED)
    return f"{head}{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _unavailable(detail: str, kind: FailureKind = FailureKind.UNAVAILABLE) -> UpstreamFailure:
    return UpstreamFailure("UPSTREAM_UNAVAILABLE", detail, kind=kind)


async def read_json(answer: HttpAnswer) -> Any:
    """The whole answer. Raises UpstreamFailure when it is too long or no JSON, HttpBroken when it is cut."""
    data = await _read_at_most(answer, MOST_ANSWER_BYTES)
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        raise _unavailable("the answer is no JSON") from None


async def _read_at_most(answer: HttpAnswer, limit: int) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while piece := await answer.read():
        size += len(piece)
        if size > limit:
            raise UpstreamFailure("UPSTREAM_UNAVAILABLE", "the answer is too long", http_status=answer.status)
        pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


async def _failure_of(answer: HttpAnswer) -> UpstreamFailure:
    error: Any = None
    with contextlib.suppress(orjson.JSONDecodeError, UpstreamFailure, HttpBroken):
        document = orjson.loads(await _read_at_most(answer, MOST_ERROR_BYTES))
        if isinstance(document, list) and document:
            document = document[0]
        error = document.get("error", document) if isinstance(document, dict) else None
        if isinstance(error, str):
            error = {"message": error}
    return failure_of(error, http_status=answer.status, retry_after_seconds=retry_after_of(answer.headers))
