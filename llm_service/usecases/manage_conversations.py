"""Conversations apart from what is said in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from llm_service.domain.conversation import (
    Conversation,
    ConversationStatus,
    Place,
    StoredMessage,
    path_of,
    slice_of,
)
from llm_service.domain.errors import ConversationBusy, ConversationNotFound, MessageNotFound
from llm_service.usecases.conversation_ports import ConversationStore
from llm_service.usecases.running_calls import RunningCalls
from servicekit.core.clock import Clock
from servicekit.core.ids import IdSource
from servicekit.core.page_token import decode_page_token, decode_time_token, encode_page_token

CHANGEABLE = frozenset({
    "title", "system_prompt", "model", "use_memories", "compact_history", "status", "head_message_id",
})


@dataclass(frozen=True, slots=True)
class ConversationDraft:
    """A conversation to begin."""

    user_id: str
    title: str
    system_prompt: str
    model: str
    use_memories: bool
    compact_history: bool


class Conversations:
    """Creates, finds, changes, erases."""

    def __init__(self, store: ConversationStore, running: RunningCalls, *, clock: Clock, ids: IdSource) -> None:
        self._store = store
        self._running = running
        self._clock = clock
        self._ids = ids

    async def create(self, draft: ConversationDraft, *, idempotency_key: str) -> Conversation:
        now = self._clock.now()
        return await self._store.create(
            Conversation(
                user_id=draft.user_id, conversation_id=self._ids.new_id(), title=draft.title,
                system_prompt=draft.system_prompt, model=draft.model, use_memories=draft.use_memories,
                compact_history=draft.compact_history, status=ConversationStatus.ACTIVE, head=Place(0, 0), branches=1,
                message_count=0, tokens_total=0, credit_micros_total=0, created_at=now, last_message_at=now,
            ),
            idempotency_key=idempotency_key,
        )

    async def get(self, user_id: str, conversation_id: UUID) -> Conversation:
        return _found(await self._store.get(user_id, conversation_id))

    async def list_conversations(
        self, user_id: str, *, title_contains: str, status: ConversationStatus | None, page_size: int, page_token: str
    ) -> tuple[list[Conversation], str]:
        question = ("conversations", user_id, title_contains, status)
        key = decode_time_token(page_token, question=question)
        before: tuple[datetime, UUID] | None = (key[0], UUID(key[1])) if key else None
        found = await self._store.list_conversations(
            user_id, title_contains=title_contains, status=status, before=before, limit=page_size + 1
        )
        token = ""
        if len(found) > page_size:
            last = found[page_size - 1]
            token = encode_page_token(
                [last.last_message_at.isoformat(), str(last.conversation_id)], question=question
            )
        return found[:page_size], token

    async def update(self, user_id: str, conversation_id: UUID, changes: dict[str, Any]) -> Conversation:
        """`changes`: names of CHANGEABLE and their values. Raises ConversationNotFound, MessageNotFound."""
        if "head_message_id" in changes:
            current = _found(await self._store.get(user_id, conversation_id))
            if current.running_call_id is not None:
                raise ConversationBusy(
                    "an answer is under way in this conversation", retry_after_seconds=1.0,
                    call_id=str(current.running_call_id),
                )
            head = await self._store.message(user_id, conversation_id, changes["head_message_id"])
            if head is None:
                raise MessageNotFound("there is no such message in this conversation")
            changes = {**changes, "head": Place(head.place.branch, head.place.position + 1)}
        return _found(await self._store.update(user_id, conversation_id, changes))

    async def delete(self, user_id: str, conversation_id: UUID) -> None:
        """A call that runs there is cancelled and charged for what was delivered; its answer is not kept."""
        running = await self._store.delete(user_id, conversation_id)
        if running is not None and (call := self._running.get(running)) is not None:
            call.cancel()

    async def list_messages(
        self, user_id: str, conversation_id: UUID, *, head: UUID | None, page_size: int, page_token: str
    ) -> tuple[list[StoredMessage], str]:
        """A branch, oldest first. The first page decides where the branch ends; what is said later is no part of it."""
        question = ("messages", user_id, conversation_id, head)
        key = decode_page_token(page_token, question=question, types=(int, int, int))
        conversation = _found(await self._store.get(user_id, conversation_id))
        end, first = conversation.head, 0
        if key is not None:
            end, first = Place(int(key[0]), int(key[1])), int(key[2])
        elif head is not None:
            message = await self._store.message(user_id, conversation_id, head)
            if message is None:
                raise MessageNotFound("there is no such message in this conversation")
            end = Place(message.place.branch, message.place.position + 1)
        branches = await self._store.branches(user_id, conversation_id) if conversation.branches > 1 else {}
        path = slice_of(path_of(branches, end), first, first + page_size)
        found = await self._store.messages(user_id, conversation_id, path, limit=page_size)
        after = first + page_size
        token = encode_page_token([end.branch, end.position, after], question=question) if after < end.position else ""
        return found, token

    async def list_all_messages(
        self, user_id: str, conversation_id: UUID, *, page_size: int, page_token: str
    ) -> tuple[Sequence[StoredMessage], str]:
        """Of every branch, as they were stored."""
        question = ("all-messages", user_id, conversation_id)
        key = decode_page_token(page_token, question=question, types=(str,))
        _found(await self._store.get(user_id, conversation_id))
        found = await self._store.all_messages(
            user_id, conversation_id, after=UUID(str(key[0])) if key else None, limit=page_size + 1
        )
        token = ""
        if len(found) > page_size:
            token = encode_page_token([str(found[page_size - 1].message_id)], question=question)
        return found[:page_size], token


def _found(conversation: Conversation | None) -> Conversation:
    if conversation is None:
        raise ConversationNotFound("there is no such conversation")
    return conversation
