"""OpenAI chat completions and embeddings as JSON, with the differences of its many servers as settings."""

from __future__ import annotations

import base64
from typing import Any

import orjson

from llm_service.clients.upstream_failures import failure_of
from llm_service.clients.wire_format import (
    MOST_TOOL_CALLS,
    WRONG_SHAPE,
    Malformed,
    Posted,
    add_text,
    count_of,
    data_url,
    fitted,
    key_headers,
    path_of,
    schema_name,
    set_finish,
    usage_or_none,
    with_defaults,
)
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
    Tool,
    ToolCallDelta,
    ToolChoiceMode,
)
from llm_service.domain.deployment import Deployment
from llm_service.domain.quirks import Quirks, effective
from llm_service.usecases.ports import Question, UpstreamChunk
from metering.usage import Usage

ROLE_NAMES = {
    Role.SYSTEM: "system", Role.DEVELOPER: "developer", Role.USER: "user", Role.ASSISTANT: "assistant",
    Role.TOOL: "tool",
}
CHOICE_NAMES = {ToolChoiceMode.AUTO: "auto", ToolChoiceMode.NONE: "none", ToolChoiceMode.REQUIRED: "required"}
FINISH_REASONS = {
    "stop": FinishReason.STOP, "length": FinishReason.LENGTH, "tool_calls": FinishReason.TOOL_CALLS,
    "function_call": FinishReason.TOOL_CALLS, "content_filter": FinishReason.CONTENT_FILTER,
    "max_tokens": FinishReason.LENGTH, "model_length": FinishReason.LENGTH, "eos": FinishReason.STOP,
    "end_turn": FinishReason.STOP,
}
FAILED_FINISHES = frozenset({"error", "insufficient_system_resource"})
"""Reasons with which some servers say, after 200, that they failed."""


class OpenAiChatFormat:
    """Implements WireFormat."""

    def posted(self, deployment: Deployment, question: Question) -> Posted:
        quirks = effective(deployment.quirks)
        query = {"api-version": quirks.api_version} if quirks.api_version else {}
        headers = key_headers(deployment, quirks, standard="authorization")
        if question.inputs:
            path = path_of(deployment, quirks, "/chat/completions").replace("/chat/completions", "/embeddings")
            return Posted(path, _embeddings_body(deployment, question, quirks), headers, query)
        path = path_of(deployment, quirks, "/chat/completions")
        return Posted(path, _chat_body(deployment, question, quirks), headers, query)

    def decoder(self, question: Question) -> ChatDecoder:
        return ChatDecoder()

    def read_answer(self, chunk: UpstreamChunk, document: Any, question: Question) -> None:
        try:
            if question.inputs:
                _read_embeddings(chunk, document, len(question.inputs))
            else:
                _read_chat(chunk, document)
        except WRONG_SHAPE as error:
            raise Malformed("the answer has another shape") from error


def _chat_body(deployment: Deployment, question: Question, quirks: Quirks) -> dict[str, Any]:
    prompt = fitted(question.prompt, deployment)
    body: dict[str, Any] = {
        "model": deployment.upstream_model,
        "messages": [_message(message, quirks) for message in prompt.messages],
        quirks.max_tokens_field or "max_tokens": question.max_output_tokens,
    }
    if not question.whole:
        body["stream"] = True
        if not quirks.no_stream_usage:
            body["stream_options"] = {"include_usage": True}
    optional = {
        "temperature": prompt.temperature,
        "top_p": prompt.top_p,
        "seed": prompt.seed,
        "stop": list(prompt.stop) or None,
        "tools": [tool_to_json(tool) for tool in prompt.tools] or None,
        "tool_choice": _tool_choice(prompt.tool_choice),
        "response_format": _response_format(prompt),
        "reasoning_effort": prompt.reasoning_effort.name.lower() if prompt.reasoning_effort else None,
        "parallel_tool_calls": prompt.parallel_tool_calls if prompt.tools else None,
        "metadata": prompt.metadata or None,
        **_thinking(prompt, quirks),
    }
    body.update({name: value for name, value in optional.items() if value is not None})
    return with_defaults(body, deployment, quirks)


def _thinking(prompt: Prompt, quirks: Quirks) -> dict[str, Any]:
    if prompt.thinking is None:
        return {}
    match quirks.thinking_field or "thinking":
        case "thinking":
            return {"thinking": {"type": "enabled" if prompt.thinking else "disabled"}}
        case "enable_thinking":
            return {"enable_thinking": prompt.thinking}
        case "chat_template_kwargs":
            return {"chat_template_kwargs": {"enable_thinking": prompt.thinking}}
        case "reasoning":
            return {"reasoning": {"enabled": prompt.thinking}}
        case _:
            return {}


def _message(message: Message, quirks: Quirks) -> dict[str, Any]:
    role = ROLE_NAMES[message.role]
    if message.role is Role.DEVELOPER and quirks.developer_role:
        role = quirks.developer_role
    told: dict[str, Any] = {"role": role}
    texts_only = all(isinstance(part, TextPart) for part in message.parts)
    if len(message.parts) == 1 and texts_only:
        told["content"] = message.parts[0].text  # type: ignore[union-attr]  # checked above
    elif message.parts:
        told["content"] = [_part(part) for part in message.parts]
    else:
        told["content"] = None if message.tool_calls else ""
    if message.name:
        told["name"] = message.name
    if message.reasoning and quirks.reasoning_field not in ("", "none"):
        told[quirks.reasoning_field] = message.reasoning
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
            image = {"url": url or data_url(mime_type, data)}
            return {"type": "image_url", "image_url": {**image, "detail": detail} if detail else image}
        case AudioPart(data, form):
            return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": form}}
        case FilePart(data, filename, mime_type):
            return {"type": "file", "file": {"filename": filename, "file_data": data_url(mime_type, data)}}


def tool_to_json(tool: Tool) -> dict[str, Any]:
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
        "json_schema": {
            "name": schema_name(schema), "schema": orjson.loads(schema.schema), "strict": schema.strict
        },
    }


def _embeddings_body(deployment: Deployment, question: Question, quirks: Quirks) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": deployment.upstream_model, "input": list(question.inputs), "encoding_format": "float"
    }
    if question.dimensions is not None:
        body["dimensions"] = question.dimensions
    return with_defaults(body, deployment, quirks)


def _usage(told: dict[str, Any]) -> Usage | None:
    if told.get("prompt_tokens") is None and told.get("completion_tokens") is None:
        return None
    ins, outs = told.get("prompt_tokens_details") or {}, told.get("completion_tokens_details") or {}
    return Usage(
        input_tokens=count_of(told, "prompt_tokens"),
        # DeepSeek tells its cache hits beside the counts, not in their details.
        cached_input_tokens=count_of(ins, "cached_tokens") or count_of(told, "prompt_cache_hit_tokens"),
        cache_write_tokens=count_of(ins, "cache_write_tokens"),
        output_tokens=count_of(told, "completion_tokens"), reasoning_tokens=count_of(outs, "reasoning_tokens"),
        input_audio_tokens=count_of(ins, "audio_tokens"), output_audio_tokens=count_of(outs, "audio_tokens"),
    )


def usage_from_json(told: Any) -> Usage | None:
    """None when it is absent or no usage; counts outside 0..10^9 are no usage either."""
    return usage_or_none(_usage, told)


class ChatDecoder:
    """Reads chat.completion.chunk events."""

    def __init__(self) -> None:
        self.is_finished = False

    def add(self, chunk: UpstreamChunk, event: Any) -> None:
        try:
            self._add(chunk, event)
        except WRONG_SHAPE as error:
            raise Malformed("an event has another shape") from error

    def _add(self, chunk: UpstreamChunk, event: Any) -> None:
        if model := event.get("model"):
            chunk.upstream_model = str(model)[:128]
        if (usage := usage_from_json(event.get("usage"))) is not None:
            chunk.usage = usage
        if event.get("error") is not None:
            raise failure_of(event["error"])
        for choice in event.get("choices") or ():
            if choice.get("index", 0) != 0:
                continue
            if told := choice.get("delta"):
                _add_delta(chunk, told)
            if finish := choice.get("finish_reason"):
                if finish in FAILED_FINISHES:
                    raise failure_of(choice.get("error") or {"code": str(finish)})
                set_finish(chunk, FINISH_REASONS, finish)
                self.is_finished = True


def _add_delta(chunk: UpstreamChunk, told: Any) -> None:
    add_text(
        chunk, told.get("content") or told.get("refusal") or "",
        told.get("reasoning_content") or told.get("reasoning") or "",
    )
    for position, call in enumerate(told.get("tool_calls") or ()):
        chunk.pieces += 1
        chunk.deltas.append(Delta(tool_call=_tool_call_delta(call, position)))


def _tool_call_delta(told: Any, position: int) -> ToolCallDelta:
    function = told.get("function") or {}
    index = told.get("index")
    if index is None:
        index = position
    if type(index) is not int or not 0 <= index < MOST_TOOL_CALLS:
        raise Malformed("a tool call has no number")
    arguments = function.get("arguments") or ""
    if not isinstance(arguments, str):
        arguments = orjson.dumps(arguments).decode()  # Ollama sends an object
    return ToolCallDelta(
        index=index, id=str(told.get("id") or "")[:128], name=str(function.get("name") or "")[:64],
        arguments=arguments,
    )


def _read_chat(chunk: UpstreamChunk, document: Any) -> None:
    chunk.upstream_model = str(document.get("model") or "")[:128]
    chunk.usage = usage_from_json(document.get("usage"))
    if document.get("error") is not None and not document.get("choices"):
        raise failure_of(document["error"])
    choice = document["choices"][0]
    if choice.get("finish_reason") in FAILED_FINISHES:
        raise failure_of(choice.get("error") or {"code": str(choice["finish_reason"])})
    _add_delta(chunk, choice.get("message") or {})
    set_finish(chunk, FINISH_REASONS, choice.get("finish_reason") or "stop")


def _read_embeddings(chunk: UpstreamChunk, document: Any, count: int) -> None:
    if document.get("error") is not None:
        raise failure_of(document["error"])
    rows = sorted(document["data"], key=lambda row: int(row["index"]))
    if [row["index"] for row in rows] != list(range(count)):
        raise Malformed("the vectors are not those of the inputs")
    chunk.vectors = tuple(tuple(map(float, row["embedding"])) for row in rows)
    chunk.upstream_model = str(document.get("model") or "")[:128]
    chunk.usage = usage_from_json(document.get("usage"))
    chunk.finish_reason = FinishReason.STOP
