"""What a call is asked with, and what its caller is told while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from uuid import UUID

from llm_service.domain.call import Billing, CallRecord
from llm_service.domain.chat import Delta, Message, Prompt, TextPart, ToolCallDelta
from llm_service.domain.conversation import Turn
from llm_service.usecases.ports import StoredAnswer, Vectors


@dataclass(frozen=True, slots=True)
class CallRequest:
    """A call to run. `deadline_seconds` is on the monotonic clock, None without one."""

    billing: Billing
    model: str
    prompt: Prompt
    max_output_tokens: int | None
    min_output_tokens: int
    deadline_seconds: float | None
    store: bool = True
    inputs: tuple[str, ...] = ()
    """Texts to embed; the prompt is empty then."""
    dimensions: int | None = None
    traceparent: str = ""
    call_id: UUID | None = None
    """Given where something refers to the call before it begins."""
    turn: Turn | None = None
    """The round of a conversation that the call answers."""
    summary_until: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds from arrival."""

    hold: float
    first_token: float | None
    total: float
    queue: float = 0.0


@dataclass(frozen=True, slots=True)
class Started:
    """The credit is held."""

    record: CallRecord
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class Finished:
    """The call's end, durable. `fallback`: another model than the first choice answered."""

    record: CallRecord
    timing: Timing
    fallback: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Generated:
    """A whole answer and its call, durable."""

    record: CallRecord
    message: Message
    replayed: bool = False
    vectors: Vectors = ()
    timing: Timing | None = None
    fallback: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Replay:
    """An earlier call of the same request, and its answer."""

    record: CallRecord
    answer: StoredAnswer


def deltas_of(message: Message) -> list[Delta]:
    """A whole message as deltas, as a stream would have brought it."""
    text = "".join(part.text for part in message.parts if isinstance(part, TextPart))
    deltas = [Delta(text=text, reasoning=message.reasoning)] if text or message.reasoning else []
    if message.reasoning_signature:
        deltas.append(Delta(signature=message.reasoning_signature))
    deltas += [
        Delta(tool_call=ToolCallDelta(index, call.id, call.name, call.arguments))
        for index, call in enumerate(message.tool_calls)
    ]
    return deltas
