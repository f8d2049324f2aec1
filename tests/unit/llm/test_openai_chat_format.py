"""Chat completions: what is asked, and what any answer means."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_service.clients.openai_chat import _EventBuffer
from llm_service.clients.openai_chat_format import (
    MalformedAnswer,
    add_event,
    answer_from_json,
    failure_from_error,
    request_body,
    usage_from_json,
)
from llm_service.domain.chat import (
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
from llm_service.domain.deployment import BUILT_IN
from llm_service.usecases.ports import UpstreamChunk, UpstreamFailure

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from([
            "choices", "delta", "content", "finish_reason", "usage", "error", "index", "tool_calls", "function",
            "arguments", "message", "model", "prompt_tokens", "completion_tokens", "prompt_tokens_details",
        ]), inner, max_size=4,
    ),
    max_leaves=12,
)


def body_of(prompt: Prompt, **fields: Any) -> dict[str, Any]:
    body: dict[str, Any] = orjson.loads(
        request_body(BUILT_IN, prompt, max_output_tokens=fields.get("most", 5), stream=fields.get("stream", False))
    )
    return body


def user(*parts: Any) -> Prompt:
    return Prompt((Message(Role.USER, tuple(parts)),))


def test_a_plain_prompt_is_plain() -> None:
    assert body_of(user(TextPart("hi"))) == {
        "model": "local", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5
    }
    assert body_of(user(TextPart("hi")), stream=True)["stream_options"] == {"include_usage": True}


def test_every_option_arrives_and_zero_is_not_absent() -> None:
    body = body_of(Prompt(
        messages=(
            Message(Role.SYSTEM, (TextPart("be brief"),)),
            Message(Role.ASSISTANT, tool_calls=(ToolCall("t", "look", "{}"),)),
            Message(Role.TOOL, (TextPart("sky"),), tool_call_id="t"),
            Message(Role.USER, (TextPart("a"), ImagePart("", b"\x01", "image/png", "low"),
                                AudioPart(b"\x02", "wav"), FilePart(b"\x03", "f.pdf", "application/pdf"))),
        ),
        temperature=0.0, top_p=0.5, stop=("END",), seed=0, tools=(Tool("look", "looks", '{"type":"object"}', True),),
        tool_choice="look", json_schema=JsonSchema("s", '{"type":"object"}', True),
        reasoning_effort=ReasoningEffort.LOW, thinking=False, parallel_tool_calls=False, metadata={"k": "v"},
    ))
    assert body["temperature"] == 0.0
    assert body["seed"] == 0
    assert body["tool_choice"] == {"type": "function", "function": {"name": "look"}}
    assert body["tools"][0]["function"]["parameters"] == {"type": "object"}
    assert body["response_format"]["json_schema"]["strict"] is True
    assert body["reasoning_effort"] == "low"
    assert body["thinking"] == {"type": "disabled"}
    assert body["parallel_tool_calls"] is False
    assert body["messages"][1]["tool_calls"][0]["function"] == {"name": "look", "arguments": "{}"}
    assert body["messages"][2]["tool_call_id"] == "t"
    kinds = [part["type"] for part in body["messages"][3]["content"]]
    assert kinds == ["text", "image_url", "input_audio", "file"]
    assert body["messages"][3]["content"][1]["image_url"]["url"] == "data:image/png;base64,AQ=="
    assert body_of(Prompt((), tool_choice=ToolChoiceMode.REQUIRED))["tool_choice"] == "required"
    assert body_of(Prompt((), json_object=True))["response_format"] == {"type": "json_object"}


@settings(max_examples=1000, deadline=None)
@given(json_values)
def test_no_answer_raises_anything_but_malformed_or_failure(document: Any) -> None:
    for read in (answer_from_json, lambda value: add_event(UpstreamChunk(), value)):
        with contextlib.suppress(MalformedAnswer, UpstreamFailure):
            read(document)


@pytest.mark.parametrize("told", [
    None, {}, {"prompt_tokens": -1}, {"prompt_tokens": "7"}, {"prompt_tokens": 10**12}, {"completion_tokens": 1.5}, [],
])
def test_usage_that_is_none_is_none(told: Any) -> None:
    assert usage_from_json(told) is None


def test_usage_keeps_its_parts() -> None:
    usage = usage_from_json({
        "prompt_tokens": 10, "completion_tokens": 20,
        "prompt_tokens_details": {"cached_tokens": 4, "audio_tokens": 1},
        "completion_tokens_details": {"reasoning_tokens": 7, "audio_tokens": 2},
    })
    assert usage is not None
    assert (usage.cached_input_tokens, usage.reasoning_tokens) == (4, 7)
    assert (usage.input_audio_tokens, usage.output_audio_tokens) == (1, 2)


@pytest.mark.parametrize(("status", "code", "reason"), [
    (400, None, "UPSTREAM_REJECTED"), (400, "context_length_exceeded", "CONTEXT_TOO_LONG"),
    (401, "invalid_api_key", "UPSTREAM_UNAVAILABLE"), (404, None, "UPSTREAM_REJECTED"),
    (429, None, "UPSTREAM_UNAVAILABLE"), (500, None, "UPSTREAM_UNAVAILABLE"),
])
def test_an_upstream_error_has_a_reason_and_no_text_of_theirs(status: int, code: str | None, reason: str) -> None:
    failure = failure_from_error({"message": "your prompt was: secret", "code": code}, http_status=status)
    assert failure.reason == reason
    assert "secret" not in failure.detail


def event(text: str, **fields: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, **fields}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


@given(st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=8), st.data())
def test_events_survive_being_cut_anywhere(texts: list[str], data: st.DataObject) -> None:
    stream = b": comment\r\n" + b"".join(map(event, texts)) + event("", finish_reason="stop") + b"data: [DONE]\n\n"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    buffer, got, finished, done = _EventBuffer(), "", None, False
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        chunk = UpstreamChunk()
        done_now, failure = buffer.feed(stream[begin:end], chunk)
        assert failure is None
        got += "".join(delta.text for delta in chunk.deltas)
        finished, done = chunk.finish_reason or finished, done or done_now
    assert (got, finished, done) == ("".join(texts), FinishReason.STOP, True)


def test_events_of_one_read_become_one_delta() -> None:
    chunk = UpstreamChunk()
    _EventBuffer().feed(event("a") + event("b") + event("c"), chunk)
    assert [delta.text for delta in chunk.deltas] == ["abc"]
    assert chunk.pieces == 3


def test_what_came_before_a_bad_event_is_kept() -> None:
    chunk = UpstreamChunk()
    _, failure = _EventBuffer().feed(event("a") + b"data: {oops\n\n", chunk)
    assert failure is not None
    assert [delta.text for delta in chunk.deltas] == ["a"]
