"""Counts against real tokenizers: corpus, images, sound."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import wave
import zlib
from pathlib import Path

import pytest

from llm_service.clients.token_counter import BpeTokenCounter
from llm_service.domain.chat import (
    AudioPart,
    FilePart,
    ImagePart,
    JsonSchema,
    Message,
    Part,
    Prompt,
    Role,
    TextPart,
    Tool,
)
from llm_service.domain.media_tokens import image_tokens
from llm_service.domain.token_family import EXACT, FAMILIES, UPPER, family_of, tokenizer_name

TOKENS = BpeTokenCounter()
CORPUS = json.loads((Path(__file__).parent / "token_corpus.json").read_text())
"""Texts and what real tokenizers count: o200k_base and cl100k_base, DeepSeek V3's, Claude 2's, Qwen's, Mistral's Tekken."""
FRAMING = 3 + 4
"""What OpenAI's servers add to a conversation of one message."""


def prompt(*parts: Part, **fields: object) -> Prompt:
    return Prompt((Message(Role.USER, parts),), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["o200k", "cl100k", "deepseek", "claude", "qwen", "mistral"])
async def test_the_bound_of_a_hold_holds_and_is_not_wasteful(family: str) -> None:
    """An upper bound in at least 99.9 % of the corpus, and at most 1.5 times the truth on average."""
    below, ratios, estimates = 0, [], []
    for entry in CORPUS:
        truth = entry[family] + FRAMING
        count = await TOKENS.count_prompt(prompt(TextPart(entry["text"])), family=family)
        below += count.upper_bound < truth
        ratios.append(count.upper_bound / truth)
        estimates.append(abs(count.input_tokens - truth) / truth)
    assert len(CORPUS) >= 800
    assert below <= len(CORPUS) // 1000, f"{below} of {len(CORPUS)} are below the truth"
    assert sum(ratios) / len(ratios) <= 1.5
    assert sum(estimates) / len(estimates) <= (0.0 if family in EXACT else 0.08)


def test_the_corpus_has_all_kinds_of_text() -> None:
    kinds = {entry["kind"] for entry in CORPUS}
    assert kinds >= {"english", "chinese", "code", "json", "emoji"}


@pytest.mark.parametrize(("name", "family"), [
    ("gpt-4o-mini", "o200k"), ("gpt-5", "o200k"), ("o3-mini", "o200k"), ("openai/o4-mini", "o200k"), ("gpt-4.1", "o200k"),
    ("gpt-4-turbo", "cl100k"), ("gpt-3.5-turbo", "cl100k"), ("text-embedding-3-small", "cl100k"),
    ("claude-sonnet-4-5", "claude"), ("anthropic/claude-3-haiku", "claude"), ("deepseek-chat", "deepseek"),
    ("Qwen/Qwen3-8B", "qwen"), ("mistral-large-latest", "mistral"), ("meta-llama/Llama-3.3-70B", "llama"),
    ("gemini-2.5-pro", "gemini"), ("something-else", "o200k"),
])
def test_a_models_name_tells_its_tokenizer(name: str, family: str) -> None:
    assert family_of(name) == family
    assert family_of(name, "qwen") == "qwen"


def test_an_estimate_says_that_it_is_one() -> None:
    assert tokenizer_name("o200k") == "o200k_base"
    assert tokenizer_name("claude") == "claude (estimated)"
    assert set(UPPER) | set(EXACT) == set(FAMILIES)


async def test_a_conversation_is_framed_and_tools_are_counted() -> None:
    plain = await TOKENS.count_prompt(prompt(TextPart("hello world")))
    assert plain.input_tokens == 2 + FRAMING
    tool = Tool("look", "looks at things", json.dumps({"type": "object", "properties": {"at": {"type": "string"}}}), strict=False)
    with_tool = await TOKENS.count_prompt(prompt(TextPart("hello world"), tools=(tool,)))
    assert with_tool.input_tokens > plain.input_tokens + 10
    assert with_tool.upper_bound > with_tool.input_tokens * 1.2
    schema = JsonSchema("s", '{"type":"object"}', strict=True)
    assert (await TOKENS.count_prompt(prompt(TextPart("hello world"), json_schema=schema))).input_tokens > plain.input_tokens
    long_one = await TOKENS.count_prompt(prompt(TextPart("word " * 50_000)))
    assert 50_000 <= long_one.input_tokens <= 50_010 + FRAMING
    assert (await TOKENS.count_inputs(("hello world", "hello"))).input_tokens == 3
    assert TOKENS.count_text("") == 0


@pytest.mark.parametrize(("size", "family", "name", "detail", "tokens"), [
    ((1024, 1024), "o200k", "gpt-4o", "high", 765), ((2048, 4096), "o200k", "gpt-4o", "high", 1105),
    ((4096, 8192), "o200k", "gpt-4o", "low", 85), ((512, 512), "o200k", "gpt-4o", "", 255),
    ((1024, 1024), "o200k", "gpt-4o-mini", "", 2833 + 4 * 5667), ((0, 0), "o200k", "gpt-4o", "", 85 + 8 * 170),
    ((1024, 1024), "o200k", "gpt-5", "", 70 + 4 * 140), ((1024, 1024), "o200k", "o4-mini", "", 1762),
    ((0, 0), "o200k", "gpt-4.1-mini", "", 2489),
    ((1092, 1092), "claude", "claude-sonnet-4-5", "", 1590), ((200, 200), "claude", "claude-sonnet-4-5", "", 54),
    ((8000, 100), "claude", "claude-sonnet-4-5", "", 41), ((0, 0), "claude", "claude-sonnet-4-5", "", 1600),
])
def test_images_follow_the_published_formulas(
    size: tuple[int, int], family: str, name: str, detail: str, tokens: int
) -> None:
    """The examples of the providers' own pages are among them."""
    assert image_tokens(*size, family=family, upstream_model=name, detail=detail) == tokens


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")


async def test_sizes_are_read_from_the_bytes() -> None:
    async def tokens(part: Part) -> int:
        empty = await TOKENS.count_prompt(prompt())
        return (await TOKENS.count_prompt(prompt(part), upstream_model="gpt-4o")).input_tokens - empty.input_tokens

    assert await tokens(ImagePart("", png(512, 512), "image/png", "high")) == 255
    assert await tokens(ImagePart("", b"no image at all", "image/png", "high")) == 1445
    sound = io.BytesIO()
    with wave.open(sound, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(24_000)
        out.writeframes(bytes(2 * 24_000 * 3))
    assert await tokens(AudioPart(sound.getvalue(), "wav")) == 30
    assert await tokens(AudioPart(bytes(40_000), "mp3")) == 100
    assert await tokens(AudioPart(b"RIFF broken", "wav")) >= 1
    assert await tokens(FilePart(bytes(4000), "a.pdf", "application/pdf")) == 1001


def test_texts_of_any_length_and_broken_ones_are_counted() -> None:
    assert TOKENS.count_text("word " * 300_000) in range(300_000, 300_010), "what the library\'s own wrapper refuses"
    assert TOKENS.count_text("a\ud800b") == TOKENS.count_text("a\ufffdb"), "half of a surrogate pair"
    assert TOKENS.count_text("<|endoftext|>") > 1, "a mark is the text that it is"


def test_the_tokenizer_is_loaded_without_the_dictionaries_of_its_python_part() -> None:
    script = (
        "import sys; from llm_service.clients.token_counter import BpeTokenCounter;"
        "assert BpeTokenCounter().count_text('hello world') == 2; assert 'bpe_openai' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
