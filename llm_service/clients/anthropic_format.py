"""Anthropic Messages as JSON: content blocks, tool use, thinking, cache reads and writes."""

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
    fitted,
    key_headers,
    path_of,
    set_finish,
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
    ReasoningEffort,
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

VERSION = "2023-06-01"
FINISH_REASONS = {
    "end_turn": FinishReason.STOP, "stop_sequence": FinishReason.STOP, "max_tokens": FinishReason.LENGTH,
    "tool_use": FinishReason.TOOL_CALLS, "refusal": FinishReason.CONTENT_FILTER,
    "model_context_window_exceeded": FinishReason.LENGTH,
}
CHOICE_NAMES = {ToolChoiceMode.AUTO: "auto", ToolChoiceMode.NONE: "none", ToolChoiceMode.REQUIRED: "any"}
LEAST_THINKING = 1024
"""The smallest budget that the protocol takes; it must stay below max_tokens."""
THINKING_BUDGETS = {
    ReasoningEffort.MINIMAL: 1024, ReasoningEffort.LOW: 2048, ReasoningEffort.MEDIUM: 8192, ReasoningEffort.HIGH: 24576,
}
_COUNTS = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")


class AnthropicFormat:
    """Implements WireFormat. The protocol has no place for `seed`, and a response format only in words."""

    def posted(self, deployment: Deployment, question: Question) -> Posted:
        quirks = effective(deployment.quirks)
        prompt = fitted(question.prompt, deployment)
        body: dict[str, Any] = {
            "model": deployment.upstream_model, "max_tokens": question.max_output_tokens,
            "messages": _messages(prompt),
        }
        if not question.whole:
            body["stream"] = True
        thinking = _thinking(prompt, question.max_output_tokens)
        optional = {
            "system": _system(prompt), "thinking": thinking,
            # Thinking goes with the default temperature only.
            "temperature": None if thinking or prompt.temperature is None else min(1.0, prompt.temperature),
            "top_p": prompt.top_p if thinking is None else None, "stop_sequences": list(prompt.stop) or None,
            "tools": [_tool(tool) for tool in prompt.tools] or None, "tool_choice": _tool_choice(prompt),
        }
        body.update({name: value for name, value in optional.items() if value is not None})
        headers = {"anthropic-version": VERSION, **key_headers(deployment, quirks, standard="x-api-key")}
        return Posted(
            path_of(deployment, quirks, "/messages"), with_defaults(body, deployment, quirks), headers,
            {"api-version": quirks.api_version} if quirks.api_version else {},
        )

    def decoder(self, question: Question) -> MessagesDecoder:
        return MessagesDecoder()

    def read_answer(self, chunk: UpstreamChunk, document: Any, question: Question) -> None:
        try:
            if document.get("type") == "error":
                raise failure_of(document.get("error"))
            decoder = MessagesDecoder()
            decoder.begin(chunk, document)
            for index, block in enumerate(document["content"]):
                decoder.whole_block(chunk, index, block)
            set_finish(chunk, FINISH_REASONS, document.get("stop_reason") or "end_turn")
        except WRONG_SHAPE as error:
            raise Malformed("the answer has another shape") from error


def _system(prompt: Prompt) -> str | None:
    texts = [
        part.text for message in prompt.messages if message.role in (Role.SYSTEM, Role.DEVELOPER)
        for part in message.parts if isinstance(part, TextPart)
    ]
    return "\n\n".join(texts) or None


def _messages(prompt: Prompt) -> list[dict[str, Any]]:
    """Two speakers in turn: tools answer as the user, and what follows from the same speaker joins in."""
    told: list[dict[str, Any]] = []
    for message in prompt.messages:
        if message.role in (Role.SYSTEM, Role.DEVELOPER):
            continue
        role = "assistant" if message.role is Role.ASSISTANT else "user"
        blocks = _blocks(message)
        if told and told[-1]["role"] == role:
            told[-1]["content"] += blocks
        elif blocks:
            told.append({"role": role, "content": blocks})
    if not told or told[0]["role"] != "user":
        told.insert(0, {"role": "user", "content": [{"type": "text", "text": "."}]})
    return told


def _blocks(message: Message) -> list[dict[str, Any]]:
    content = [_part(part) for part in message.parts if not (isinstance(part, TextPart) and not part.text)]
    if message.role is Role.TOOL:
        return [{"type": "tool_result", "tool_use_id": message.tool_call_id, "content": content}]
    blocks: list[dict[str, Any]] = []
    if message.reasoning_signature and not message.reasoning_signature.startswith("{"):
        blocks.append({
            "type": "thinking", "thinking": message.reasoning, "signature": message.reasoning_signature
        })
    blocks += content
    blocks += [
        {"type": "tool_use", "id": call.id, "name": call.name, "input": _arguments(call.arguments)}
        for call in message.tool_calls
    ]
    return blocks


def _arguments(text: str) -> Any:
    """An object, whatever a model once wrote."""
    try:
        told = orjson.loads(text or "{}")
    except orjson.JSONDecodeError:
        return {}
    return told if isinstance(told, dict) else {}


def _part(part: Part) -> dict[str, Any]:
    match part:
        case TextPart(text):
            return {"type": "text", "text": text}
        case ImagePart(url, data, mime_type, _):
            if url.startswith("data:"):
                mime_type, _, text = url.removeprefix("data:").partition(";base64,")
                source = {"type": "base64", "media_type": mime_type, "data": text}
            elif url:
                source = {"type": "url", "url": url}
            else:
                source = _base64(mime_type, data)
            return {"type": "image", "source": source}
        case FilePart(data, filename, mime_type):
            return {"type": "document", "source": _base64(mime_type, data), "title": filename}
        case AudioPart():
            raise UpstreamFailure(
                "UPSTREAM_REJECTED", "the protocol takes no sound", kind=FailureKind.REJECTED
            )


def _base64(mime_type: str, data: bytes) -> dict[str, Any]:
    return {"type": "base64", "media_type": mime_type, "data": base64.b64encode(data).decode()}


def _tool(tool: Any) -> dict[str, Any]:
    told: dict[str, Any] = {
        "name": tool.name,
        "input_schema": orjson.loads(tool.parameters) if tool.parameters else {"type": "object", "properties": {}},
    }
    if tool.description:
        told["description"] = tool.description
    return told


def _tool_choice(prompt: Prompt) -> dict[str, Any] | None:
    if not prompt.tools:
        return None
    choice = prompt.tool_choice
    told: dict[str, Any] = {"type": "auto"}
    if isinstance(choice, ToolChoiceMode):
        told = {"type": CHOICE_NAMES[choice]}
    elif choice is not None:
        told = {"type": "tool", "name": choice}
    if prompt.parallel_tool_calls is False and told["type"] != "none":
        told["disable_parallel_tool_use"] = True
    return told if choice is not None or len(told) > 1 else None


def _thinking(prompt: Prompt, max_output_tokens: int) -> dict[str, Any] | None:
    if prompt.thinking is False:
        return {"type": "disabled"} if prompt.reasoning_effort else None
    if prompt.thinking is None and prompt.reasoning_effort in (None, ReasoningEffort.MINIMAL):
        return None
    if max_output_tokens <= LEAST_THINKING:
        return None
    wanted = THINKING_BUDGETS[prompt.reasoning_effort or ReasoningEffort.MEDIUM]
    return {"type": "enabled", "budget_tokens": max(LEAST_THINKING, min(wanted, max_output_tokens // 2))}


class MessagesDecoder:
    """Reads message_* and content_block_* events. Usage is cumulative, field by field."""

    def __init__(self) -> None:
        self.is_finished = False
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._tools: dict[int, int] = {}
        """Numbers of the tool calls by the numbers of their blocks."""

    def add(self, chunk: UpstreamChunk, event: Any) -> None:
        try:
            self._add(chunk, event)
        except WRONG_SHAPE as error:
            raise Malformed("an event has another shape") from error

    def _add(self, chunk: UpstreamChunk, event: Any) -> None:
        match event["type"]:
            case "content_block_delta":
                self._delta(chunk, int(event["index"]), event["delta"])
            case "content_block_start":
                self._begin_block(chunk, int(event["index"]), event["content_block"])
            case "message_start":
                self.begin(chunk, event["message"])
            case "message_delta":
                if stop := event["delta"].get("stop_reason"):
                    set_finish(chunk, FINISH_REASONS, stop)
                self._take_usage(chunk, event.get("usage"))
            case "message_stop":
                self.is_finished = True
            case "error":
                raise failure_of(event.get("error"))
            case _:
                pass  # ping, content_block_stop, and what comes later

    def begin(self, chunk: UpstreamChunk, message: Any) -> None:
        chunk.upstream_model = str(message.get("model") or "")[:128]
        self._take_usage(chunk, message.get("usage"))

    def whole_block(self, chunk: UpstreamChunk, index: int, block: Any) -> None:
        self._begin_block(chunk, index, {**block, "text": "", "thinking": "", "signature": ""})
        match block["type"]:
            case "text":
                add_text(chunk, block["text"])
            case "thinking":
                add_text(chunk, "", block["thinking"])
                if block.get("signature"):
                    chunk.deltas.append(Delta(signature=str(block["signature"])))
            case "tool_use":
                arguments = orjson.dumps(block["input"]).decode()
                chunk.deltas.append(Delta(tool_call=ToolCallDelta(self._tools[index], arguments=arguments)))
            case _:
                pass

    def _begin_block(self, chunk: UpstreamChunk, index: int, block: Any) -> None:
        if block["type"] == "tool_use":
            number = self._tools.setdefault(index, len(self._tools))
            if number >= MOST_TOOL_CALLS:
                raise Malformed("too many tool calls")
            chunk.pieces += 1
            chunk.deltas.append(Delta(tool_call=ToolCallDelta(
                number, str(block.get("id") or "")[:128], str(block.get("name") or "")[:64]
            )))
        else:
            add_text(chunk, block.get("text") or "", block.get("thinking") or "")

    def _delta(self, chunk: UpstreamChunk, index: int, delta: Any) -> None:
        match delta["type"]:
            case "text_delta":
                add_text(chunk, delta["text"])
            case "thinking_delta":
                add_text(chunk, "", delta["thinking"])
            case "input_json_delta":
                chunk.pieces += 1
                chunk.deltas.append(Delta(tool_call=ToolCallDelta(
                    self._tools[index], arguments=str(delta["partial_json"])
                )))
            case "signature_delta":
                chunk.deltas.append(Delta(signature=str(delta["signature"])))
            case _:
                pass  # citations

    def _take_usage(self, chunk: UpstreamChunk, told: Any) -> None:
        if not isinstance(told, dict):
            return
        for name in _COUNTS:
            if told.get(name) is not None:
                self._counts[name] = count_of(told, name)
        plain, output, cached, written = (self._counts[name] for name in _COUNTS)
        # Its input leaves out what was read from and written to the cache; ours includes both.
        chunk.usage = Usage(
            input_tokens=plain + cached + written, cached_input_tokens=cached, cache_write_tokens=written,
            output_tokens=output,
        )
