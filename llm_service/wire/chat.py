"""Prompts, messages and deltas as they travel."""

from __future__ import annotations

import json
from typing import Any

from creditmesh.llm.v1 import chat_pb2, conversation_service_pb2, llm_service_pb2

from llm_service.domain.chat import (
    AudioPart,
    Delta,
    FilePart,
    ImagePart,
    JsonSchema,
    Message,
    Part,
    Prompt,
    ReasoningEffort,
    Role,
    TextPart,
    Tool,
    ToolCall,
    ToolChoiceMode,
)
from llm_service.domain.structured_output import BadSchema, check_schema
from llm_service.usecases.ports import StoredAnswer, Vectors
from servicekit.core.errors import InvalidField

AnyCallRequest = llm_service_pb2.GenerateRequest | llm_service_pb2.StreamRequest
WithOptions = AnyCallRequest | conversation_service_pb2.SendMessageRequest
OPTIONS = frozenset({
    "temperature", "top_p", "stop", "seed", "tools", "tool_choice", "response_format", "reasoning_effort", "thinking",
    "parallel_tool_calls", "metadata",
})


def prompt_from_proto(request: AnyCallRequest) -> Prompt:
    """Raises InvalidField for what the rules in the proto files can not say."""
    return options_from_proto(request, messages_from_proto(request.messages))


def options_from_proto(request: WithOptions, messages: tuple[Message, ...] = ()) -> Prompt:
    """Everything but the messages. Raises InvalidField."""
    told: dict[str, Any] = {field.name: value for field, value in request.ListFields()}
    if told.keys().isdisjoint(OPTIONS):
        return Prompt(messages)
    form = request.response_format.WhichOneof("format") if "response_format" in told else None
    return Prompt(
        messages=messages,
        temperature=told.get("temperature"),
        top_p=told.get("top_p"),
        stop=tuple(request.stop),
        seed=told.get("seed"),
        tools=tuple(_tool_from_proto(tool, index) for index, tool in enumerate(request.tools)),
        tool_choice=_tool_choice_from_proto(request),
        json_object=form == "json_object",
        json_schema=_schema_from_proto(request.response_format.json_schema) if form == "json_schema" else None,
        reasoning_effort=ReasoningEffort(request.reasoning_effort) if request.reasoning_effort else None,
        thinking=None if not request.thinking else request.thinking == chat_pb2.THINKING_ENABLED,
        parallel_tool_calls=told.get("parallel_tool_calls"),
        metadata=dict(request.metadata),
    )


def output_tokens_from_proto(request: WithOptions) -> tuple[int | None, int]:
    """Most and fewest output tokens wanted. Raises InvalidField when they contradict each other."""
    most = request.max_output_tokens if request.HasField("max_output_tokens") else None
    least = request.min_output_tokens if request.HasField("min_output_tokens") else 1
    if most is not None and least > most:
        # Here and not a rule in the proto file: an expression there nearly doubles what checking a request costs.
        raise InvalidField.of("min_output_tokens", "must not be above max_output_tokens")
    return most, least


def messages_from_proto(messages: object) -> tuple[Message, ...]:
    """Raises InvalidField."""
    return tuple(_message_from_proto(message, index) for index, message in enumerate(messages))  # type: ignore[arg-type,var-annotated]  # protobuf's containers


def _message_from_proto(message: chat_pb2.Message, index: int) -> Message:
    field = f"messages[{index}]"
    if message.tool_calls and message.role != chat_pb2.ROLE_ASSISTANT:
        raise InvalidField.of(f"{field}.tool_calls", "only an assistant's message has tool calls")
    if bool(message.tool_call_id) != (message.role == chat_pb2.ROLE_TOOL):
        raise InvalidField.of(f"{field}.tool_call_id", "goes together with ROLE_TOOL")
    if not message.content and not message.tool_calls:
        raise InvalidField.of(f"{field}.content", "must not be empty")
    return _read(message)


def _read(message: chat_pb2.Message) -> Message:
    return Message(
        role=Role(message.role), parts=tuple([part_from_proto(part) for part in message.content]), name=message.name,
        tool_calls=tuple([ToolCall(call.id, call.name, call.arguments) for call in message.tool_calls]),
        tool_call_id=message.tool_call_id, reasoning=message.reasoning,
        reasoning_signature=message.reasoning_signature,
    )


def part_from_proto(part: chat_pb2.Content) -> Part:
    match part.WhichOneof("part"):
        case "image":
            image = part.image
            return ImagePart(image.url, image.data, image.mime_type or "image/png", image.detail)
        case "audio":
            return AudioPart(part.audio.data, part.audio.format)
        case "file":
            return FilePart(part.file.data, part.file.filename, part.file.mime_type)
        case _:
            return TextPart(part.text)


def _tool_from_proto(tool: chat_pb2.Tool, index: int) -> Tool:
    parameters = _checked_json(tool.parameters, f"tools[{index}].parameters") if tool.parameters else ""
    return Tool(tool.name, tool.description, parameters, tool.strict)


def _schema_from_proto(schema: chat_pb2.JsonSchemaFormat) -> JsonSchema:
    field = "response_format.json_schema.schema"
    text = _checked_json(schema.schema, field)
    try:
        check_schema(text)
    except BadSchema:
        raise InvalidField.of(field, "must be a JSON Schema") from None
    return JsonSchema(schema.name, text, schema.strict)


def _tool_choice_from_proto(request: WithOptions) -> ToolChoiceMode | str | None:
    if not request.HasField("tool_choice"):
        return None
    match request.tool_choice.WhichOneof("choice"):
        case "mode":
            return ToolChoiceMode(request.tool_choice.mode)
        case "function_name":
            name = request.tool_choice.function_name
            if name not in {tool.name for tool in request.tools}:
                raise InvalidField.of("tool_choice.function_name", "is none of the tools")
            return name
        case _:
            return None


def _checked_json(text: str, field: str) -> str:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidField.of(field, "must be JSON") from None
    if not isinstance(document, dict):
        raise InvalidField.of(field, "must be a JSON object")
    return text


def message_to_proto(message: Message) -> chat_pb2.Message:
    return chat_pb2.Message(
        role=chat_pb2.Role.ValueType(message.role), content=[content_to_proto(part) for part in message.parts],
        name=message.name, tool_calls=tool_calls_to_proto(message), tool_call_id=message.tool_call_id,
        reasoning=message.reasoning, reasoning_signature=message.reasoning_signature,
    )


def content_to_proto(part: Part) -> chat_pb2.Content:
    match part:
        case ImagePart(url, data, mime_type, detail):
            image = chat_pb2.Image(mime_type=mime_type, detail=detail)
            if data:
                image.data = data
            else:
                image.url = url
            return chat_pb2.Content(image=image)
        case AudioPart(data, form):
            return chat_pb2.Content(audio=chat_pb2.Audio(data=data, format=form))
        case FilePart(data, filename, mime_type):
            return chat_pb2.Content(file=chat_pb2.File(data=data, filename=filename, mime_type=mime_type))
        case TextPart(text):
            return chat_pb2.Content(text=text)


def tool_calls_to_proto(message: Message) -> list[chat_pb2.ToolCall]:
    return [chat_pb2.ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in message.tool_calls]


def message_to_bytes(message: Message) -> bytes:
    """As it is kept."""
    return message_to_proto(message).SerializeToString()


def message_from_bytes(data: bytes) -> Message:
    return _read(chat_pb2.Message.FromString(data))


MESSAGE, VECTORS = b"m", b"v"


def answer_to_bytes(answer: StoredAnswer) -> bytes:
    """One letter for what it is, and the message of that kind."""
    if answer.vectors:
        embeddings = vectors_to_proto(answer.vectors)
        return VECTORS + llm_service_pb2.EmbedResponse(embeddings=embeddings).SerializeToString()
    return MESSAGE + message_to_bytes(answer.message)


def answer_from_bytes(data: bytes) -> StoredAnswer:
    kind, body = data[:1], data[1:]
    if kind == VECTORS:
        answer = llm_service_pb2.EmbedResponse.FromString(body)
        return StoredAnswer(vectors=tuple(tuple(each.values) for each in answer.embeddings))
    return StoredAnswer(message_from_bytes(body))


def vectors_to_proto(vectors: Vectors) -> list[llm_service_pb2.Embedding]:
    return [llm_service_pb2.Embedding(index=index, values=values) for index, values in enumerate(vectors)]


def delta_to_proto(delta: Delta) -> llm_service_pb2.StreamResponse:
    if delta.tool_call is None:
        return llm_service_pb2.StreamResponse(delta=llm_service_pb2.Delta(
            text=delta.text, reasoning=delta.reasoning, reasoning_signature=delta.signature
        ))
    call = delta.tool_call
    return llm_service_pb2.StreamResponse(delta=llm_service_pb2.Delta(
        text=delta.text, reasoning=delta.reasoning,
        tool_call_delta=llm_service_pb2.ToolCallDelta(
            index=call.index, id=call.id, name=call.name, arguments=call.arguments
        ),
    ))
