"""What the adapters of all HTTP providers share: what is posted, and how events and answers are read."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Any, Protocol

from llm_service.domain.chat import Delta, FinishReason, JsonSchema, Prompt
from llm_service.domain.deployment import Deployment
from llm_service.domain.quirks import Quirks
from llm_service.domain.structured_output import instructed, instructed_object
from llm_service.usecases.ports import Question, UpstreamChunk
from metering.usage import Usage

MOST_TOKENS = 1_000_000_000
MOST_TOOL_CALLS = 1024
WRONG_SHAPE = (AttributeError, IndexError, KeyError, TypeError, ValueError)
END_MARK = b"[DONE]"


class Malformed(Exception):
    """The JSON is not what the protocol promises."""


@dataclass(frozen=True, slots=True)
class Posted:
    """A request to a model server."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)
    query: dict[str, str] = field(default_factory=dict)


class Decoder(Protocol):
    """Reads the events of one stream. `is_finished`: the answer is complete."""

    is_finished: bool

    def add(self, chunk: UpstreamChunk, event: Any) -> None:
        """Adds what an event says. Raises UpstreamFailure for an error event, Malformed."""
        ...


class WireFormat(Protocol):
    """One provider's protocol."""

    def posted(self, deployment: Deployment, question: Question) -> Posted: ...

    def decoder(self, question: Question) -> Decoder: ...

    def read_answer(self, chunk: UpstreamChunk, document: Any, question: Question) -> None:
        """Adds a whole answer. Raises UpstreamFailure for an error object, Malformed."""
        ...


def key_headers(deployment: Deployment, quirks: Quirks, *, standard: str) -> dict[str, str]:
    if not deployment.api_key:
        return {}
    name = quirks.auth_header or standard
    return {"Authorization": f"Bearer {deployment.api_key}"} if name == "authorization" else {name: deployment.api_key}


def path_of(deployment: Deployment, quirks: Quirks, standard: str) -> str:
    return (quirks.path or standard).replace("{model}", deployment.upstream_model)


def with_defaults(body: dict[str, Any], deployment: Deployment, quirks: Quirks) -> dict[str, Any]:
    """The request with the model's default_params under it and without what the server refuses."""
    for name in quirks.drop_params:
        body.pop(name, None)
    for name, value in deployment.default_params.items():
        body.setdefault(name, value)
    return body


def fitted(prompt: Prompt, deployment: Deployment) -> Prompt:
    """Formats that the model server does not know are asked for in words."""
    if prompt.json_schema is not None and not deployment.can("json_schema"):
        return instructed(prompt, prompt.json_schema)
    if prompt.json_object and not deployment.can("json_object"):
        return instructed_object(prompt)
    return prompt


def data_url(mime_type: str, data: bytes) -> str:
    return f"data:{mime_type};base64,{base64.b64encode(data).decode()}"


def schema_name(schema: JsonSchema) -> str:
    return schema.name or "answer"


def count_of(told: Any, name: str) -> int:
    """A token count; 0 when absent. Raises ValueError for what is none."""
    value = told.get(name) if isinstance(told, dict) else None
    if value is None:
        return 0
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int or not 0 <= value <= MOST_TOKENS:
        raise ValueError(f"{name} is no token count")
    return value


def usage_or_none(make: Any, told: Any) -> Usage | None:
    """None when it is absent or no usage: it is counted here then."""
    if not isinstance(told, dict):
        return None
    try:
        usage: Usage | None = make(told)
    except WRONG_SHAPE:
        return None
    return usage


def add_text(chunk: UpstreamChunk, text: str, reasoning: str = "") -> None:
    """Several events that arrived in one read become one message."""
    if not isinstance(text, str) or not isinstance(reasoning, str):
        raise Malformed("the text of an event is no string")
    if not text and not reasoning:
        return
    chunk.pieces += 1
    last = chunk.deltas[-1] if chunk.deltas else None
    if last is not None and last.tool_call is None and not last.signature:
        chunk.deltas[-1] = Delta(text=last.text + text, reasoning=last.reasoning + reasoning)
    else:
        chunk.deltas.append(Delta(text=text, reasoning=reasoning))


def set_finish(chunk: UpstreamChunk, reasons: dict[str, FinishReason], told: Any) -> None:
    """A reason that nobody knows is kept in the server's words and counts as STOP: the answer is complete."""
    word = str(told)[:64]
    chunk.upstream_finish_reason = word
    chunk.finish_reason = reasons.get(word, FinishReason.STOP)
    chunk.is_unknown_finish = word not in reasons
