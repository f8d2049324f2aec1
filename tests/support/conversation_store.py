"""A ConversationStore in memory that passes the same contract as PostgreSQL's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any
from uuid import UUID

from llm_service.domain.call import CallRecord
from llm_service.domain.chat import Message
from llm_service.domain.conversation import (
    Branch,
    Conversation,
    ConversationStatus,
    MessageState,
    Place,
    Segment,
    StoredMessage,
    Turn,
)
from llm_service.domain.errors import ConversationNotFound
from llm_service.usecases.ports import TurnEnd
from servicekit.core.errors import IdempotencyConflict

Key = tuple[str, UUID]


@dataclass
class _Chat:
    """A conversation as a database would hold it."""

    conversation: Conversation
    branches: dict[int, Branch] = field(default_factory=lambda: {0: Branch(0, 0, 0)})
    messages: list[StoredMessage] = field(default_factory=list)
    running: list[StoredMessage] = field(default_factory=list)
    fork: int | None = None
    fingerprints: dict[UUID, bytes] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def drop(self) -> None:
        self.messages = [each for each in self.messages if each not in self.running]
        if self.fork is not None:
            del self.branches[self.fork]
        self.release()

    def release(self) -> None:
        self.running, self.fork = [], None
        self.conversation = replace(
            self.conversation, running_call_id=None, running_request_id="", running_until=None
        )


class MemoryConversations:
    """Implements ConversationStore; `settle` is what a settlement in the journal does. `now` tells the database's
    time."""

    def __init__(self, *, now: Callable[[], datetime]) -> None:
        self._now = now
        self._chats: dict[Key, _Chat] = {}
        self._keys: dict[tuple[str, str], tuple[UUID, Conversation]] = {}

    async def create(self, conversation: Conversation, *, idempotency_key: str) -> Conversation:
        if idempotency_key:
            known = self._keys.setdefault(
                (conversation.user_id, idempotency_key), (conversation.conversation_id, conversation)
            )
            asked = replace(conversation, conversation_id=known[0], created_at=known[1].created_at,
                            last_message_at=known[1].last_message_at)
            if asked != known[1]:
                raise IdempotencyConflict("the idempotency_key was used before with other content")
            if known[0] != conversation.conversation_id:
                return self._chats[conversation.user_id, known[0]].conversation
        self._chats[conversation.user_id, conversation.conversation_id] = _Chat(conversation)
        return conversation

    async def get(self, user_id: str, conversation_id: UUID) -> Conversation | None:
        chat = self._chats.get((user_id, conversation_id))
        return chat.conversation if chat else None

    async def list_conversations(
        self, user_id: str, *, title_contains: str, status: ConversationStatus | None,
        before: tuple[datetime, UUID] | None, limit: int,
    ) -> list[Conversation]:
        found = [
            each.conversation for (owner, _), each in self._chats.items()
            if owner == user_id and title_contains.lower() in each.conversation.title.lower()
            and status in (None, each.conversation.status)
        ]
        found.sort(key=lambda each: (each.last_message_at, each.conversation_id), reverse=True)
        return [each for each in found if before is None or (each.last_message_at, each.conversation_id) < before][:limit]

    async def update(self, user_id: str, conversation_id: UUID, changes: dict[str, Any]) -> Conversation | None:
        chat = self._chats.get((user_id, conversation_id))
        if chat is None:
            return None
        chat.conversation = replace(chat.conversation, **changes)
        return chat.conversation

    async def delete(self, user_id: str, conversation_id: UUID) -> UUID | None:
        chat = self._chats.pop((user_id, conversation_id), None)
        if chat is None:
            raise ConversationNotFound("there is no such conversation")
        return chat.conversation.running_call_id

    async def branches(self, user_id: str, conversation_id: UUID) -> dict[int, Branch]:
        return {number: each for number, each in self._chats[user_id, conversation_id].branches.items() if number}

    async def message(self, user_id: str, conversation_id: UUID, message_id: UUID) -> StoredMessage | None:
        return _message(self._chats[user_id, conversation_id], message_id)

    async def messages(
        self, user_id: str, conversation_id: UUID, path: Sequence[Segment], *, limit: int
    ) -> list[StoredMessage]:
        return _messages(self._chats[user_id, conversation_id], path)[:limit]

    async def all_messages(
        self, user_id: str, conversation_id: UUID, *, after: UUID | None, limit: int
    ) -> list[StoredMessage]:
        told = [
            each for each in self._chats[user_id, conversation_id].messages
            if each.state is not MessageState.PENDING and (after is None or each.message_id > after)
        ]
        return sorted(told, key=lambda each: each.message_id)[:limit]

    @asynccontextmanager
    async def open_turn(self, user_id: str, conversation_id: UUID, request_id: str) -> AsyncIterator[_OpenTurn]:
        chat = self._chats.get((user_id, conversation_id))
        if chat is None:
            raise ConversationNotFound("there is no such conversation")
        async with chat.lock:
            before = replace(chat, branches=dict(chat.branches), messages=list(chat.messages))
            try:
                yield _OpenTurn(chat, request_id, now=self._now())
            except BaseException:
                chat.__dict__.update(before.__dict__)
                raise

    async def undo_turn(self, turn: Turn, call_id: UUID) -> None:
        chat = self._chats.get((turn.user_id, turn.conversation_id))
        if chat is not None and chat.conversation.running_call_id == call_id:
            chat.drop()

    async def abandoned_turn(self, record: CallRecord) -> TurnEnd | None:
        if not record.billing.conversation_id:
            return None
        user_id, conversation_id = record.billing.user_id, UUID(record.billing.conversation_id)
        chat = self._chats.get((user_id, conversation_id))
        if chat is None or chat.conversation.running_call_id != record.call_id:
            return None
        *sent, answer = chat.running
        turn = Turn(
            user_id, conversation_id, answer.message_id, tuple(sent), asked=tuple(sent), memory_ids=answer.memory_ids,
            remembers=chat.conversation.use_memories,
        )
        return TurnEnd(turn, answer.message, answer.prompt_tokens, answer.token_family)

    def settle(self, turn: Turn, call_id: UUID, answer: Message, *, tokens: int, micros: int) -> None:
        chat = self._chats[turn.user_id, turn.conversation_id]
        assert chat.conversation.running_call_id == call_id
        pending = chat.running[-1]
        done = replace(
            pending, message=answer, state=MessageState.COMPLETE, created_at=self._now(), tokens_consumed=tokens,
            credit_micros=micros,
        )
        chat.messages = [done if each is pending else each for each in chat.messages]
        old = chat.conversation
        chat.conversation = replace(
            old, head=Place(done.place.branch, done.place.position + 1), head_message_id=done.message_id,
            message_count=old.message_count + len(chat.running), tokens_total=old.tokens_total + tokens,
            credit_micros_total=old.credit_micros_total + micros,
            last_message_at=max(old.last_message_at, done.created_at),
        )
        chat.release()


class _OpenTurn:
    """Implements OpenTurn."""

    def __init__(self, chat: _Chat, request_id: str, *, now: datetime) -> None:
        self._chat = chat
        self._fork: int | None = None
        until = chat.conversation.running_until
        self.running_is_stale = until is not None and now > until
        self.answer = next(
            ((each, chat.fingerprints[each.message_id]) for each in chat.messages
             if each.request_id == request_id and each.call_id is not None), None,
        )

    @property
    def conversation(self) -> Conversation:
        return self._chat.conversation

    async def message(self, message_id: UUID) -> StoredMessage | None:
        return _message(self._chat, message_id)

    async def branches(self) -> dict[int, Branch]:
        return {number: each for number, each in self._chat.branches.items() if number}

    async def messages(self, path: Sequence[Segment]) -> list[StoredMessage]:
        return _messages(self._chat, path)

    async def drop_stale(self) -> None:
        self._chat.drop()

    async def fork(self, *, parent: int, at: int) -> int:
        self._fork = self._chat.conversation.branches
        self._chat.branches[self._fork] = Branch(self._fork, parent, at)
        self._chat.conversation = replace(self._chat.conversation, branches=self._fork + 1)
        return self._fork

    async def begin(
        self, sent: Sequence[StoredMessage], answer: StoredMessage, *, call_id: UUID, fingerprint: bytes,
        until: datetime,
    ) -> None:
        chat = self._chat
        assert not any(each.call_id and each.request_id == answer.request_id for each in chat.messages)
        chat.running = [*sent, replace(answer, call_id=call_id)]
        chat.messages = [*chat.messages, *chat.running]
        chat.fork = self._fork
        chat.fingerprints[answer.message_id] = fingerprint
        chat.conversation = replace(
            chat.conversation, running_call_id=call_id, running_request_id=answer.request_id, running_until=until
        )


def _message(chat: _Chat, message_id: UUID) -> StoredMessage | None:
    return next(
        (each for each in chat.messages if each.message_id == message_id and each.state is not MessageState.PENDING), None
    )


def _messages(chat: _Chat, path: Sequence[Segment]) -> list[StoredMessage]:
    found = [
        each for each in chat.messages for segment in path
        if each.place.branch == segment.branch and segment.first <= each.place.position < segment.end
    ]
    return sorted(found, key=lambda each: each.place.position)
