"""Model servers over HTTP, whatever their protocol: streamed and whole answers, embeddings."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

import orjson

from llm_service.clients.sse import EventTooLong, SseParser
from llm_service.clients.upstream_http import UpstreamHttp, read_json
from llm_service.clients.wire_format import END_MARK, Decoder, Malformed, WireFormat
from llm_service.domain.deployment import Deployment
from llm_service.usecases.ports import Question, UpstreamChunk, UpstreamFailure
from servicekit.telemetry.logs import EventLogger

log = EventLogger(__name__)

MOST_INPUTS = 128
"""Texts in one embeddings request."""


class HttpModel:
    """Implements ModelProvider for one protocol."""

    def __init__(self, http: UpstreamHttp, format_: WireFormat) -> None:
        self._http = http
        self._format = format_

    def ask(
        self, deployment: Deployment, question: Question, *, on_sent: Callable[[], None]
    ) -> AsyncIterator[UpstreamChunk]:
        parts = _batches(question)
        if len(parts) == 1:
            return self._ask(deployment, question, on_sent)
        return self._ask_all(deployment, parts, on_sent)

    async def _ask_all(
        self, deployment: Deployment, parts: Sequence[Question], on_sent: Callable[[], None]
    ) -> AsyncIterator[UpstreamChunk]:
        for part in parts:
            async with aclosing(self._ask(deployment, part, on_sent)) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def _ask(
        self, deployment: Deployment, question: Question, on_sent: Callable[[], None]
    ) -> AsyncGenerator[UpstreamChunk]:
        posted = self._format.posted(deployment, question)
        streamed = not question.whole
        headers = {
            "Content-Type": "application/json",
            "Accept": "text/event-stream" if streamed else "application/json", **posted.headers,
        }
        async with self._http.post(
            deployment, posted.path, orjson.dumps(posted.body), headers, query=posted.query, on_sent=on_sent
        ) as answer:
            if streamed and answer.content_type != "application/json":
                decoder = self._format.decoder(question)
                events = _Events(decoder, deployment)
                while data := await answer.read():
                    chunk, failure = events.read(data)
                    if chunk:
                        yield chunk
                    if failure is not None:
                        raise failure
                    if events.is_over:
                        return
                chunk, failure = events.finish()
                if chunk:
                    yield chunk
                if failure is not None:
                    raise failure
                return
            # Asked for whole, or by a server that does not stream.
            chunk = UpstreamChunk()
            try:
                self._format.read_answer(chunk, await read_json(answer), question)
            except Malformed as error:
                raise UpstreamFailure("UPSTREAM_UNAVAILABLE", f"malformed answer: {error}") from None
            yield chunk


def _batches(question: Question) -> list[Question]:
    """Inputs to embed in as many requests as servers take them in; anything else is one."""
    inputs = question.inputs
    if len(inputs) <= MOST_INPUTS:
        return [question]
    return [
        replace(question, inputs=inputs[begin:begin + MOST_INPUTS]) for begin in range(0, len(inputs), MOST_INPUTS)
    ]


class _Events:
    """One stream's events as chunks. `is_over`: the end mark came, nothing more is to be read."""

    def __init__(self, decoder: Decoder, deployment: Deployment) -> None:
        self._parser = SseParser()
        self._decoder = decoder
        self._model_id = deployment.model_id
        self.is_over = False

    def read(self, data: bytes) -> tuple[UpstreamChunk, UpstreamFailure | None]:
        """A chunk, and what is wrong with the stream; what came before that is in the chunk."""
        chunk = UpstreamChunk()
        try:
            payloads = self._parser.feed(data)
        except EventTooLong:
            return chunk, UpstreamFailure("UPSTREAM_UNAVAILABLE", "an event is longer than 4 MiB")
        return chunk, self._add(chunk, payloads)

    def finish(self) -> tuple[UpstreamChunk, UpstreamFailure | None]:
        chunk = UpstreamChunk()
        failure = self._add(chunk, self._parser.finish())
        if failure is None and not self._decoder.is_finished:
            failure = UpstreamFailure("UPSTREAM_UNAVAILABLE", "the stream ended without its end mark")
        return chunk, failure

    def _add(self, chunk: UpstreamChunk, payloads: Sequence[bytes]) -> UpstreamFailure | None:
        for payload in payloads:
            if payload == END_MARK:
                self.is_over = self._decoder.is_finished = True
                return None
            try:
                self._decoder.add(chunk, orjson.loads(payload))
            except UpstreamFailure as failure:
                return failure
            except (orjson.JSONDecodeError, Malformed) as error:
                # One bad event spoils no answer; that the stream still ends as it should is checked at its end.
                chunk.malformed += 1
                log.warning("malformed_event", model_id=self._model_id, kind=type(error).__name__, size=len(payload))
        return None
