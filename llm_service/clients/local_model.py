"""The built-in model: offline, deterministic, paced, with real token counts. It says what it is in its first words.

It also behaves badly when it is told to, by default_params, so that demos and drills need no other stand-in; see
Manners.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import math
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, fields
from typing import Any

from llm_service.clients.upstream_failures import failure_of
from llm_service.domain.chat import Delta, FinishReason, Prompt, Role, TextPart, ToolCallDelta
from llm_service.domain.deployment import Deployment
from llm_service.domain.local_memory import answer_of
from llm_service.domain.schema_instance import instance_of
from llm_service.usecases.ports import Question, TokenCounter, UpstreamChunk, UpstreamFailure
from metering.usage import Usage

OPENING = (
    "This is the built-in LOCAL model of creditmesh: it runs offline, needs no key and always gives the same answer to"
    " the same prompt. Register a model server to get a real one. You wrote: "
)
WORDS = (
    "credit", "token", "ledger", "hold", "charge", "stream", "price", "account", "balance", "entry", "model", "answer",
    "prompt", "batch", "queue", "relay", "event", "proof", "hash", "chain", "whole", "small", "exact", "plain", "calm",
)
FEWEST_WORDS = 16
MOST_WORDS = 48
MOST_ECHO = 200
NAME = "local"
EMBEDDING_DIMENSIONS = 256


def reply_to(prompt: Prompt) -> list[str]:
    """The whole reply in pieces of about a token each; the same for the same prompt."""
    said = [
        part.text for message in prompt.messages if message.role is Role.USER for part in message.parts
        if isinstance(part, TextPart)
    ]
    seed = hashlib.sha256(repr([(message.role, message.parts) for message in prompt.messages]).encode()).digest()
    last = " ".join((said[-1] if said else "nothing").split())[:MOST_ECHO]
    count = FEWEST_WORDS + seed[0] % (MOST_WORDS - FEWEST_WORDS + 1)
    filler = [WORDS[seed[index % 31 + 1] % len(WORDS)] for index in range(count)]
    return list(_pieces(f'{OPENING}"{last}". Some words for your stream: {" ".join(filler)}.'))


def _pieces(text: str) -> Iterator[str]:
    first, *rest = text.split(" ")
    yield first
    for word in rest:
        yield f" {word}"


@dataclass(frozen=True, slots=True)
class Manners:
    """How it behaves; the fields are the names in default_params. Counts are pieces of about a token.

    `replies` are answered instead of its own words: the first to a prompt without an assistant's message, and so on,
    the last for ever. `tool_calls` are `{"name", "arguments"}` (a JSON string), asked for until something answers them.
    """

    tokens_per_second: float | None = None
    first_token_ms: float = 0.0
    words: int = 0
    replies: tuple[str, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[Mapping[str, str], ...] = ()
    http_status: int = 0
    silent_after: int | None = None
    cut_after: int | None = None
    error_after: int | None = None
    no_usage: bool = False
    usage_factor: float = 1.0
    ignore_max_tokens: bool = False
    finish_reason: str = ""


_NAMES = frozenset(field.name for field in fields(Manners))
_KNOWN_FINISHES = {
    "stop": FinishReason.STOP, "length": FinishReason.LENGTH, "content_filter": FinishReason.CONTENT_FILTER,
}


def manners_of(params: Mapping[str, Any]) -> Manners:
    """Raises ValueError for what it does not know."""
    if unknown := sorted(set(params) - _NAMES):
        raise ValueError(f"the built-in model does not know {', '.join(unknown)}")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in params.items()
    }
    for name in ("words", "http_status", "silent_after", "cut_after", "error_after"):
        if values.get(name) is not None and not isinstance(values[name], int):
            raise ValueError(f"{name} must be a whole number")
    return Manners(**values)


class LocalModel:
    """Implements ModelProvider without a network. `tokens_per_second` 0 = as fast as it goes."""

    def __init__(self, tokens: TokenCounter, *, tokens_per_second: float) -> None:
        self._tokens = tokens
        self._tokens_per_second = tokens_per_second

    async def ask(
        self, deployment: Deployment, question: Question, *, on_sent: Callable[[], None]
    ) -> AsyncIterator[UpstreamChunk]:
        manners = manners_of(deployment.default_params)
        on_sent()
        if manners.first_token_ms:
            await asyncio.sleep(manners.first_token_ms / 1000)
        if manners.http_status:
            raise failure_of(None, http_status=manners.http_status)
        if question.inputs:
            yield await self._embed(question, manners)
            return
        chunks = self._answer(question, manners)
        if not question.whole:
            async with aclosing(chunks):
                async for chunk in chunks:
                    yield chunk
            return
        whole = UpstreamChunk(upstream_model=NAME)
        async for chunk in chunks:
            whole.deltas += chunk.deltas
            whole.pieces += chunk.pieces
            whole.finish_reason = chunk.finish_reason or whole.finish_reason
            whole.upstream_finish_reason = chunk.upstream_finish_reason or whole.upstream_finish_reason
            whole.is_unknown_finish |= chunk.is_unknown_finish
            whole.usage = chunk.usage
        yield whole

    async def _answer(self, question: Question, manners: Manners) -> AsyncGenerator[UpstreamChunk]:
        prompt = question.prompt
        speed = self._tokens_per_second if manners.tokens_per_second is None else manners.tokens_per_second
        pause = 1.0 / speed if speed else 0.0
        left = 10**9 if manners.ignore_max_tokens else question.max_output_tokens
        finish = FinishReason.STOP
        text = ""
        spoken = 0
        for delta in _deltas_of(prompt, manners):
            said = delta.text + delta.reasoning + (delta.tool_call.arguments if delta.tool_call else "")
            left -= self._tokens.count_text(said)
            if left < 0:
                finish = FinishReason.LENGTH
                break
            if any(stop in text + said for stop in prompt.stop):
                break
            await self._misbehave(manners, spoken)
            text += said
            spoken += 1
            await asyncio.sleep(pause)
            yield UpstreamChunk(deltas=[delta], pieces=1, upstream_model=NAME)
            if delta.tool_call is not None:
                finish = FinishReason.TOOL_CALLS
        await self._misbehave(manners, spoken, at_end=True)
        end = UpstreamChunk(finish_reason=finish, upstream_model=NAME)
        if manners.finish_reason and finish is FinishReason.STOP:
            end.finish_reason = _KNOWN_FINISHES.get(manners.finish_reason, FinishReason.STOP)
            end.upstream_finish_reason = manners.finish_reason
            end.is_unknown_finish = manners.finish_reason not in _KNOWN_FINISHES
        if not manners.no_usage:
            count = await self._tokens.count_prompt(prompt)
            output = math.ceil(self._tokens.count_text(text) * manners.usage_factor)
            end.usage = Usage(input_tokens=count.input_tokens, output_tokens=output)
        yield end

    async def _misbehave(self, manners: Manners, spoken: int, *, at_end: bool = False) -> None:
        def due(after: int | None) -> bool:
            return after is not None and (spoken >= after if at_end else spoken == after)

        if due(manners.silent_after):
            await asyncio.sleep(3600)
        if due(manners.error_after):
            raise failure_of({"code": "server_error"})
        if due(manners.cut_after):
            raise UpstreamFailure("UPSTREAM_UNAVAILABLE", "the stream ended without its end mark")

    async def _embed(self, question: Question, manners: Manners) -> UpstreamChunk:
        dimensions = question.dimensions or EMBEDDING_DIMENSIONS
        chunk = UpstreamChunk(finish_reason=FinishReason.STOP, upstream_model=NAME)
        chunk.vectors = tuple(vector_of(text, dimensions) for text in question.inputs)
        if not manners.no_usage:
            count = await self._tokens.count_inputs(question.inputs)
            chunk.usage = Usage(input_tokens=math.ceil(count.input_tokens * manners.usage_factor))
        return chunk


def _deltas_of(prompt: Prompt, manners: Manners) -> Iterator[Delta]:
    for piece in _pieces(manners.reasoning) if manners.reasoning else ():
        yield Delta(reasoning=piece)
    answered = any(message.role is Role.TOOL for message in prompt.messages)
    if manners.tool_calls and prompt.tools and not answered:
        for index, call in enumerate(manners.tool_calls):
            yield Delta(tool_call=ToolCallDelta(index, f"local-{index}", call["name"], ""))
            for piece in _pieces(call["arguments"]):
                yield Delta(tool_call=ToolCallDelta(index, arguments=piece))
        return
    for piece in _said(prompt, manners):
        yield Delta(text=piece)


def _said(prompt: Prompt, manners: Manners) -> list[str]:
    if manners.replies:
        turn = sum(message.role is Role.ASSISTANT for message in prompt.messages)
        return list(_pieces(manners.replies[min(turn, len(manners.replies) - 1)]))
    if manners.words:
        return [" word"] * manners.words
    if prompt.json_schema is not None:
        if (remembered := answer_of(prompt.json_schema.name, _last_words(prompt))) is not None:
            return list(_pieces(remembered))
        return list(_pieces(instance_of(prompt.json_schema.schema, "the built-in LOCAL model made this up")))
    if prompt.json_object:
        return list(_pieces('{"answer": "the built-in LOCAL model made this up"}'))
    return reply_to(prompt)


def _last_words(prompt: Prompt) -> str:
    return "".join(part.text for part in prompt.messages[-1].parts if isinstance(part, TextPart))


def vector_of(text: str, dimensions: int) -> tuple[float, ...]:
    """A bag of hashed words and pairs of words, of length 1: similar texts have near vectors."""
    words = re.findall(r"\w+", text.lower())
    sums = [0.0] * dimensions
    for feature in (*words, *map(" ".join, itertools.pairwise(words)), ""):
        digest = hashlib.blake2b(feature.encode(), digest_size=8).digest()
        sums[int.from_bytes(digest[:4], "big") % dimensions] += 1.0 if digest[4] & 1 else -1.0
    length = math.sqrt(sum(value * value for value in sums)) or 1.0
    return tuple(value / length for value in sums)
