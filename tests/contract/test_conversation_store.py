"""One suite over conversations in memory and those in PostgreSQL."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from llm_service.domain.chat import Message, Role, TextPart
from llm_service.domain.conversation import (
    Conversation,
    ConversationStatus,
    MessageState,
    Place,
    StoredMessage,
    Turn,
    path_of,
)
from llm_service.domain.errors import ConversationNotFound
from llm_service.usecases.conversation_ports import ConversationStore
from llm_service.usecases.ports import Settlement, TurnEnd
from servicekit.core.errors import IdempotencyConflict
from tests.integration.test_conversation_books import IDS, NOW, conversation, open_store, record_of, said, settled_of
from tests.support.conversation_store import MemoryConversations
from tests.support.databases import Databases

USER = "u"


@dataclass
class Chats:
    """A store, and what ends a turn in it."""

    store: ConversationStore
    journal: Any

    async def settle(self, turn: Turn, call_id: UUID, text: str) -> None:
        record = settled_of(record_of(turn.user_id, turn.conversation_id, call_id), random.Random(1))
        answer = said(Role.ASSISTANT, text)
        if isinstance(self.store, MemoryConversations):
            tokens = record.usage.input_tokens + record.usage.output_tokens
            micros = record.charge.credit_micros if record.charge else 0
            self.store.settle(turn, call_id, answer, tokens=tokens, micros=micros)
        else:
            await self.journal.settle(Settlement(record, turn_end=TurnEnd(turn, answer, 1, "o200k")))

    async def new(self, **fields: Any) -> Conversation:
        return await self.store.create(replace(conversation(USER), **fields), idempotency_key="")

    async def now(self, made: Conversation) -> Conversation:
        found = await self.store.get(USER, made.conversation_id)
        assert found is not None
        return found

    async def begin(
        self, made: Conversation, *texts: str, request_id: str = "", fork_at: Place | None = None,
        until: timedelta = timedelta(days=30_000),
    ) -> tuple[Turn, UUID]:
        """A turn with those texts of the user's; none = an answer is made anew."""
        call_id = IDS.new_id()
        request_id = request_id or str(call_id)
        async with self.store.open_turn(USER, made.conversation_id, request_id) as opened:
            at = opened.conversation.head
            if fork_at is not None:
                at = Place(await opened.fork(parent=fork_at.branch, at=fork_at.position), fork_at.position)
            sent = [
                StoredMessage(
                    IDS.new_id(), Place(at.branch, at.position + number), said(Role.USER, text), MessageState.COMPLETE,
                    NOW, request_id, prompt_tokens=1, token_family="o200k",
                ) for number, text in enumerate(texts)
            ]
            answer = StoredMessage(
                IDS.new_id(), Place(at.branch, at.position + len(sent)), Message(Role.ASSISTANT),
                MessageState.PENDING, NOW, request_id,
            )
            await opened.begin(sent, answer, call_id=call_id, fingerprint=b"f", until=NOW + until)
        return Turn(USER, made.conversation_id, answer.message_id, tuple(sent)), call_id

    async def round(self, made: Conversation, text: str, answer: str, **fields: Any) -> UUID:
        """A turn that is answered; the answer's identity."""
        turn, call_id = await self.begin(made, *filter(None, [text]), **fields)
        await self.settle(turn, call_id, answer)
        return turn.message_id

    async def texts(self, made: Conversation, head: Place | None = None) -> list[str]:
        key = (USER, made.conversation_id)
        path = path_of(await self.store.branches(*key), head or (await self.now(made)).head)
        return [text_of(each) for each in await self.store.messages(*key, path, limit=100)]


def text_of(stored: StoredMessage) -> str:
    return "".join(part.text for part in stored.message.parts if isinstance(part, TextPart))


@pytest.fixture(params=["memory", "postgresql"])
async def chats(request: pytest.FixtureRequest, databases: Databases) -> AsyncIterator[Chats]:
    async with AsyncExitStack() as stack:
        if request.param == "memory":
            yield Chats(MemoryConversations(now=lambda: NOW), None)
        else:
            made = await open_store(stack, databases, seals=False)
            yield Chats(made.conversations, made.journal)


async def test_a_key_makes_one_conversation(chats: Chats) -> None:
    first = await chats.store.create(conversation(USER), idempotency_key="k")
    again = await chats.store.create(conversation(USER), idempotency_key="k")
    assert again.conversation_id == first.conversation_id
    with pytest.raises(IdempotencyConflict):
        await chats.store.create(replace(conversation(USER), title="other"), idempotency_key="k")
    other = await chats.store.create(conversation("somebody"), idempotency_key="k")
    assert other.conversation_id != first.conversation_id
    assert await chats.store.get("somebody", first.conversation_id) is None


async def test_what_is_pending_is_not_told_and_a_settlement_moves_the_head(chats: Chats) -> None:
    made = await chats.new()
    turn, call_id = await chats.begin(made, "hello", request_id="r1")
    running = await chats.now(made)
    assert (running.running_call_id, running.running_request_id, running.head) == (call_id, "r1", Place(0, 0))
    assert await chats.texts(made) == []
    assert await chats.store.message(USER, made.conversation_id, turn.message_id) is None
    told = await chats.store.all_messages(USER, made.conversation_id, after=None, limit=10)
    assert [text_of(each) for each in told] == ["hello"]
    await chats.settle(turn, call_id, "hi")
    ended = await chats.now(made)
    assert (ended.running_call_id, ended.head, ended.head_message_id) == (None, Place(0, 2), turn.message_id)
    assert (ended.message_count, ended.tokens_total > 0, ended.credit_micros_total > 0) == (2, True, True)
    assert await chats.texts(made) == ["hello", "hi"]
    answer = await chats.store.message(USER, made.conversation_id, turn.message_id)
    assert answer is not None
    assert (answer.state, answer.tokens_consumed) == (MessageState.COMPLETE, ended.tokens_total)


async def test_a_request_that_was_answered_is_known(chats: Chats) -> None:
    made = await chats.new()
    answer = await chats.round(made, "hello", "hi", request_id="r7")
    async with chats.store.open_turn(USER, made.conversation_id, "r7") as opened:
        assert opened.answer is not None
        assert (opened.answer[0].message_id, opened.answer[1]) == (answer, b"f")
    async with chats.store.open_turn(USER, made.conversation_id, "r8") as opened:
        assert opened.answer is None


async def test_a_turn_that_is_taken_back_leaves_nothing(chats: Chats) -> None:
    made = await chats.new()
    await chats.round(made, "hello", "hi")
    turn, call_id = await chats.begin(made, "again", fork_at=Place(0, 2))
    await chats.store.undo_turn(turn, IDS.new_id())
    assert (await chats.now(made)).running_call_id == call_id, "another call's turn is not taken back"
    await chats.store.undo_turn(turn, call_id)
    after = await chats.now(made)
    assert (after.running_call_id, after.head, after.message_count) == (None, Place(0, 2), 2)
    assert await chats.store.branches(USER, made.conversation_id) == {}
    assert await chats.texts(made) == ["hello", "hi"]
    await chats.round(made, "once more", "yes")
    assert await chats.texts(made) == ["hello", "hi", "once more", "yes"]


async def test_branches_share_what_is_before_them_and_both_stay_readable(chats: Chats) -> None:
    made = await chats.new()
    await chats.round(made, "one", "1")
    await chats.round(made, "two", "2")
    await chats.round(made, "", "2 again", fork_at=Place(0, 3))
    assert await chats.texts(made) == ["one", "1", "two", "2 again"]
    await chats.round(made, "three", "3")
    await chats.round(made, "zwei", "drei", fork_at=Place(1, 2))
    assert await chats.texts(made) == ["one", "1", "zwei", "drei"]
    assert await chats.texts(made, Place(0, 4)) == ["one", "1", "two", "2"]
    assert await chats.texts(made, Place(1, 6)) == ["one", "1", "two", "2 again", "three", "3"]
    branches = await chats.store.branches(USER, made.conversation_id)
    assert {number: (each.parent, each.forked_at) for number, each in branches.items()} == {1: (0, 3), 2: (1, 2)}
    first = await chats.store.all_messages(USER, made.conversation_id, after=None, limit=4)
    rest = await chats.store.all_messages(USER, made.conversation_id, after=first[-1].message_id, limit=100)
    assert len({each.message_id for each in [*first, *rest]}) == 4 + 1 + 2 + 2


async def test_a_turn_without_a_sign_of_life_is_stale(chats: Chats) -> None:
    made = await chats.new()
    await chats.begin(made, "hello", until=timedelta(days=-1))
    async with chats.store.open_turn(USER, made.conversation_id, "r2") as opened:
        assert opened.running_is_stale
        await opened.drop_stale()
    assert (await chats.now(made)).running_call_id is None
    assert await chats.store.all_messages(USER, made.conversation_id, after=None, limit=10) == []
    await chats.begin(made, "hello")
    async with chats.store.open_turn(USER, made.conversation_id, "r2") as opened:
        assert not opened.running_is_stale


async def test_the_turn_of_a_call_whose_process_died_is_found_while_it_stands(chats: Chats) -> None:
    made = await chats.new(use_memories=True)
    turn, call_id = await chats.begin(made, "hello", "are you there?")
    record = record_of(USER, made.conversation_id, call_id)
    found = await chats.store.abandoned_turn(record)
    assert found is not None
    assert (found.turn.message_id, found.turn.remembers) == (turn.message_id, True)
    assert [text_of(each) for each in found.turn.sent] == ["hello", "are you there?"]
    assert [each.message_id for each in found.turn.asked] == [each.message_id for each in turn.sent]
    assert found.message == Message(Role.ASSISTANT), "nothing of the answer was written down"
    assert await chats.store.abandoned_turn(record_of(USER, made.conversation_id, IDS.new_id())) is None
    assert await chats.store.abandoned_turn(record_of("other", made.conversation_id, call_id)) is None
    plain = replace(record, billing=replace(record.billing, conversation_id=""))
    assert await chats.store.abandoned_turn(plain) is None
    await chats.settle(turn, call_id, "yes")
    assert await chats.store.abandoned_turn(record) is None


async def test_a_turn_that_is_refused_is_not_written_and_one_waits_for_another(chats: Chats) -> None:
    made = await chats.new()
    with pytest.raises(ZeroDivisionError):
        async with chats.store.open_turn(USER, made.conversation_id, "r1") as opened:
            await opened.fork(parent=0, at=0)
            raise ZeroDivisionError
    assert (await chats.now(made)).branches == 1
    entered = asyncio.Event()

    async def second() -> UUID | None:
        await entered.wait()
        async with chats.store.open_turn(USER, made.conversation_id, "r2") as opened:
            return opened.conversation.running_call_id

    waiting = asyncio.create_task(second())
    async with chats.store.open_turn(USER, made.conversation_id, "r1") as opened:
        entered.set()
        await asyncio.sleep(0.05)
        assert not waiting.done()
        call_id = IDS.new_id()
        answer = StoredMessage(
            IDS.new_id(), Place(0, 0), Message(Role.ASSISTANT), MessageState.PENDING, NOW, "r1"
        )
        await opened.begin([], answer, call_id=call_id, fingerprint=b"", until=NOW)
    assert await waiting == call_id


async def test_lists_are_stable_pages_by_last_use(chats: Chats) -> None:
    made = [await chats.new(title=f"Chat {number}", last_message_at=NOW, created_at=NOW) for number in range(5)]
    await chats.store.update(USER, made[1].conversation_id, {"status": ConversationStatus.ARCHIVED})

    async def page(before: Conversation | None, **fields: Any) -> list[Conversation]:
        asked: dict[str, Any] = {"title_contains": "", "status": None, "limit": 2} | fields
        key = (before.last_message_at, before.conversation_id) if before else None
        return await chats.store.list_conversations(USER, before=key, **asked)

    first = await page(None)
    second = await page(first[-1])
    third = await page(second[-1])
    assert [each.conversation_id for each in [*first, *second, *third]] == sorted(
        (each.conversation_id for each in made), reverse=True
    )
    assert [each.title for each in await page(None, title_contains="cHAT 3")] == ["Chat 3"]
    assert [each.title for each in await page(None, status=ConversationStatus.ARCHIVED)] == ["Chat 1"]
    assert await chats.store.list_conversations("other", title_contains="", status=None, before=None, limit=9) == []


async def test_what_is_deleted_is_gone(chats: Chats) -> None:
    made = await chats.new()
    _, call_id = await chats.begin(made, "hello")
    assert await chats.store.delete(USER, made.conversation_id) == call_id
    assert await chats.store.get(USER, made.conversation_id) is None
    assert await chats.store.update(USER, made.conversation_id, {"title": "x"}) is None
    with pytest.raises(ConversationNotFound):
        await chats.store.delete(USER, made.conversation_id)
    with pytest.raises(ConversationNotFound):
        async with chats.store.open_turn(USER, made.conversation_id, "r"):
            pytest.fail("it is gone")
