"""OpenAI chat completions as JSON: requests out of prompts, usage, deltas and errors out of answers."""

from __future__ import annotations

import base64
from typing import Any

import orjson

from llm_service.domain.chat import (
    AudioPart,
    Delta,
    FilePart,
    FinishReason,
    ImagePart,
    Message,
    Part,
    Prompt,
    Role,
    TextPart,
    ToolCall,
    ToolCallDelta,
    ToolChoiceMode,
)
from llm_service.domain.deployment import Deployment
from llm_service.usecases.ports import UpstreamAnswer, UpstreamChunk, UpstreamFailure
from metering.usage import Usage

ROLE_NAMES = {
    Role.SYSTEM: "system", Role.DEVELOPER: "developer", Role.USER: "user", Role.ASSISTANT: "assistant",
    Role.TOOL: "tool",
}
CHOICE_NAMES = {ToolChoiceMode.AUTO: "auto", ToolChoiceMode.NONE: "none", ToolChoiceMode.REQUIRED: "required"}
FINISH_REASONS = {
    "stop": FinishReason.STOP, "length": FinishReason.LENGTH, "tool_calls": FinishReason.TOOL_CALLS,
    "function_call": FinishReason.TOOL_CALLS, "content_filter": FinishReason.CONTENT_FILTER,
}
MOST_TOKENS = 1_000_000_000


_WRONG_SHAPE = (AttributeError, IndexError, KeyError, TypeError)


class MalformedAnswer(Exception):
    """The JSON is not what chat completions promise."""


def request_body(deployment: Deployment, prompt: Prompt, *, max_output_tokens: int, stream: bool) -> bytes:
    body: dict[str, Any] = {
        "model": deployment.upstream_model,
        "messages": [_message(message) for message in prompt.messages],
        "max_tokens": max_output_tokens,
    }
    if stream:
        body["stream"] = True
        body["stream_options"] = {"include_usage": True}
    optional = {
        "temperature": prompt.temperature,
        "top_p": prompt.top_p,
        "seed": prompt.seed,
        "stop": list(prompt.stop) or None,
        "tools": [_tool(tool) for tool in prompt.tools] or None,
        "tool_choice": _tool_choice(prompt.tool_choice),
        "response_format": _response_format(prompt),
        "reasoning_effort": prompt.reasoning_effort.name.lower() if prompt.reasoning_effort else None,
        "thinking": None if prompt.thinking is None else {"type": "enabled" if prompt.thinking else "disabled"},
        "parallel_tool_calls": prompt.parallel_tool_calls,
        "metadata": prompt.metadata or None,
    }
    body.update({name: value for name, value in optional.items() if value is not None})
    return orjson.dumps(body)


def _message(message: Message) -> dict[str, Any]:
    told: dict[str, Any] = {"role": ROLE_NAMES[message.role]}
    texts_only = all(isinstance(part, TextPart) for part in message.parts)
    if len(message.parts) == 1 and texts_only:
        told["content"] = message.parts[0].text  # type: ignore[union-attr]  # checked above
    elif message.parts:
        told["content"] = [_part(part) for part in message.parts]
    else:
        told["content"] = None if message.tool_calls else ""
    if message.name:
        told["name"] = message.name
    if message.tool_calls:
        told["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        told["tool_call_id"] = message.tool_call_id
    return told


def _part(part: Part) -> dict[str, Any]:
    match part:
        case TextPart(text):
            return {"type": "text", "text": text}
        case ImagePart(url, data, mime_type, detail):
            image = {"url": url or _data_url(mime_type, data)}
            return {"type": "image_url", "image_url": {**image, "detail": detail} if detail else image}
        case AudioPart(data, form):
            return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": form}}
        case FilePart(data, filename, mime_type):
            return {"type": "file", "file": {"filename": filename, "file_data": _data_url(mime_type, data)}}


def _data_url(mime_type: str, data: bytes) -> str:
    return f"data:{mime_type};base64,{base64.b64encode(data).decode()}"


def _tool(tool: Any) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters:
        function["parameters"] = orjson.loads(tool.parameters)
    if tool.strict:
        function["strict"] = True
    return {"type": "function", "function": function}


def _tool_choice(choice: ToolChoiceMode | str | None) -> Any:
    if choice is None:
        return None
    if isinstance(choice, ToolChoiceMode):
        return CHOICE_NAMES[choice]
    return {"type": "function", "function": {"name": choice}}


def _response_format(prompt: Prompt) -> dict[str, Any] | None:
    if prompt.json_object:
        return {"type": "json_object"}
    if prompt.json_schema is None:
        return None
    schema = prompt.json_schema
    return {
        "type": "json_schema",
        "json_schema": {"name": schema.name, "schema": orjson.loads(schema.schema), "strict": schema.strict},
    }


def usage_from_json(told: Any) -> Usage | None:
    """None when it is absent or no usage; counts outside 0..10^9 are no usage either."""
    if not isinstance(told, dict):
        return None
    input_details = told.get("prompt_tokens_details") or {}
    output_details = told.get("completion_tokens_details") or {}
    counts = (
        told.get("prompt_tokens"), input_details.get("cached_tokens"), input_details.get("cache_write_tokens"),
        told.get("completion_tokens"), output_details.get("reasoning_tokens"), input_details.get("audio_tokens"),
        output_details.get("audio_tokens"),
    )
    numbers: list[Any] = [0 if count is None else count for count in counts]
    if any(type(number) is not int or not 0 <= number <= MOST_TOKENS for number in numbers):
        return None
    if counts[0] is None and counts[3] is None:
        return None
    return Usage(
        input_tokens=numbers[0], cached_input_tokens=numbers[1], cache_write_tokens=numbers[2],
        output_tokens=numbers[3], reasoning_tokens=numbers[4], input_audio_tokens=numbers[5],
        output_audio_tokens=numbers[6],
    )


def add_event(chunk: UpstreamChunk, event: Any) -> None:
    """Adds one streamed event to a chunk. Raises UpstreamFailure for an error event, MalformedAnswer."""
    try:
        _add_event(chunk, event)
    except _WRONG_SHAPE as error:
        raise MalformedAnswer("an event has another shape") from error


def _add_event(chunk: UpstreamChunk, event: Any) -> None:
    if event.get("error") is not None:
        raise failure_from_error(event["error"], http_status=0)
    if model := event.get("model"):
        chunk.upstream_model = str(model)[:128]
    if (usage := usage_from_json(event.get("usage"))) is not None:
        chunk.usage = usage
    for choice in event.get("choices") or ():
        if choice.get("index", 0) != 0:
            continue
        if told := choice.get("delta"):
            _add_delta(chunk, told)
        if finish := choice.get("finish_reason"):
            chunk.finish_reason = FINISH_REASONS.get(finish, FinishReason.STOP)


def _add_delta(chunk: UpstreamChunk, told: Any) -> None:
    text = told.get("content") or told.get("refusal") or ""
    reasoning = told.get("reasoning_content") or told.get("reasoning") or ""
    if not isinstance(text, str) or not isinstance(reasoning, str):
        raise MalformedAnswer("the text of a delta is no string")
    if text or reasoning:
        chunk.pieces += 1
        last = chunk.deltas[-1] if chunk.deltas else None
        if last is not None and last.tool_call is None:
            # Several events arrived in one read: one message carries them.
            chunk.deltas[-1] = Delta(text=last.text + text, reasoning=last.reasoning + reasoning)
        else:
            chunk.deltas.append(Delta(text=text, reasoning=reasoning))
    for position, call in enumerate(told.get("tool_calls") or ()):
        chunk.pieces += 1
        chunk.deltas.append(Delta(tool_call=_tool_call_delta(call, position)))


def _tool_call_delta(told: Any, position: int) -> ToolCallDelta:
    function = told.get("function") or {}
    index = told.get("index", position)
    if type(index) is not int or not 0 <= index < 1024:
        raise MalformedAnswer("a tool call has no number")
    return ToolCallDelta(
        index=index, id=str(told.get("id") or "")[:128], name=str(function.get("name") or "")[:64],
        arguments=str(function.get("arguments") or ""),
    )


def answer_from_json(document: Any) -> UpstreamAnswer:
    """A whole answer. Raises UpstreamFailure for an error object, MalformedAnswer."""
    try:
        return _answer_from_json(document)
    except _WRONG_SHAPE as error:
        raise MalformedAnswer("the answer has another shape") from error


def _answer_from_json(document: Any) -> UpstreamAnswer:
    if document.get("error") is not None and not document.get("choices"):
        raise failure_from_error(document["error"], http_status=0)
    choices = document.get("choices")
    if not choices:
        raise MalformedAnswer("the answer has no choice")
    told = choices[0].get("message") or {}
    chunk = UpstreamChunk()
    _add_delta(chunk, told)
    texts = [delta for delta in chunk.deltas if delta.tool_call is None]
    message = Message(
        role=Role.ASSISTANT,
        parts=(TextPart(texts[0].text),) if texts and texts[0].text else (),
        reasoning=texts[0].reasoning if texts else "",
        tool_calls=tuple(
            ToolCall(delta.tool_call.id, delta.tool_call.name, delta.tool_call.arguments)
            for delta in chunk.deltas if delta.tool_call is not None
        ),
    )
    return UpstreamAnswer(
        message=message, finish_reason=FINISH_REASONS.get(str(choices[0].get("finish_reason")), FinishReason.STOP),
        usage=usage_from_json(document.get("usage")), upstream_model=str(document.get("model") or "")[:128],
    )


def failure_from_error(error: Any, *, http_status: int, retry_after_seconds: float | None = None) -> UpstreamFailure:
    """What an error object of a model server means. Its text stays out: it may quote the prompt or a key."""
    code = str(error.get("code") or error.get("type") or "") if isinstance(error, dict) else ""
    known = code if code.replace("_", "").isalnum() and len(code) <= 64 else ""
    detail = f"HTTP {http_status}, code {known or 'none'}" if http_status else f"error event, code {known or 'none'}"
    if code in {"context_length_exceeded", "string_above_max_length"}:
        reason = "CONTEXT_TOO_LONG"
    elif http_status in {400, 404, 413, 422} or code in {"invalid_request_error", "content_policy_violation"}:
        reason = "UPSTREAM_REJECTED"
    else:
        # 401 and 403 too: our key is at fault, not the caller.
        reason = "UPSTREAM_UNAVAILABLE"
    return UpstreamFailure(reason, detail, http_status=http_status, retry_after_seconds=retry_after_seconds)
