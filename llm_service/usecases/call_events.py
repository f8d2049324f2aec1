"""What a call is asked with, and what its caller is told while it runs."""

from __future__ import annotations

from dataclasses import dataclass

from llm_service.domain.call import Billing, CallRecord
from llm_service.domain.chat import Delta, Message, Prompt, TextPart, ToolCallDelta


@dataclass(frozen=True, slots=True)
class CallRequest:
    """A call to run. `deadline_seconds` is on the monotonic clock, None without one."""

    billing: Billing
    model: str
    prompt: Prompt
    max_output_tokens: int | None
    min_output_tokens: int
    deadline_seconds: float | None


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds from arrival."""

    hold: float
    first_token: float | None
    total: float


@dataclass(frozen=True, slots=True)
class Started:
    """The credit is held."""

    record: CallRecord
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class Finished:
    """The call's end, durable."""

    record: CallRecord
    timing: Timing


@dataclass(frozen=True, slots=True)
class Generated:
    """A whole answer and its call, durable."""

    record: CallRecord
    message: Message
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class Replay:
    """An earlier call of the same request, and its answer."""

    record: CallRecord
    message: Message


def deltas_of(message: Message) -> list[Delta]:
    """A whole message as deltas, as a stream would have brought it."""
    text = "".join(part.text for part in message.parts if isinstance(part, TextPart))
    deltas = [Delta(text=text, reasoning=message.reasoning)] if text or message.reasoning else []
    deltas += [
        Delta(tool_call=ToolCallDelta(index, call.id, call.name, call.arguments))
        for index, call in enumerate(message.tool_calls)
    ]
    return deltas
