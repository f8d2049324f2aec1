"""Token counts by the o200k vocabulary, exact for models that use it and a good estimate for the others."""

from __future__ import annotations

import asyncio

import bpe_openai

from llm_service.domain.chat import AudioPart, FilePart, ImagePart, Message, Part, Prompt, TextPart

TOKENS_PER_MESSAGE = 4
TOKENS_PER_REPLY = 3
"""Chat framing of OpenAI models: three tokens and a role for each message, three to begin the reply."""
TOKENS_PER_IMAGE = 1105
"""A high-detail image of four tiles: 85 + 4 x 170, rounded up to six tiles."""
BYTES_PER_AUDIO_TOKEN = 800
BYTES_PER_FILE_TOKEN = 4
INLINE_CHARACTERS = 20_000
"""Longer prompts are counted in a thread: 20 000 characters take 0.4 ms."""
MOST_CACHED_PIECES = 50_000
LONGEST_CACHED_PIECE = 16


class BpeTokenCounter:
    """Counts with one encoding; remembers the short pieces that streams are made of."""

    def __init__(self) -> None:
        self._encode = bpe_openai.get_encoding("o200k_base").encode_ordinary
        self._pieces: dict[str, int] = {}

    def count_text(self, text: str) -> int:
        known = self._pieces.get(text)
        if known is not None:
            return known
        count = len(self._encode(text))
        if len(text) <= LONGEST_CACHED_PIECE and len(self._pieces) < MOST_CACHED_PIECES:
            self._pieces[text] = count
        return count

    async def count_prompt(self, prompt: Prompt) -> int:
        size = sum(
            len(part.text) for message in prompt.messages for part in message.parts if isinstance(part, TextPart)
        )
        if size <= INLINE_CHARACTERS:
            return self._count_prompt(prompt)
        return await asyncio.to_thread(self._count_prompt, prompt)

    def count_message(self, message: Message) -> int:
        """What a model produced: text, reasoning and tool calls, no framing."""
        tokens = sum(self._count_part(part) for part in message.parts)
        if message.reasoning:
            tokens += self.count_text(message.reasoning)
        for call in message.tool_calls:
            tokens += self.count_text(call.name) + self.count_text(call.arguments)
        return tokens

    def _count_prompt(self, prompt: Prompt) -> int:
        tokens = TOKENS_PER_REPLY
        for message in prompt.messages:
            tokens += TOKENS_PER_MESSAGE + self.count_message(message)
            if message.name:
                tokens += self.count_text(message.name)
        for tool in prompt.tools:
            tokens += self.count_text(tool.name) + self.count_text(tool.description) + self.count_text(tool.parameters)
        if prompt.json_schema is not None:
            tokens += self.count_text(prompt.json_schema.schema)
        return tokens

    def _count_part(self, part: Part) -> int:
        match part:
            case TextPart(text):
                return self.count_text(text)
            case ImagePart():
                return TOKENS_PER_IMAGE
            case AudioPart(data, _):
                return 1 + len(data) // BYTES_PER_AUDIO_TOKEN
            case FilePart(data, _, _):
                return 1 + len(data) // BYTES_PER_FILE_TOKEN
