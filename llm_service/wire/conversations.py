"""Conversations as they travel."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from creditmesh.llm.v1 import chat_pb2, conversation_service_pb2, llm_service_pb2

from llm_service.domain.chat import Delta
from llm_service.domain.conversation import Conversation, ConversationStatus, StoredMessage
from llm_service.usecases.manage_conversations import CHANGEABLE, ConversationDraft
from llm_service.usecases.send_message import SendRequest, TurnFinished, TurnStarted
from llm_service.wire.calls import finished_to_proto, started_to_proto
from llm_service.wire.chat import (
    content_to_proto,
    delta_to_proto,
    options_from_proto,
    output_tokens_from_proto,
    part_from_proto,
    tool_calls_to_proto,
)
from servicekit.core.errors import InvalidField
from servicekit.core.ids import IdSource
from servicekit.rpc.times import timestamp_to_proto


def draft_from_proto(request: conversation_service_pb2.CreateConversationRequest) -> ConversationDraft:
    return ConversationDraft(
        user_id=request.user_id, title=request.title.strip(), system_prompt=request.system_prompt, model=request.model,
        use_memories=request.use_memories, compact_history=request.compact_history,
    )


def changes_from_proto(conversation: conversation_service_pb2.Conversation, paths: Sequence[str]) -> dict[str, Any]:
    """Raises InvalidField."""
    changes: dict[str, Any] = {}
    for path in paths:
        if path not in CHANGEABLE:
            raise InvalidField.of("update_mask", f"{path} can not be changed")
        changes[path] = getattr(conversation, path)
    if not changes:
        raise InvalidField.of("update_mask", "must name what to change")
    if "status" in changes:
        if not changes["status"]:
            raise InvalidField.of("conversation.status", "must be given")
        changes["status"] = ConversationStatus(changes["status"])
    if "title" in changes:
        changes["title"] = changes["title"].strip()
    if "head_message_id" in changes:
        try:
            changes["head_message_id"] = UUID(changes["head_message_id"])
        except ValueError:
            raise InvalidField.of("conversation.head_message_id", "must be a UUID") from None
    return changes


def conversation_to_proto(conversation: Conversation) -> conversation_service_pb2.Conversation:
    return conversation_service_pb2.Conversation(
        conversation_id=str(conversation.conversation_id), user_id=conversation.user_id, title=conversation.title,
        has_title=bool(conversation.title), system_prompt=conversation.system_prompt, model=conversation.model,
        use_memories=conversation.use_memories, compact_history=conversation.compact_history,
        message_count=conversation.message_count, tokens_total=conversation.tokens_total,
        credit_micros_total=conversation.credit_micros_total,
        last_message_at=timestamp_to_proto(conversation.last_message_at),
        status=conversation_service_pb2.ConversationStatus.ValueType(conversation.status),
        created_at=timestamp_to_proto(conversation.created_at),
        head_message_id=str(conversation.head_message_id or ""),
        running_call_id=str(conversation.running_call_id or ""),
    )


def stored_message_to_proto(stored: StoredMessage, conversation_id: str) -> conversation_service_pb2.StoredMessage:
    message = stored.message
    return conversation_service_pb2.StoredMessage(
        message_id=str(stored.message_id), conversation_id=conversation_id,
        role=chat_pb2.Role.ValueType(message.role), content=[content_to_proto(part) for part in message.parts],
        reasoning=message.reasoning, tokens_consumed=stored.tokens_consumed, credit_micros=stored.credit_micros,
        call_id=str(stored.call_id or ""), created_at=timestamp_to_proto(stored.created_at),
        parent_message_id=str(stored.parent_message_id or ""), tool_calls=tool_calls_to_proto(message),
        tool_call_id=message.tool_call_id,
        state=conversation_service_pb2.MessageState.ValueType(stored.state),
        finish_reason=chat_pb2.FinishReason.ValueType(stored.finish_reason), request_id=stored.request_id,
        memory_ids=stored.memory_ids,
    )


def send_request_from_proto(
    request: conversation_service_pb2.SendMessageRequest, *, deadline_seconds: float | None, traceparent: str,
    ids: IdSource,
) -> SendRequest:
    """Raises InvalidField."""
    if request.HasField("parent_message_id") and not request.content:
        raise InvalidField.of("parent_message_id", "goes together with content")
    most, least = output_tokens_from_proto(request)
    return SendRequest(
        user_id=request.user_id, conversation_id=UUID(request.conversation_id),
        request_id=request.request_id or str(ids.new_id()),
        fingerprint=hashlib.sha256(request.SerializeToString(deterministic=True)).digest(),
        prompt=options_from_proto(request), parts=tuple(map(part_from_proto, request.content)),
        tool_results=tuple(
            (each.tool_call_id, tuple(map(part_from_proto, each.content))) for each in request.tool_results
        ),
        regenerate=UUID(request.regenerate_message_id) if request.regenerate_message_id else None,
        parent=request.parent_message_id if request.HasField("parent_message_id") else None, model=request.model,
        max_output_tokens=most, min_output_tokens=least,
        deadline_seconds=deadline_seconds, traceparent=traceparent, labels=dict(request.labels),
    )


def turn_event_to_proto(event: TurnStarted | Delta | TurnFinished) -> conversation_service_pb2.SendMessageResponse:
    if isinstance(event, Delta):
        return conversation_service_pb2.SendMessageResponse(delta=delta_to_proto(event).delta)
    if isinstance(event, TurnStarted):
        started = started_to_proto(event.started).started
        history = event.history
        started.history.CopyFrom(llm_service_pb2.ShownHistory(
            messages=len(history.messages) - history.summarised, dropped_messages=history.dropped,
            summarised=history.summarised, memory_use=llm_service_pb2.MemoryUse.ValueType(event.memory_use),
            memory_ids=event.memory_ids,
        ))
        return conversation_service_pb2.SendMessageResponse(started=started)
    finished = finished_to_proto(event.finished).finished
    finished.message_id = str(event.message_id)
    finished.user_message_id = str(event.user_message_id or "")
    return conversation_service_pb2.SendMessageResponse(finished=finished)
