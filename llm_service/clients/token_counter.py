"""Token counts: exact for OpenAI's vocabularies, estimated for other families; see domain/token_family.py."""

from __future__ import annotations

import asyncio
import hashlib
import io
import wave

import imagesize

from llm_service.clients.tokenizer import counter_of
from llm_service.domain.chat import AudioPart, FilePart, ImagePart, Message, Part, Prompt, TextPart
from llm_service.domain.media_tokens import audio_tokens, image_tokens
from llm_service.domain.token_family import ESTIMATE, EXACT, O200K, TOKENS_PER_MESSAGE, UPPER
from llm_service.usecases.ports import TokenCount

TOKENS_PER_REPLY = 3
"""Chat framing of OpenAI models: three tokens and a role for each message, three to begin the reply."""
MP3_BYTES_PER_SECOND = 4_000
"""32 kbit/s, the lowest rate that speech is sent at: never too few seconds."""
BYTES_PER_FILE_TOKEN = 4
FRAMING_SLACK = 4
"""Servers frame a conversation with a few tokens more or fewer."""
SCHEMA_FACTOR = 1.25
SCHEMA_SLACK = 24
"""Tools and schemas are rewritten by the server before the model sees them."""
INLINE_CHARACTERS = 20_000
"""Longer prompts are counted in a thread: 20 000 characters take 0.4 ms."""
MOST_CACHED_PIECES = 50_000
LONGEST_CACHED_PIECE = 16
SHORTEST_CACHED_TEXT = 200
MOST_CACHED_TEXTS = 20_000
"""System prompts, schemas and histories come again with every call; about 3 MB."""


class BpeTokenCounter:
    """Counts; remembers the short pieces that streams are made of, and of long texts their digests, not the texts.
    cl100k is loaded when it is first needed."""

    def __init__(self) -> None:
        self._count_o200k = counter_of(EXACT[O200K])
        self._pieces: dict[str, int] = {}
        self._texts: dict[bytes, int] = {}

    def count_text(self, text: str, family: str = O200K) -> int:
        if family != O200K:
            return self._count(text, family)
        known = self._pieces.get(text)
        if known is not None:
            return known
        count = self._exact(text)
        if len(text) <= LONGEST_CACHED_PIECE and len(self._pieces) < MOST_CACHED_PIECES:
            self._pieces[text] = count
        return count

    async def count_prompt(self, prompt: Prompt, *, family: str = O200K, upstream_model: str = "") -> TokenCount:
        size = sum(
            len(part.text) for message in prompt.messages for part in message.parts if isinstance(part, TextPart)
        )
        if size <= INLINE_CHARACTERS:
            return self._count_prompt(prompt, family, upstream_model)
        return await asyncio.to_thread(self._count_prompt, prompt, family, upstream_model)

    async def count_inputs(self, inputs: tuple[str, ...], *, family: str = O200K) -> TokenCount:
        def count() -> TokenCount:
            total = upper = 0
            for text in inputs:
                tokens, most = self._both(text, family)
                total += tokens
                upper += most + 1  # the end mark that some servers count
            return TokenCount(total, upper)

        return count() if sum(map(len, inputs)) <= INLINE_CHARACTERS else await asyncio.to_thread(count)

    def count_message(self, message: Message, family: str = O200K) -> int:
        """What a model produced: text, reasoning and tool calls, no framing."""
        tokens = sum(self._both_of_part(part, family, "")[0] for part in message.parts)
        if message.reasoning:
            tokens += self._count(message.reasoning, family)
        for call in message.tool_calls:
            tokens += self._count(call.name, family) + self._count(call.arguments, family)
        return tokens

    def _exact(self, text: str) -> int:
        """In o200k."""
        if len(text) < SHORTEST_CACHED_TEXT:
            return self._count_o200k(text)
        digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
        count = self._texts.pop(digest, None)
        if count is None:
            count = self._count_o200k(text)
            if len(self._texts) >= MOST_CACHED_TEXTS:
                self._texts.pop(next(iter(self._texts)), None)  # the one that was not asked for longest
        self._texts[digest] = count
        return count

    def _count(self, text: str, family: str) -> int:
        if family == O200K:
            return self._exact(text)
        if family in EXACT:
            return counter_of(EXACT[family])(text)
        return ESTIMATE[family].of(self._exact(text), text)

    def _both(self, text: str, family: str) -> tuple[int, int]:
        """The estimate and the upper bound."""
        if family in EXACT:
            count = self.count_text(text) if family == O200K else self._count(text, family)
            return count, count
        if not text:
            return 0, 0
        exact = self._exact(text)
        return ESTIMATE[family].of(exact, text), UPPER[family].of(exact, text)

    def _count_prompt(self, prompt: Prompt, family: str, upstream_model: str) -> TokenCount:
        tokens = TOKENS_PER_REPLY
        upper = TOKENS_PER_REPLY + FRAMING_SLACK
        for message in prompt.messages:
            texts = [message.reasoning, message.name]
            for call in message.tool_calls:
                texts += [call.name, call.arguments]
            counts = [self._both_of_part(part, family, upstream_model) for part in message.parts]
            counts += [self._both(text, family) for text in texts if text]
            tokens += TOKENS_PER_MESSAGE + sum(count for count, _ in counts)
            upper += TOKENS_PER_MESSAGE + sum(most for _, most in counts)
        described = [word for tool in prompt.tools for word in (tool.name, tool.description, tool.parameters)]
        if prompt.json_schema is not None:
            described.append(prompt.json_schema.schema)
        if described:
            counts = [self._both(text, family) for text in described]
            tokens += sum(count for count, _ in counts)
            slack = SCHEMA_SLACK + 8 * len(prompt.tools)
            upper += int(sum(most for _, most in counts) * SCHEMA_FACTOR) + slack
        return TokenCount(tokens, upper)

    def _both_of_part(self, part: Part, family: str, upstream_model: str) -> tuple[int, int]:
        match part:
            case TextPart(text):
                return self._both(text, family)
            case ImagePart(_, data, _, detail):
                width, height = _size_of_image(data)
                count = image_tokens(width, height, family=family, upstream_model=upstream_model, detail=detail)
                return count, count
            case AudioPart(data, form):
                count = audio_tokens(_seconds_of_audio(data, form))
                return count, count
            case FilePart(data, _, _):
                count = 1 + len(data) // BYTES_PER_FILE_TOKEN
                return count, count


def _size_of_image(data: bytes) -> tuple[int, int]:
    """Pixels; 0 x 0 when it is an address, or no image that we know."""
    try:
        width, height = imagesize.get(io.BytesIO(data)) if data else (0, 0)
    except Exception:  # noqa: BLE001 - somebody else's bytes; the formula's most is taken then
        return 0, 0
    return (int(width), int(height)) if width > 0 and height > 0 else (0, 0)


def _seconds_of_audio(data: bytes, form: str) -> float:
    if form == "wav":
        try:
            with wave.open(io.BytesIO(data)) as sound:
                frames, rate = int(sound.getnframes()), int(sound.getframerate())
                return frames / max(1, rate)
        except (wave.Error, EOFError):
            pass
    return len(data) / MP3_BYTES_PER_SECOND
