"""OpenAI Responses as JSON: items in, items and events out. Nothing is stored there (`store` is false)."""

from __future__ import annotations

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
    ToolCallDelta,
    ToolChoiceMode,
)
from llm_service.domain.deployment import Deployment
from llm_service.domain.quirks import effective
from llm_service.domain.routing import FailureKind
from llm_service.usecases.ports import Question, UpstreamChunk, UpstreamFailure
from metering.usage import Usage

ROLE_NAMES = {
    Role.SYSTEM: "system", Role.DEVELOPER: "developer", Role.USER: "user", Role.ASSISTANT: "assistant",
}
CHOICE_NAMES = {ToolChoiceMode.AUTO: "auto", ToolChoiceMode.NONE: "none", ToolChoiceMode.REQUIRED: "required"}
INCOMPLETE_REASONS = {
    "completed": FinishReason.STOP, "tool_calls": FinishReason.TOOL_CALLS,
    "max_output_tokens": FinishReason.LENGTH, "max_tokens": FinishReason.LENGTH,
    "content_filter": FinishReason.CONTENT_FILTER,
}
TEXT_EVENTS = frozenset({"response.output_text.delta", "response.refusal.delta"})
REASONING_EVENTS = frozenset({"response.reasoning_summary_text.delta", "response.reasoning_text.delta"})
END_EVENTS = frozenset({"response.completed", "response.incomplete", "response.failed"})


class OpenAiResponsesFormat:
    """Implements WireFormat. The protocol has no place for `stop` and `seed`."""

    def posted(self, deployment: Deployment, question: Question) -> Posted:
        quirks = effective(deployment.quirks)
        prompt = fitted(question.prompt, deployment)
        body: dict[str, Any] = {
            "model": deployment.upstream_model,
            "input": [item for message in prompt.messages for item in _items(message)],
            "max_output_tokens": question.max_output_tokens, "store": False,
            "include": ["reasoning.encrypted_content"],
        }
        if not question.whole:
            body["stream"] = True
        optional = {
            "temperature": prompt.temperature, "top_p": prompt.top_p,
            "tools": [_tool(tool) for tool in prompt.tools] or None,
            "tool_choice": _tool_choice(prompt.tool_choice), "text": _text_format(prompt),
            "reasoning": _reasoning(prompt),
            "parallel_tool_calls": prompt.parallel_tool_calls if prompt.tools else None,
            "metadata": prompt.metadata or None,
        }
        body.update({name: value for name, value in optional.items() if value is not None})
        return Posted(
            path_of(deployment, quirks, "/responses"), with_defaults(body, deployment, quirks),
            key_headers(deployment, quirks, standard="authorization"),
            {"api-version": quirks.api_version} if quirks.api_version else {},
        )

    def decoder(self, question: Question) -> ResponsesDecoder:
        return ResponsesDecoder()

    def read_answer(self, chunk: UpstreamChunk, document: Any, question: Question) -> None:
        try:
            if document.get("error") is not None and not document.get("output"):
                chunk.usage = usage_from_json(document.get("usage"))
                raise failure_of(document["error"])
            numbers: dict[int, int] = {}
            for position, item in enumerate(document["output"]):
                _add_whole_item(chunk, item, numbers.setdefault(position, len(numbers)))
            _end(chunk, document)
        except WRONG_SHAPE as error:
            raise Malformed("the answer has another shape") from error


def _items(message: Message) -> list[dict[str, Any]]:
    if message.role is Role.TOOL:
        output = "".join(part.text for part in message.parts if isinstance(part, TextPart))
        return [{"type": "function_call_output", "call_id": message.tool_call_id, "output": output}]
    items: list[dict[str, Any]] = []
    if message.reasoning_signature:
        items.append(_reasoning_item(message.reasoning_signature))
    if message.parts:
        content = [_part(part, is_answer=message.role is Role.ASSISTANT) for part in message.parts]
        items.append({"type": "message", "role": ROLE_NAMES[message.role], "content": content})
    items += [
        {"type": "function_call", "call_id": call.id, "name": call.name, "arguments": call.arguments}
        for call in message.tool_calls
    ]
    return [item for item in items if item]


def _reasoning_item(signature: str) -> dict[str, Any]:
    try:
        told = orjson.loads(signature)
        return {
            "type": "reasoning", "id": str(told["id"]), "summary": [], "encrypted_content": str(told["content"])
        }
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return {}  # another provider's


def _part(part: Part, *, is_answer: bool) -> dict[str, Any]:
    match part:
        case TextPart(text):
            return {"type": "output_text" if is_answer else "input_text", "text": text}
        case ImagePart(url, data, mime_type, detail):
            return {"type": "input_image", "image_url": url or data_url(mime_type, data), "detail": detail or "auto"}
        case FilePart(data, filename, mime_type):
            return {"type": "input_file", "filename": filename, "file_data": data_url(mime_type, data)}
        case AudioPart():
            raise UpstreamFailure(
                "UPSTREAM_REJECTED", "the protocol takes no sound", kind=FailureKind.REJECTED
            )


def _tool(tool: Any) -> dict[str, Any]:
    parameters = orjson.loads(tool.parameters) if tool.parameters else {"type": "object", "properties": {}}
    told: dict[str, Any] = {"type": "function", "name": tool.name, "parameters": parameters, "strict": tool.strict}
    if tool.description:
        told["description"] = tool.description
    return told


def _tool_choice(choice: ToolChoiceMode | str | None) -> Any:
    if choice is None:
        return None
    if isinstance(choice, ToolChoiceMode):
        return CHOICE_NAMES[choice]
    return {"type": "function", "name": choice}


def _text_format(prompt: Prompt) -> dict[str, Any] | None:
    if prompt.json_object:
        return {"format": {"type": "json_object"}}
    if prompt.json_schema is None:
        return None
    schema = prompt.json_schema
    return {"format": {
        "type": "json_schema", "name": schema_name(schema), "schema": orjson.loads(schema.schema),
        "strict": schema.strict,
    }}


def _reasoning(prompt: Prompt) -> dict[str, Any] | None:
    if prompt.reasoning_effort is None and not prompt.thinking:
        return None
    told: dict[str, Any] = {"summary": "auto"}
    if prompt.reasoning_effort is not None:
        told["effort"] = prompt.reasoning_effort.name.lower()
    return told


def _usage(told: dict[str, Any]) -> Usage:
    ins, outs = told.get("input_tokens_details") or {}, told.get("output_tokens_details") or {}
    return Usage(
        input_tokens=count_of(told, "input_tokens"), cached_input_tokens=count_of(ins, "cached_tokens"),
        cache_write_tokens=count_of(ins, "cache_write_tokens"), output_tokens=count_of(told, "output_tokens"),
        reasoning_tokens=count_of(outs, "reasoning_tokens"),
    )


def usage_from_json(told: Any) -> Usage | None:
    return usage_or_none(_usage, told)


class ResponsesDecoder:
    """Reads response.* events; unknown ones say nothing that a caller needs."""

    def __init__(self) -> None:
        self.is_finished = False
        self._numbers: dict[int, int] = {}
        """Tool calls are numbered by themselves, output items all together."""
        self._begun: set[int] = set()

    def add(self, chunk: UpstreamChunk, event: Any) -> None:
        try:
            self._add(chunk, event)
        except WRONG_SHAPE as error:
            raise Malformed("an event has another shape") from error

    def _add(self, chunk: UpstreamChunk, event: Any) -> None:
        kind = event["type"]
        if kind in TEXT_EVENTS:
            add_text(chunk, event["delta"])
        elif kind in REASONING_EVENTS:
            add_text(chunk, "", event["delta"])
        elif kind == "response.output_item.added" and event["item"]["type"] == "function_call":
            self._call(chunk, event, id_=event["item"].get("call_id"), name=event["item"].get("name"))
        elif kind == "response.function_call_arguments.delta":
            self._call(chunk, event, arguments=event["delta"])
        elif kind == "response.output_item.done" and event["item"]["type"] == "reasoning":
            _add_signature(chunk, event["item"])
        elif kind in END_EVENTS:
            self.is_finished = True
            _end(chunk, event["response"])
        elif kind == "error":
            raise failure_of(event.get("error") or event)

    def _call(self, chunk: UpstreamChunk, event: Any, *, id_: Any = "", name: Any = "", arguments: Any = "") -> None:
        number = self._numbers.setdefault(int(event["output_index"]), len(self._numbers))
        if number >= MOST_TOOL_CALLS or not isinstance(arguments, str):
            raise Malformed("a tool call of another shape")
        chunk.pieces += 1
        chunk.deltas.append(Delta(tool_call=ToolCallDelta(
            number, str(id_ or "")[:128], str(name or "")[:64], arguments
        )))


def _add_signature(chunk: UpstreamChunk, item: Any) -> None:
    if content := item.get("encrypted_content"):
        signature = orjson.dumps({"id": str(item.get("id")), "content": str(content)}).decode()
        chunk.deltas.append(Delta(signature=signature))


def _add_whole_item(chunk: UpstreamChunk, item: Any, position: int) -> None:
    match item["type"]:
        case "message":
            for part in item["content"]:
                add_text(chunk, part.get("text") or part.get("refusal") or "")
        case "reasoning":
            for part in item.get("summary") or ():
                add_text(chunk, "", part.get("text") or "")
            _add_signature(chunk, item)
        case "function_call":
            number = sum(1 for delta in chunk.deltas if delta.tool_call is not None)
            chunk.pieces += 1
            chunk.deltas.append(Delta(tool_call=ToolCallDelta(
                number, str(item.get("call_id") or "")[:128], str(item["name"])[:64], str(item["arguments"])
            )))
        case _:
            pass  # items of tools that the server runs itself


def _end(chunk: UpstreamChunk, response: Any) -> None:
    chunk.upstream_model = str(response.get("model") or "")[:128]
    chunk.usage = usage_from_json(response.get("usage"))
    if response.get("status") == "failed":
        raise failure_of(response.get("error") or {})
    incomplete = (response.get("incomplete_details") or {}).get("reason")
    asks = any(item.get("type") == "function_call" for item in response.get("output") or ())
    word = incomplete or ("tool_calls" if asks else str(response.get("status") or "completed"))
    set_finish(chunk, INCOMPLETE_REASONS, word)
