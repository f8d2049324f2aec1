"""Model servers that speak OpenAI chat completions, streamed and whole."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import aiohttp
import orjson

from llm_service.clients.openai_chat_format import (
    MalformedAnswer,
    add_event,
    answer_from_json,
    failure_from_error,
    request_body,
)
from llm_service.domain.chat import Prompt
from llm_service.domain.deployment import Deployment
from llm_service.usecases.ports import UpstreamAnswer, UpstreamChunk, UpstreamFailure

MOST_ERROR_BYTES = 64 * 1024
MOST_EVENT_BYTES = 4 * 1024 * 1024
MOST_ANSWER_BYTES = 64 * 1024 * 1024
OWN_HEADERS = frozenset({"authorization", "host", "content-type", "content-length", "transfer-encoding", "accept"})


class OpenAiChat:
    """One connection pool for all such model servers. Timeouts between tokens are the caller's."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def stream(
        self, deployment: Deployment, prompt: Prompt, *, max_output_tokens: int, on_sent: Callable[[], None]
    ) -> AsyncIterator[UpstreamChunk]:
        body = request_body(deployment, prompt, max_output_tokens=max_output_tokens, stream=True)
        async with self._post(deployment, body, accept="text/event-stream", on_sent=on_sent) as response:
            events = _EventBuffer()
            finished = False
            async for data in response.content.iter_any():
                chunk = UpstreamChunk()
                done, failure = events.feed(data, chunk)
                finished = finished or chunk.finish_reason is not None
                if chunk.deltas or chunk.usage is not None or chunk.finish_reason is not None:
                    yield chunk
                if failure is not None:
                    raise failure
                if done:
                    break
            if not finished:
                raise UpstreamFailure("UPSTREAM_UNAVAILABLE", "the stream ended without a finish reason")

    async def generate(
        self, deployment: Deployment, prompt: Prompt, *, max_output_tokens: int, on_sent: Callable[[], None]
    ) -> UpstreamAnswer:
        body = request_body(deployment, prompt, max_output_tokens=max_output_tokens, stream=False)
        async with self._post(deployment, body, accept="application/json", on_sent=on_sent) as response:
            data = await _read_at_most(response, MOST_ANSWER_BYTES)
            try:
                return answer_from_json(orjson.loads(data))
            except (orjson.JSONDecodeError, MalformedAnswer) as error:
                raise UpstreamFailure("UPSTREAM_UNAVAILABLE", f"malformed answer: {type(error).__name__}") from None

    @contextlib.asynccontextmanager
    async def _post(
        self, deployment: Deployment, body: bytes, *, accept: str, on_sent: Callable[[], None]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer with status 200. Raises UpstreamFailure for any other, and for whatever breaks on the way."""
        headers = {name: value for name, value in deployment.extra_headers if name.lower() not in OWN_HEADERS}
        headers |= {"Content-Type": "application/json", "Accept": accept}
        if deployment.api_key:
            headers["Authorization"] = f"Bearer {deployment.api_key}"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=deployment.timeouts.connect)
        try:
            async with self._open_session().post(
                f"{deployment.base_url.rstrip('/')}/chat/completions", data=body, headers=headers, timeout=timeout,
                allow_redirects=False, trace_request_ctx=on_sent,
            ) as response:
                if response.status != 200:
                    raise await _failure_of(response)
                yield response
        except (aiohttp.ClientError, asyncio.IncompleteReadError, ConnectionError) as error:
            raise UpstreamFailure("UPSTREAM_UNAVAILABLE", type(error).__name__) from None
        except TimeoutError as error:
            # aiohttp's own connect timeout; the caller's timeout arrives as a cancellation.
            raise UpstreamFailure("UPSTREAM_UNAVAILABLE", "the connect timeout passed") from error

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            tracing = aiohttp.TraceConfig()
            tracing.on_request_headers_sent.append(_tell_sent)
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60, ttl_dns_cache=60)
            self._session = aiohttp.ClientSession(
                connector=connector, auto_decompress=True, trust_env=False, cookie_jar=aiohttp.DummyCookieJar(),
                read_bufsize=2**18, trace_configs=[tracing],
            )
        return self._session


async def _tell_sent(_session: aiohttp.ClientSession, context: SimpleNamespace, _params: Any) -> None:
    context.trace_request_ctx()


class _EventBuffer:
    """Server-sent events out of reads that cut them anywhere."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes, chunk: UpstreamChunk) -> tuple[bool, UpstreamFailure | None]:
        """Adds the complete events to `chunk`. Answers whether [DONE] came, and what is wrong with an event.

        What came before the bad event in the same read is in the chunk, so that it is delivered first.
        """
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > MOST_EVENT_BYTES:
            return False, UpstreamFailure("UPSTREAM_UNAVAILABLE", "an event is longer than 4 MiB")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                return True, None
            if payload:
                try:
                    add_event(chunk, orjson.loads(payload))
                except (orjson.JSONDecodeError, MalformedAnswer) as error:
                    return False, UpstreamFailure("UPSTREAM_UNAVAILABLE", f"malformed event: {type(error).__name__}")
                except UpstreamFailure as failure:
                    return False, failure
        return False, None


async def _read_at_most(response: aiohttp.ClientResponse, limit: int) -> bytes:
    pieces: list[bytes] = []
    size = 0
    async for piece in response.content.iter_any():
        size += len(piece)
        if size > limit:
            raise UpstreamFailure("UPSTREAM_UNAVAILABLE", "the answer is too long", http_status=response.status)
        pieces.append(piece)
    return b"".join(pieces)


async def _failure_of(response: aiohttp.ClientResponse) -> UpstreamFailure:
    error: Any = None
    with contextlib.suppress(orjson.JSONDecodeError, UpstreamFailure, aiohttp.ClientError):
        document = orjson.loads(await _read_at_most(response, MOST_ERROR_BYTES))
        error = document.get("error") if isinstance(document, dict) else None
    retry_after = response.headers.get("Retry-After", "")
    return failure_from_error(
        error, http_status=response.status, retry_after_seconds=float(retry_after) if retry_after.isdigit() else None
    )
