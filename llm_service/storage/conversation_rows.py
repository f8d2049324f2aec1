"""Conversations and messages <-> rows. Content is kept in the form that the box gives it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID

from psycopg.types.json import Jsonb

from llm_service.domain.chat import FinishReason, Message, Role
from llm_service.domain.conversation import Conversation, ConversationStatus, MessageState, Place, StoredMessage
from llm_service.storage.content import ContentBox

Key = tuple[str, UUID]
"""(user_id, conversation_id)"""


class ConversationRows:
    """Turns rows into what they mean, and back."""

    def __init__(
        self, box: ContentBox, *, message_to_bytes: Callable[[Message], bytes],
        message_from_bytes: Callable[[bytes], Message],
    ) -> None:
        self._box = box
        self._message_to_bytes = message_to_bytes
        self._message_from_bytes = message_from_bytes

    def pack_text(self, text: str, conversation_id: UUID) -> bytes:
        return self._box.pack(text.encode(), conversation_id=conversation_id) if text else b""

    def unpack_text(self, packed: bytes | None, conversation_id: UUID) -> str:
        return self._box.unpack(bytes(packed), conversation_id=conversation_id).decode() if packed else ""

    def conversation(self, row: dict[str, Any]) -> Conversation:
        conversation_id = row["conversation_id"]
        return Conversation(
            user_id=row["user_id"], conversation_id=conversation_id, title=row["title"],
            system_prompt=self.unpack_text(row["system_prompt"], conversation_id), model=row["model"],
            use_memories=row["use_memories"], compact_history=row["compact_history"],
            status=ConversationStatus(row["status"]), head=Place(row["branch"], row["length"]),
            branches=row["branches"], message_count=row["message_count"], tokens_total=row["tokens_total"],
            credit_micros_total=row["credit_micros_total"], created_at=row["created_at"],
            last_message_at=row["last_message_at"], head_message_id=row["head_message_id"],
            running_call_id=row["running_call_id"], running_request_id=row["running_request_id"] or "",
            running_until=row["running_until"], summary=self.unpack_text(row["summary"], conversation_id),
            summary_at=Place(row["summary_branch"], row["summary_until"]),
        )

    def stored(self, row: dict[str, Any]) -> StoredMessage:
        content = bytes(row["content"])
        message = Message(Role(row["role"]))
        if content:
            message = self._message_from_bytes(self._box.unpack(content, conversation_id=row["conversation_id"]))
        return StoredMessage(
            message_id=row["message_id"], place=Place(row["branch"], row["position"]), message=message,
            state=MessageState(row["state"]), created_at=row["created_at"], request_id=row["request_id"],
            parent_message_id=row["parent_message_id"], prompt_tokens=row["prompt_tokens"],
            token_family=row["token_family"], tokens_consumed=row["tokens_consumed"],
            credit_micros=row["credit_micros"], call_id=row["call_id"],
            finish_reason=FinishReason(row["finish_reason"]), memory_ids=tuple(row["memory_ids"]),
        )

    def to_row(
        self, key: Key, stored: StoredMessage, *, call_id: UUID | None = None, fingerprint: bytes | None = None
    ) -> tuple[Any, ...]:
        content = b""
        if stored.state is not MessageState.PENDING:
            content = self._box.pack(self._message_to_bytes(stored.message), conversation_id=key[1])
        return (
            *key, stored.place.branch, stored.place.position, stored.message_id, stored.parent_message_id,
            int(stored.message.role), int(stored.state), content, stored.prompt_tokens, stored.token_family, call_id,
            stored.request_id, fingerprint, Jsonb(list(stored.memory_ids)), stored.created_at,
        )
