"""The built-in model: offline, deterministic, paced, with real token counts. It says what it is in its first words."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator

from llm_service.domain.chat import Delta, FinishReason, Message, Prompt, Role, TextPart
from llm_service.domain.deployment import Deployment
from llm_service.usecases.ports import TokenCounter, UpstreamAnswer, UpstreamChunk
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


class LocalModel:
    """A provider without a network. `tokens_per_second` 0 = as fast as it goes."""

    def __init__(self, tokens: TokenCounter, *, tokens_per_second: float) -> None:
        self._tokens = tokens
        self._pause = 1.0 / tokens_per_second if tokens_per_second else 0.0

    async def stream(
        self, deployment: Deployment, prompt: Prompt, *, max_output_tokens: int, on_sent: Callable[[], None]
    ) -> AsyncIterator[UpstreamChunk]:
        on_sent()
        input_tokens = await self._tokens.count_prompt(prompt)
        left = max_output_tokens
        text = ""
        finish = FinishReason.STOP
        for piece in reply_to(prompt):
            left -= self._tokens.count_text(piece)
            if left < 0:
                finish = FinishReason.LENGTH
                break
            if any(stop in text + piece for stop in prompt.stop):
                break
            text += piece
            await asyncio.sleep(self._pause)
            yield UpstreamChunk(deltas=[Delta(text=piece)], pieces=1, upstream_model=NAME)
        usage = Usage(input_tokens=input_tokens, output_tokens=min(self._tokens.count_text(text), max_output_tokens))
        yield UpstreamChunk(finish_reason=finish, usage=usage, upstream_model=NAME)

    async def generate(
        self, deployment: Deployment, prompt: Prompt, *, max_output_tokens: int, on_sent: Callable[[], None]
    ) -> UpstreamAnswer:
        text = ""
        finish, usage = FinishReason.STOP, None
        async for chunk in self.stream(deployment, prompt, max_output_tokens=max_output_tokens, on_sent=on_sent):
            text += "".join(delta.text for delta in chunk.deltas)
            finish, usage = chunk.finish_reason or finish, chunk.usage or usage
        message = Message(role=Role.ASSISTANT, parts=(TextPart(text),))
        return UpstreamAnswer(message, finish, usage, NAME)
