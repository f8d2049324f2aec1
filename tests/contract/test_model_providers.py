"""One suite over all adapters of model servers: what they send is read alike, whatever protocol it comes in."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_service.clients.anthropic_format import AnthropicFormat
from llm_service.clients.http_model import HttpModel, _Events
from llm_service.clients.local_model import LocalModel
from llm_service.clients.openai_chat_format import OpenAiChatFormat
from llm_service.clients.openai_responses_format import OpenAiResponsesFormat
from llm_service.clients.sse import MOST_EVENT_BYTES, EventTooLong, SseParser
from llm_service.clients.token_counter import BpeTokenCounter
from llm_service.clients.upstream_http import UpstreamHttp
from llm_service.clients.wire_format import WireFormat
from llm_service.domain.chat import (
    Answer,
    AudioPart,
    FilePart,
    FinishReason,
    ImagePart,
    JsonSchema,
    Message,
    Prompt,
    ReasoningEffort,
    Role,
    TextPart,
    Tool,
    ToolCall,
    ToolChoiceMode,
)
from llm_service.domain.deployment import BUILT_IN, Capabilities, Deployment, Provider
from llm_service.domain.quirks import Quirks, UsageArrival, effective
from llm_service.domain.routing import FailureKind
from llm_service.domain.upstream_address import Reach
from llm_service.domain.usage_merge import merge_usage
from llm_service.usecases.ports import Question, UpstreamChunk, UpstreamFailure
from metering.usage import Usage

SHAPES = Path(__file__).parent / "wire_shapes"
FORMATS: dict[str, WireFormat] = {
    "chat": OpenAiChatFormat(), "responses": OpenAiResponsesFormat(), "anthropic": AnthropicFormat(),
}
PROVIDERS = {
    "chat": Provider.OPENAI_CHAT, "responses": Provider.OPENAI_RESPONSES, "anthropic": Provider.ANTHROPIC,
}
HELLO = Prompt((Message(Role.USER, (TextPart("hello"),)),))
HELLO_STREAMED = Question(HELLO, 100, whole=False)
TWO_TOOLS = (("get_weather", '{"city":"Zürich"}'), ("get_time", "{}"))
GREETING = "Grüße, 世界 👋🏽"
CHAT_USAGE = Usage(19, 4, output_tokens=10, reasoning_tokens=3)
RESPONSES_USAGE = Usage(75, 64, output_tokens=20, reasoning_tokens=12)


def claude_usage(output: int) -> Usage:
    """Its input leaves the cache out; ours has it in."""
    return Usage(135, 100, 10, output)


@dataclass
class Told:
    """What an answer came to."""

    text: str = ""
    reasoning: str = ""
    tools: tuple[tuple[str, str], ...] = ()
    finish: FinishReason | None = None
    unknown: bool = False
    usage: Usage | None = None
    failure: FailureKind | None = None
    malformed: int = 0
    signature: str = ""
    model: str = field(default="", compare=False)
    ids: tuple[str, ...] = field(default=(), compare=False)


SHAPES_TOLD = {
    "chat_text": Told(GREETING, finish=FinishReason.STOP, usage=CHAT_USAGE),
    "chat_text_crlf": Told(GREETING, finish=FinishReason.STOP, usage=CHAT_USAGE),
    "chat_tools": Told(tools=TWO_TOOLS, finish=FinishReason.TOOL_CALLS, usage=CHAT_USAGE),
    "chat_deepseek": Told("42", "Let me think.", finish=FinishReason.STOP, usage=Usage(12, 8, output_tokens=9, reasoning_tokens=7)),
    "chat_vllm": Told("Yes.", "Hm.", finish=FinishReason.STOP, usage=Usage(11, output_tokens=4)),
    "chat_ollama": Told(tools=(("look", '{"at":"sky"}'),), finish=FinishReason.TOOL_CALLS, usage=Usage(30, output_tokens=12)),
    "chat_openrouter": Told("Hello", finish=FinishReason.STOP, usage=Usage(8, output_tokens=2)),
    "chat_openrouter_error": Told("Hel", failure=FailureKind.UNAVAILABLE),
    "chat_azure": Told("No", finish=FinishReason.CONTENT_FILTER, usage=CHAT_USAGE),
    "chat_refusal": Told("I can not do that.", finish=FinishReason.STOP, usage=CHAT_USAGE),
    "chat_logprobs": Told("a", finish=FinishReason.LENGTH),
    "chat_unknown_finish": Told("ok", finish=FinishReason.STOP, unknown=True, usage=CHAT_USAGE),
    "chat_malformed": Told("one two", finish=FinishReason.STOP, usage=CHAT_USAGE, malformed=2),
    "chat_cut": Told("one two", failure=FailureKind.UNAVAILABLE),
    "chat_no_usage": Told("one two", finish=FinishReason.STOP),
    "chat_no_done": Told("all", finish=FinishReason.STOP, usage=CHAT_USAGE),
    "chat_no_last_line_end": Told("all", finish=FinishReason.STOP, usage=CHAT_USAGE),
    "chat_multiline_data": Told("all right", finish=FinishReason.STOP),
    "responses_text": Told("Grüße, 世界", "Thinking.", finish=FinishReason.STOP, usage=RESPONSES_USAGE, signature='{"id":"rs_1","content":"gAAAA=="}'),
    "responses_tools": Told(tools=TWO_TOOLS, finish=FinishReason.TOOL_CALLS, usage=RESPONSES_USAGE),
    "responses_incomplete": Told("cut", finish=FinishReason.LENGTH, usage=RESPONSES_USAGE),
    "responses_filtered": Told("cut", finish=FinishReason.CONTENT_FILTER, usage=RESPONSES_USAGE),
    "responses_unknown_finish": Told("cut", finish=FinishReason.STOP, unknown=True, usage=RESPONSES_USAGE),
    "responses_failed": Told("part", failure=FailureKind.UNAVAILABLE, usage=RESPONSES_USAGE),
    "responses_error": Told(failure=FailureKind.LIMITED),
    "responses_cut": Told("part", failure=FailureKind.UNAVAILABLE),
    "responses_malformed": Told("one two", finish=FinishReason.STOP, usage=RESPONSES_USAGE, malformed=2),
    "anthropic_text": Told(GREETING, finish=FinishReason.STOP, usage=claude_usage(15)),
    "anthropic_tools": Told("Let me look.", tools=TWO_TOOLS, finish=FinishReason.TOOL_CALLS, usage=claude_usage(40)),
    "anthropic_thinking": Told("42", "Let me think.", finish=FinishReason.STOP, usage=claude_usage(30), signature="EqQBCg=="),
    "anthropic_length": Told("cut", finish=FinishReason.LENGTH, usage=claude_usage(15)),
    "anthropic_refusal": Told("no", finish=FinishReason.CONTENT_FILTER, usage=claude_usage(15)),
    "anthropic_unknown_finish": Told("hm", finish=FinishReason.STOP, unknown=True, usage=claude_usage(15)),
    "anthropic_overloaded": Told("part", failure=FailureKind.UNAVAILABLE, usage=claude_usage(1)),
    "anthropic_cut": Told("part", failure=FailureKind.UNAVAILABLE, usage=claude_usage(1)),
    "anthropic_malformed": Told("one two", finish=FinishReason.STOP, usage=claude_usage(15), malformed=2),
}
WHOLE_TOLD = {
    "chat_whole": Told("", "Hm.", TWO_TOOLS, FinishReason.TOOL_CALLS, usage=CHAT_USAGE),
    "responses_whole": Told(
        "Grüße, 世界", "Thinking.", (TWO_TOOLS[0],), FinishReason.TOOL_CALLS, usage=RESPONSES_USAGE,
        signature='{"id":"rs_1","content":"gAAAA=="}',
    ),
    "anthropic_whole": Told(
        "Let me look.", "Hm.", (TWO_TOOLS[0],), FinishReason.TOOL_CALLS, usage=claude_usage(40), signature="EqQB"
    ),
}


def protocol_of(shape: str) -> str:
    return shape.partition("_")[0]


def deployment_for(shape: str, base_url: str = "http://127.0.0.1:1/v1", **fields: Any) -> Deployment:
    return replace(
        BUILT_IN, model_id="m", provider=PROVIDERS[protocol_of(shape)], base_url=base_url, api_key="sk-1",
        upstream_model="model-1", **fields,
    )


def told_by(chunks: list[UpstreamChunk], failure: UpstreamFailure | None, arrival: UsageArrival = UsageArrival.FINAL) -> Told:
    told = Told(failure=failure.kind if failure else None)
    answer = Answer()
    for chunk in chunks:
        for delta in chunk.deltas:
            answer.add(delta)
        for usage in chunk.usages:
            told.usage = merge_usage(arrival, told.usage, usage)
        told.finish = chunk.finish_reason or told.finish
        told.unknown |= chunk.is_unknown_finish
        told.malformed += chunk.malformed
        told.model = chunk.upstream_model or told.model
    message = answer.message()
    told.text = "".join(part.text for part in message.parts if isinstance(part, TextPart))
    told.reasoning, told.signature = message.reasoning, message.reasoning_signature
    told.tools = tuple((call.name, call.arguments) for call in message.tool_calls)
    told.ids = tuple(call.id for call in message.tool_calls)
    return told


def read(shape: str, pieces: list[bytes]) -> Told:
    """Reads a stream that comes in these pieces."""
    events = _Events(FORMATS[protocol_of(shape)].decoder(HELLO_STREAMED), deployment_for(shape))
    chunks: list[UpstreamChunk] = []
    failure = None
    for piece in pieces:
        chunk, failure = events.read(piece)
        chunks.append(chunk)
        if failure is not None or events.is_over:
            return told_by(chunks, failure)
    chunk, failure = events.finish()
    return told_by([*chunks, chunk], failure)


class WireServer:
    """Answers with bytes that it is given, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.body = b""
        self.status = 200
        self.headers = {"Content-Type": "text/event-stream"}
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self.server = TestServer(app)

    async def _answer(self, request: web.Request) -> web.Response:
        self.asked.append((request.path_qs, dict(request.headers), await request.json()))
        return web.Response(body=self.body, status=self.status, headers=self.headers)

    @property
    def base_url(self) -> str:
        return str(self.server.make_url("/v1"))


@pytest.fixture
async def wire() -> AsyncIterator[WireServer]:
    server = WireServer()
    await server.server.start_server()
    yield server
    await server.server.close()


@pytest.fixture
async def http() -> AsyncIterator[UpstreamHttp]:
    made = UpstreamHttp(Reach.LOOPBACK)
    yield made
    await made.close()


async def ask(http: UpstreamHttp, shape: str, deployment: Deployment, question: Question) -> Told:
    model = HttpModel(http, FORMATS[protocol_of(shape)])
    sent: list[bool] = []
    chunks: list[UpstreamChunk] = []
    failure = None
    try:
        async for chunk in model.ask(deployment, question, on_sent=lambda: sent.append(True)):
            chunks.append(chunk)  # noqa: PERF401 - those before a failure count
    except UpstreamFailure as error:
        failure = error
    assert sent == [True]
    told = told_by(chunks, failure, effective(deployment.quirks).arrival)
    told.malformed = sum(chunk.malformed for chunk in chunks)
    return told


def test_every_shape_is_told_of() -> None:
    files = {path.stem for path in SHAPES.iterdir() if path.suffix in (".sse", ".json")}
    assert files == {*SHAPES_TOLD, *WHOLE_TOLD, "embeddings"}


@pytest.mark.parametrize("shape", SHAPES_TOLD)
def test_a_stream_is_read(shape: str) -> None:
    assert read(shape, [(SHAPES / f"{shape}.sse").read_bytes()]) == SHAPES_TOLD[shape]


@pytest.mark.parametrize("shape", SHAPES_TOLD)
def test_a_stream_cut_anywhere_is_read_the_same(shape: str) -> None:
    """Every position of every shape: inside a character, a line end, a number."""
    data = (SHAPES / f"{shape}.sse").read_bytes()
    for position in range(len(data) + 1):
        assert read(shape, [data[:position], data[position:]]) == SHAPES_TOLD[shape], position
    assert read(shape, [data[index:index + 1] for index in range(len(data))]) == SHAPES_TOLD[shape]


@settings(max_examples=200, deadline=None)
@given(shape=st.sampled_from(sorted(SHAPES_TOLD)), cuts=st.lists(st.integers(0, 4000), max_size=12))
def test_a_stream_in_any_pieces_is_read_the_same(shape: str, cuts: list[int]) -> None:
    data = (SHAPES / f"{shape}.sse").read_bytes()
    ends = sorted({0, *(cut % (len(data) + 1) for cut in cuts), len(data)})
    assert read(shape, [data[begin:end] for begin, end in itertools.pairwise(ends)]) == SHAPES_TOLD[shape]


@pytest.mark.parametrize("shape", SHAPES_TOLD)
async def test_a_stream_comes_over_a_socket(shape: str, wire: WireServer, http: UpstreamHttp) -> None:
    wire.body = (SHAPES / f"{shape}.sse").read_bytes()
    arrival = "cumulative" if shape == "chat_vllm" else ""
    deployment = deployment_for(shape, wire.base_url, quirks=Quirks(usage_arrival=arrival))
    assert await ask(http, shape, deployment, HELLO_STREAMED) == SHAPES_TOLD[shape]


@pytest.mark.parametrize("shape", WHOLE_TOLD)
@pytest.mark.parametrize("whole", [True, False])
async def test_a_whole_answer_is_read_also_from_a_server_that_does_not_stream(
    shape: str, whole: bool, wire: WireServer, http: UpstreamHttp
) -> None:
    wire.body = (SHAPES / f"{shape}.json").read_bytes()
    wire.headers = {"Content-Type": "application/json"}
    question = Question(HELLO, 100, whole=whole)
    told = await ask(http, shape, deployment_for(shape, wire.base_url), question)
    assert told == WHOLE_TOLD[shape]
    assert told.ids
    assert told.model


@pytest.mark.parametrize("protocol", FORMATS)
@pytest.mark.parametrize(("status", "error", "kind", "reason"), [
    (500, {}, FailureKind.UNAVAILABLE, "UPSTREAM_UNAVAILABLE"),
    (529, {"type": "overloaded_error"}, FailureKind.UNAVAILABLE, "UPSTREAM_UNAVAILABLE"),
    (429, {"code": "rate_limit_exceeded"}, FailureKind.LIMITED, "UPSTREAM_UNAVAILABLE"),
    (429, {"code": "insufficient_quota"}, FailureKind.MISCONFIGURED, "UPSTREAM_UNAVAILABLE"),
    (401, {"type": "authentication_error"}, FailureKind.MISCONFIGURED, "UPSTREAM_UNAVAILABLE"),
    (404, {}, FailureKind.MISCONFIGURED, "UPSTREAM_UNAVAILABLE"),
    (302, {}, FailureKind.MISCONFIGURED, "UPSTREAM_UNAVAILABLE"),
    (400, {"type": "invalid_request_error", "message": "your secret is bad"}, FailureKind.REJECTED, "UPSTREAM_REJECTED"),
    (400, {"code": "context_length_exceeded"}, FailureKind.TOO_LONG, "CONTEXT_TOO_LONG"),
    (400, {"type": "invalid_request_error", "message": "prompt is too long: 210000 tokens"}, FailureKind.TOO_LONG, "CONTEXT_TOO_LONG"),
])
async def test_errors_mean_the_same_in_every_protocol(
    protocol: str, status: int, error: dict[str, str], kind: FailureKind, reason: str, wire: WireServer,
    http: UpstreamHttp,
) -> None:
    wire.body = json.dumps({"type": "error", "error": error}).encode()
    wire.status = status
    wire.headers = {"Content-Type": "application/json", "Location": "http://127.0.0.1:1/", "Retry-After": "7"}
    model = HttpModel(http, FORMATS[protocol])
    with pytest.raises(UpstreamFailure) as caught:
        async for _ in model.ask(deployment_for(protocol, wire.base_url), HELLO_STREAMED, on_sent=lambda: None):
            pass
    failure = caught.value
    assert (failure.kind, failure.reason, failure.http_status) == (kind, reason, status)
    assert failure.retry_after_seconds == 7
    assert "secret" not in failure.detail
    assert len(wire.asked) == 1, "redirects are not followed"


@pytest.mark.parametrize(("headers", "seconds"), [
    ({"retry-after": "1.5"}, 1.5), ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
    ({"retry-after": "Sat, 21 Nov 2026 10:00:30 GMT", "date": "Sat, 21 Nov 2026 10:00:00 GMT"}, 30.0),
    ({"retry-after": "soon"}, None), ({"retry-after": "99999999"}, 3600.0), ({}, None),
])
def test_retry_after_in_every_form(headers: dict[str, str], seconds: float | None) -> None:
    from llm_service.clients.upstream_failures import retry_after_of

    assert retry_after_of(headers) == seconds


@pytest.mark.parametrize("protocol", FORMATS)
async def test_a_line_of_ten_megabytes_is_refused_and_not_buffered(
    protocol: str, wire: WireServer, http: UpstreamHttp
) -> None:
    wire.body = b"data: " + b"x" * 10_000_000
    told = await ask(http, protocol, deployment_for(protocol, wire.base_url), HELLO_STREAMED)
    assert told.failure is FailureKind.UNAVAILABLE
    parser = SseParser()
    with pytest.raises(EventTooLong):
        for _ in range(200):
            parser.feed(b"x" * 65_536)
    assert len(parser._rest) <= MOST_EVENT_BYTES


TOOL = Tool("look", "looks", '{"type":"object","properties":{"at":{"type":"string"}}}', strict=True)
RICH = Prompt(
    messages=(
        Message(Role.SYSTEM, (TextPart("be brief"),)),
        Message(Role.USER, (
            TextPart("what is this?"), ImagePart("https://example.org/a.png", b"", "", "high"),
            ImagePart("", b"\x89PNG", "image/png", ""), FilePart(b"%PDF", "a.pdf", "application/pdf"),
        )),
        Message(Role.ASSISTANT, (), tool_calls=(ToolCall("t1", "look", '{"at":"sky"}'),), reasoning="hm"),
        Message(Role.TOOL, (TextPart("blue"),), tool_call_id="t1"),
        Message(Role.DEVELOPER, (TextPart("in French"),)),
    ),
    temperature=0.0, top_p=0.5, stop=("END",), seed=7, tools=(TOOL,), tool_choice=ToolChoiceMode.REQUIRED,
    json_schema=JsonSchema("s", '{"type":"object"}', strict=True), reasoning_effort=ReasoningEffort.LOW,
    parallel_tool_calls=False, metadata={"a": "b"},
)


async def asked_of(
    http: UpstreamHttp, wire: WireServer, protocol: str, prompt: Prompt, *, most: int = 4096, **fields: Any
) -> tuple[str, dict[str, str], dict[str, Any]]:
    await ask(http, protocol, deployment_for(protocol, wire.base_url, **fields), Question(prompt, most, whole=False))
    return wire.asked[-1]


async def test_a_rich_prompt_as_chat_completions(wire: WireServer, http: UpstreamHttp) -> None:
    path, headers, body = await asked_of(http, wire, "chat", RICH)
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer sk-1"
    system, user, assistant, tool, developer = body["messages"]
    assert system == {"role": "system", "content": "be brief"}
    assert user["content"][1] == {"type": "image_url", "image_url": {"url": "https://example.org/a.png", "detail": "high"}}
    assert user["content"][2]["image_url"]["url"] == "data:image/png;base64,iVBORw=="
    assert user["content"][3]["file"]["filename"] == "a.pdf"
    assert assistant["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"at":"sky"}'}
    assert tool == {"role": "tool", "content": "blue", "tool_call_id": "t1"}
    assert developer["role"] == "developer"
    assert (body["temperature"], body["seed"], body["stop"], body["max_tokens"]) == (0.0, 7, ["END"], 4096)
    assert body["tool_choice"] == "required"
    assert body["parallel_tool_calls"] is False
    assert body["response_format"]["json_schema"] == {"name": "s", "schema": {"type": "object"}, "strict": True}
    assert body["stream_options"] == {"include_usage": True}


async def test_a_rich_prompt_as_responses(wire: WireServer, http: UpstreamHttp) -> None:
    path, _, body = await asked_of(http, wire, "responses", RICH)
    assert path == "/v1/responses"
    assert [item.get("role") or item["type"] for item in body["input"]] == [
        "system", "user", "function_call", "function_call_output", "developer"
    ]
    assert [part["type"] for part in body["input"][1]["content"]] == ["input_text", "input_image", "input_image", "input_file"]
    assert body["input"][3] == {"type": "function_call_output", "call_id": "t1", "output": "blue"}
    assert (body["temperature"], body["max_output_tokens"], body["store"]) == (0.0, 4096, False)
    assert body["text"]["format"]["type"] == "json_schema"
    assert body["reasoning"] == {"summary": "auto", "effort": "low"}
    assert body["tools"][0]["name"] == "look"


async def test_a_rich_prompt_as_messages(wire: WireServer, http: UpstreamHttp) -> None:
    path, headers, body = await asked_of(http, wire, "anthropic", RICH)
    assert path == "/v1/messages"
    assert (headers["x-api-key"], headers["anthropic-version"]) == ("sk-1", "2023-06-01")
    assert "be brief" in body["system"]
    assert "in French" in body["system"]
    assert '{"type":"object"}' in body["system"], "a schema is asked for in words"
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
    assert [block["type"] for block in body["messages"][0]["content"]] == ["text", "image", "image", "document"]
    assert body["messages"][1]["content"] == [{"type": "tool_use", "id": "t1", "name": "look", "input": {"at": "sky"}}]
    assert body["messages"][2]["content"][0]["tool_use_id"] == "t1"
    assert body["tool_choice"] == {"type": "any", "disable_parallel_tool_use": True}
    assert body["thinking"] == {"type": "enabled", "budget_tokens": 2048}
    assert "temperature" not in body, "it goes with thinking's default only"
    assert body["stop_sequences"] == ["END"]
    _, _, plain = await asked_of(http, wire, "anthropic", replace(RICH, reasoning_effort=None))
    assert (plain["temperature"], "thinking" in plain) == (0.0, False)


async def test_reasoning_goes_back_with_its_signature(wire: WireServer, http: UpstreamHttp) -> None:
    def again(signature: str) -> Prompt:
        return Prompt((
            Message(Role.USER, (TextPart("a"),)),
            Message(Role.ASSISTANT, (TextPart("b"),), reasoning="hm", reasoning_signature=signature),
            Message(Role.USER, (TextPart("c"),)),
        ))

    _, _, claude = await asked_of(http, wire, "anthropic", again("EqQB"))
    assert claude["messages"][1]["content"][0] == {"type": "thinking", "thinking": "hm", "signature": "EqQB"}
    signature = '{"id":"rs_1","content":"gAAA"}'
    _, _, responses = await asked_of(http, wire, "responses", again(signature))
    assert responses["input"][1] == {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAA"}
    _, _, foreign = await asked_of(http, wire, "anthropic", again(signature))
    assert [block["type"] for block in foreign["messages"][1]["content"]] == ["text"]


@pytest.mark.parametrize(("server", "path", "expected", "absent"), [
    ("", "/v1/chat/completions", {"max_tokens": 4096, "thinking": {"type": "enabled"}, "metadata": {"a": "b"}}, ()),
    ("openai", "/v1/chat/completions", {"max_completion_tokens": 4096}, ("max_tokens", "thinking", "metadata")),
    ("azure", "/v1/openai/deployments/model-1/chat/completions?api-version=2024-10-21", {"max_completion_tokens": 4096}, ("max_tokens",)),
    ("deepseek", "/v1/chat/completions", {"max_tokens": 4096}, ("seed", "parallel_tool_calls")),
    ("vllm", "/v1/chat/completions", {"chat_template_kwargs": {"enable_thinking": True}}, ("thinking",)),
    ("ollama", "/v1/chat/completions", {"max_tokens": 4096}, ("thinking", "parallel_tool_calls")),
    ("openrouter", "/v1/chat/completions", {"reasoning": {"enabled": True}}, ("thinking",)),
])
async def test_quirks_of_servers_are_settings(
    server: str, path: str, expected: dict[str, Any], absent: tuple[str, ...], wire: WireServer, http: UpstreamHttp
) -> None:
    prompt = replace(RICH, thinking=True)
    asked, headers, body = await asked_of(http, wire, "chat", prompt, quirks=Quirks(server=server))
    assert asked == path
    assert expected.items() <= body.items()
    assert not set(absent) & set(body)
    assert ("api-key" in headers) == (server == "azure")
    developer = "system" if server in ("deepseek", "vllm", "ollama") else "developer"
    assert body["messages"][-1]["role"] == developer
    earlier = {"deepseek": "reasoning_content", "openrouter": "reasoning"}.get(server)
    assert {"reasoning_content", "reasoning"} & set(body["messages"][2]) == ({earlier} if earlier else set())


async def test_own_quirks_and_defaults_win_over_the_preset(wire: WireServer, http: UpstreamHttp) -> None:
    _, _, body = await asked_of(
        http, wire, "chat", RICH, quirks=Quirks(server="openai", max_tokens_field="max_tokens", no_stream_usage=True),
        default_params={"frequency_penalty": 0.5, "temperature": 1.0, "logit_bias": {"1": -1}},
        capabilities=Capabilities(json_schema=False), extra_headers=(("X-Team", "a"), ("Authorization", "no")),
    )
    assert body["max_tokens"] == 4096
    assert "stream_options" not in body
    assert (body["frequency_penalty"], body["temperature"]) == (0.5, 0.0)
    assert "response_format" not in body
    assert "JSON Schema" in body["messages"][0]["content"]


async def test_sound_is_sent_where_the_protocol_takes_it(wire: WireServer, http: UpstreamHttp) -> None:
    sound = Prompt((Message(Role.USER, (AudioPart(b"RIFF", "wav"),)),))
    _, _, body = await asked_of(http, wire, "chat", sound)
    assert body["messages"][0]["content"][0] == {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
    model = HttpModel(http, FORMATS["anthropic"])
    with pytest.raises(UpstreamFailure) as caught:
        async for _ in model.ask(deployment_for("anthropic", wire.base_url), Question(sound, 5, whole=True), on_sent=lambda: None):
            pass
    assert caught.value.kind is FailureKind.REJECTED


async def test_embeddings_come_in_the_order_of_their_inputs(wire: WireServer, http: UpstreamHttp) -> None:
    wire.body = (SHAPES / "embeddings.json").read_bytes()
    wire.headers = {"Content-Type": "application/json"}
    question = Question(Prompt(()), 0, whole=True, inputs=("a", "b"), dimensions=2)
    (chunk,) = [each async for each in HttpModel(http, FORMATS["chat"]).ask(
        deployment_for("chat", wire.base_url), question, on_sent=lambda: None
    )]
    assert chunk.vectors == ((1.0, 0.0), (0.25, -0.5))
    assert chunk.usage == Usage(8)
    path, _, body = wire.asked[-1]
    assert path == "/v1/embeddings"
    assert (body["input"], body["dimensions"]) == (["a", "b"], 2)


async def test_many_inputs_are_embedded_in_batches(wire: WireServer, http: UpstreamHttp) -> None:
    async def answer(request: web.Request) -> web.Response:
        asked = (await request.json())["input"]
        wire.asked.append((request.path, {}, {"input": asked}))
        return web.json_response({
            "data": [{"index": index, "embedding": [float(text)]} for index, text in enumerate(asked)],
            "model": "e", "usage": {"prompt_tokens": len(asked)},
        })

    wire._answer = answer  # type: ignore[method-assign]
    app = web.Application()
    app.router.add_post("/v1/embeddings", answer)
    async with TestServer(app) as server:
        inputs = tuple(str(number) for number in range(300))
        deployment = deployment_for("chat", str(server.make_url("/v1")))
        question = Question(Prompt(()), 0, whole=True, inputs=inputs)
        chunks = [each async for each in HttpModel(http, FORMATS["chat"]).ask(deployment, question, on_sent=lambda: None)]
    assert [vector for chunk in chunks for vector in chunk.vectors] == [(float(text),) for text in inputs]
    assert len(wire.asked) == 3
    usage = None
    for chunk in chunks:
        for told in chunk.usages:
            usage = merge_usage(UsageArrival.DELTA, usage, told)
    assert usage == Usage(300)


@pytest.mark.parametrize("body", [
    b"<html>", b"[]", b"{}", b'{"choices":[]}', b'{"choices":5}', b"5", b"null", b'{"output":5}', b'{"content":5}',
    b'{"data":[{"index":5,"embedding":[1]}]}', b'{"choices":[{"message":{"tool_calls":[5]}}]}',
])
@pytest.mark.parametrize("protocol", FORMATS)
@pytest.mark.parametrize("inputs", [(), ("a",)])
async def test_what_is_no_answer_is_a_failure_and_never_a_crash(
    body: bytes, protocol: str, inputs: tuple[str, ...], wire: WireServer, http: UpstreamHttp
) -> None:
    wire.body = body
    wire.headers = {"Content-Type": "application/json"}
    if inputs and protocol != "chat":
        return
    told = await ask(http, protocol, deployment_for(protocol, wire.base_url), Question(HELLO, 5, whole=True, inputs=inputs))
    assert told.failure is FailureKind.UNAVAILABLE


@settings(max_examples=300, deadline=None)
@given(
    protocol=st.sampled_from(sorted(FORMATS)),
    event=st.recursive(
        st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
            st.sampled_from([
                "type", "delta", "choices", "index", "usage", "error", "item", "response", "message", "content_block",
                "tool_calls", "function", "text", "output_index", "status", "output", "content",
            ]), inner, max_size=5,
        ), max_leaves=12,
    ),
    kind=st.sampled_from([
        "message_start", "content_block_start", "content_block_delta", "message_delta", "error",
        "response.output_item.added", "response.output_text.delta", "response.completed", "response.failed",
    ]),
)
def test_no_event_breaks_a_decoder(protocol: str, event: Any, kind: str) -> None:
    told = {**event, "type": kind} if isinstance(event, dict) else event
    data = b"data: " + json.dumps(told).encode() + b"\n\n"
    read(protocol, [data])


async def test_the_local_model_keeps_to_the_same_contract() -> None:
    model = LocalModel(BpeTokenCounter(), tokens_per_second=0)

    async def told(question: Question, **params: Any) -> Told:
        chunks: list[UpstreamChunk] = []
        failure = None
        try:
            deployment = replace(BUILT_IN, default_params=params)
            async for chunk in model.ask(deployment, question, on_sent=lambda: None):
                chunks.append(chunk)  # noqa: PERF401 - those before a failure count
        except UpstreamFailure as error:
            failure = error
        return told_by(chunks, failure)

    streamed = await told(HELLO_STREAMED)
    assert streamed == await told(replace(HELLO_STREAMED, whole=True))
    assert streamed.finish is FinishReason.STOP
    assert streamed.usage is not None
    assert (await told(HELLO_STREAMED, words=500)).finish is FinishReason.LENGTH
    assert (await told(HELLO_STREAMED, words=500, ignore_max_tokens=True)).text == " word" * 500
    assert (await told(HELLO_STREAMED, cut_after=2, words=5)) == Told(" word" * 2, failure=FailureKind.UNAVAILABLE)
    assert (await told(HELLO_STREAMED, error_after=0)).failure is FailureKind.UNAVAILABLE
    assert (await told(HELLO_STREAMED, http_status=429)).failure is FailureKind.LIMITED
    assert (await told(HELLO_STREAMED, no_usage=True)).usage is None
    over = (await told(HELLO_STREAMED, words=5, usage_factor=3.0)).usage
    assert over is not None
    assert over.output_tokens == 15
    assert (await told(HELLO_STREAMED, finish_reason="moon_phase", words=1)).unknown
    assert (await told(HELLO_STREAMED, reasoning="so it is", words=1)).reasoning == "so it is"
    asks = replace(HELLO_STREAMED, prompt=replace(HELLO, tools=(TOOL,)))
    assert (await told(asks, tool_calls=[{"name": "look", "arguments": '{"at": "sky"}'}])) == Told(
        tools=(("look", '{"at": "sky"}'),), finish=FinishReason.TOOL_CALLS, usage=(await told(
            asks, tool_calls=[{"name": "look", "arguments": '{"at": "sky"}'}])).usage,
    )
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await told(HELLO_STREAMED, silent_after=2)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await told(HELLO_STREAMED, first_token_ms=5000)
