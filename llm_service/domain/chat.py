"""What is asked of a model, and what it says."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum


class Role(IntEnum):
    """Who speaks; numbers as on the wire."""

    SYSTEM = 1
    DEVELOPER = 2
    USER = 3
    ASSISTANT = 4
    TOOL = 5


class FinishReason(IntEnum):
    """Why an answer ended; numbers as on the wire."""

    UNSPECIFIED = 0
    STOP = 1
    LENGTH = 2
    TOOL_CALLS = 3
    CONTENT_FILTER = 4
    CREDIT_EXHAUSTED = 5
    CANCELLED = 6
    DEADLINE = 7
    UPSTREAM_ERROR = 8


class ToolChoiceMode(IntEnum):
    """How the model chooses tools; numbers as on the wire."""

    AUTO = 1
    NONE = 2
    REQUIRED = 3


class ReasoningEffort(IntEnum):
    """How much to reason; numbers as on the wire."""

    MINIMAL = 1
    LOW = 2
    MEDIUM = 3
    HIGH = 4


@dataclass(frozen=True, slots=True)
class TextPart:
    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """By `url`, or by `data` with its MIME type."""

    url: str
    data: bytes
    mime_type: str
    detail: str


@dataclass(frozen=True, slots=True)
class AudioPart:
    data: bytes
    format: str


@dataclass(frozen=True, slots=True)
class FilePart:
    data: bytes
    filename: str
    mime_type: str


Part = TextPart | ImagePart | AudioPart | FilePart


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`arguments` is a JSON string, as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    parts: tuple[Part, ...] = ()
    name: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    reasoning: str = ""
    reasoning_signature: str = ""


@dataclass(frozen=True, slots=True)
class Tool:
    """`parameters` is a JSON Schema as a JSON string, empty for none."""

    name: str
    description: str
    parameters: str
    strict: bool


@dataclass(frozen=True, slots=True)
class JsonSchema:
    name: str
    schema: str
    strict: bool


@dataclass(frozen=True, slots=True)
class Prompt:
    """Everything that a model is asked with; None = the model server's default."""

    messages: tuple[Message, ...]
    temperature: float | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoiceMode | str | None = None
    json_object: bool = False
    json_schema: JsonSchema | None = None
    reasoning_effort: ReasoningEffort | None = None
    thinking: bool | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of tool call `index`; id and name come with its first piece."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer."""

    text: str = ""
    reasoning: str = ""
    tool_call: ToolCallDelta | None = None
    signature: str = ""
    """A piece of what the model server signed its reasoning with."""


@dataclass(slots=True)
class Answer:
    """An answer as far as it has come."""

    texts: list[str] = field(default_factory=list)
    reasonings: list[str] = field(default_factory=list)
    tool_calls: dict[int, tuple[str, str, list[str]]] = field(default_factory=dict)
    signatures: list[str] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        if delta.text:
            self.texts.append(delta.text)
        if delta.reasoning:
            self.reasonings.append(delta.reasoning)
        if delta.signature:
            self.signatures.append(delta.signature)
        if delta.tool_call is not None:
            piece = delta.tool_call
            known_id, known_name, arguments = self.tool_calls.get(piece.index, ("", "", []))
            arguments.append(piece.arguments)
            self.tool_calls[piece.index] = (known_id or piece.id, known_name or piece.name, arguments)

    @property
    def is_empty(self) -> bool:
        return not (self.texts or self.reasonings or self.tool_calls)

    def message(self) -> Message:
        text = "".join(self.texts)
        return Message(
            role=Role.ASSISTANT,
            parts=(TextPart(text),) if text else (),
            tool_calls=tuple(
                ToolCall(id_, name, "".join(arguments)) for _, (id_, name, arguments) in sorted(self.tool_calls.items())
            ),
            reasoning="".join(self.reasonings), reasoning_signature="".join(self.signatures),
        )
