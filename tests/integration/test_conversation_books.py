"""Conversations in real PostgreSQL beside a model of them: whatever happens to turns, the totals are the calls'."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from llm_service.domain.call import Billing, CallRecord, CallState, End, judge, settle, sweep
from llm_service.domain.chat import FinishReason, Message, Role, TextPart
from llm_service.domain.conversation import (
    Conversation,
    ConversationStatus,
    MessageState,
    Place,
    Segment,
    StoredMessage,
    Turn,
    path_of,
    slice_of,
)
from llm_service.domain.errors import ConversationNotFound
from llm_service.storage.call_journal import PostgresCallJournal
from llm_service.storage.content import ContentBox
from llm_service.storage.conversation_books import TurnRows
from llm_service.storage.conversation_rows import ConversationRows
from llm_service.storage.conversation_tasks import PostgresConversationTasks
from llm_service.storage.conversations import PostgresConversations
from llm_service.storage.sealed_keys import KeySealer
from llm_service.usecases.ports import Heartbeat, Settlement, TurnEnd
from llm_service.wire.chat import answer_from_bytes, answer_to_bytes, message_from_bytes, message_to_bytes
from llm_service.wire.events import charge_requested_to_bytes, turn_completed_to_bytes
from metering.charge import Quote, Rates
from metering.usage import Usage, UsageSource
from servicekit.core.ids import RandomIdSource
from servicekit.db.database import Database
from servicekit.sealing import Sealer
from tests.support.databases import Databases

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
QUOTE = Quote("r", 1, Rates(1_000_000, 2_000_000, 500_000, 1_000_000, 2_000_000, 1_000_000, 2_000_000, 0))
IDS = RandomIdSource()


@dataclass
class Store:
    """The real storage, and what it needs."""

    conversations: PostgresConversations
    tasks: PostgresConversationTasks
    journal: PostgresCallJournal
    database: Database


async def open_store(stack: AsyncExitStack, databases: Databases, *, seals: bool) -> Store:
    """On a database of its own, until the stack is left."""
    database = Database(databases.make("llm"), schema="llm", application_name="test", pool_size=4)
    await database.open()
    stack.push_async_callback(database.close)
    sealer = KeySealer([bytes(32)])
    box = ContentBox(sealer, seals=seals)
    rows = ConversationRows(box, message_to_bytes=message_to_bytes, message_from_bytes=message_from_bytes)

    def event_of(record: CallRecord, *, corrects: bool = False) -> tuple[str, str, str, bytes]:
        event_id = f"correct:{record.call_id}" if corrects else str(record.call_id)
        return event_id, "charge", "charges", charge_requested_to_bytes(record, corrects=corrects)

    def turn_event_of(end: TurnEnd, record: CallRecord) -> tuple[str, str, str, str, bytes] | None:
        return end.turn.user_id, str(end.turn.message_id), "turn", "turns", turn_completed_to_bytes(end, record, Sealer([]))

    journal = PostgresCallJournal(
        database, database, event_of=event_of, sealer=sealer, answer_to_bytes=answer_to_bytes,
        answer_from_bytes=answer_from_bytes, wake_relay=lambda: None, lease=timedelta(seconds=1),
        turns=TurnRows(box, message_to_bytes=message_to_bytes, event_of=turn_event_of),
    )
    stack.push_async_callback(journal.close)
    return Store(
        PostgresConversations(database, rows), PostgresConversationTasks(database, rows), journal, database
    )


@pytest.fixture(params=[False, True], ids=["plain", "sealed"])
async def store(databases: Databases, request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    async with AsyncExitStack() as stack:
        yield await open_store(stack, databases, seals=request.param)


def conversation(user: str) -> Conversation:
    return Conversation(
        user_id=user, conversation_id=IDS.new_id(), title="", system_prompt="s", model="", use_memories=True,
        compact_history=False, status=ConversationStatus.ACTIVE, head=Place(0, 0), branches=1, message_count=0,
        tokens_total=0, credit_micros_total=0, created_at=NOW, last_message_at=NOW,
    )


def said(role: Role, text: str) -> Message:
    return Message(role, (TextPart(text),))


def record_of(user: str, conversation_id: UUID, call_id: UUID) -> CallRecord:
    return CallRecord(
        call_id=call_id, billing=Billing(user, str(call_id), "chat", str(conversation_id)), model="pro",
        provider="LOCAL", price_provider="LOCAL", upstream_model="m", state=CallState.RUNNING, streamed=True,
        hold_micros=10, max_output_tokens=10, quote=QUOTE, usage=Usage(), created_at=NOW,
    )


@dataclass
class Running:
    """A turn that is under way."""

    turn: Turn
    record: CallRecord
    texts: list[str]


async def begin(store: Store, made: Conversation, text: str) -> Running:
    call_id = IDS.new_id()
    async with store.conversations.open_turn(made.user_id, made.conversation_id, "r0") as opened:
        head = opened.conversation.head
        sent = StoredMessage(
            IDS.new_id(), head, said(Role.USER, text), MessageState.COMPLETE, NOW, str(call_id), prompt_tokens=3,
            token_family="o200k",
        )
        answer = StoredMessage(
            IDS.new_id(), Place(head.branch, head.position + 1), Message(Role.ASSISTANT), MessageState.PENDING, NOW,
            str(call_id), parent_message_id=sent.message_id,
        )
        await opened.begin([sent], answer, call_id=call_id, fingerprint=b"f", until=NOW)
    turn = Turn(made.user_id, made.conversation_id, answer.message_id, (sent,), asked=(sent,), remembers=True)
    return Running(turn, record_of(made.user_id, made.conversation_id, call_id), [text])


def settled_of(record: CallRecord, chance: random.Random, *, charged: bool = True) -> CallRecord:
    verdict = judge(
        End.COMPLETED if charged else End.UPSTREAM_FAILED, finish_reason=FinishReason.STOP, reached_model=True,
        delivered=charged, clipped=False,
    )
    usage = Usage(input_tokens=chance.randrange(1, 99), output_tokens=chance.randrange(1, 99),
                  source=UsageSource.PROVIDER_REPORTED)
    return settle(record, verdict, usage, at=NOW)


@dataclass
class Model:
    """What a conversation must be like."""

    texts: list[str] = field(default_factory=list)
    tokens: int = 0
    micros: int = 0
    deleted: bool = False

    def pay(self, record: CallRecord, *, instead_of: CallRecord | None = None) -> None:
        for each, sign in ((record, 1), (instead_of, -1)):
            if each is not None and each.charge is not None:
                self.tokens += sign * (each.usage.input_tokens + each.usage.output_tokens)
                self.micros += sign * each.charge.credit_micros


async def assert_as(store: Store, made: Conversation, model: Model) -> None:
    key = (made.user_id, made.conversation_id)
    async with store.database.connection() as connection:
        row = await (await connection.execute(
            "SELECT tokens_total, credit_micros_total FROM conversation WHERE user_id = %s AND conversation_id = %s", key
        )).fetchone()
    assert row == (model.tokens, model.micros)
    found = await store.conversations.get(*key)
    if model.deleted:
        assert found is None
        return
    assert found is not None
    assert (found.message_count, found.head.position) == (len(model.texts), len(model.texts))
    messages = await store.conversations.messages(*key, path_of({}, found.head), limit=1000)
    assert ["".join(part.text for part in each.message.parts) for each in messages] == model.texts  # type: ignore[union-attr]
    assert sum(each.tokens_consumed for each in messages) <= model.tokens


@pytest.mark.parametrize("seed", range(4))
async def test_totals_and_messages_are_those_of_a_model(store: Store, seed: int) -> None:
    chance = random.Random(seed)
    made = [await store.conversations.create(conversation(f"user-{n % 2}"), idempotency_key="") for n in range(4)]
    models = [Model() for _ in made]
    running: dict[int, Running] = {}
    swept: list[tuple[int, CallRecord, Running]] = []
    for step in range(120):
        number = chance.randrange(len(made))
        chat, model = made[number], models[number]
        action = chance.choice(["begin", "settle", "settle", "fail", "undo", "sweep", "side", "late", "delete"])
        turn = running.get(number)
        if action == "begin" and turn is None and not model.deleted:
            running[number] = await begin(store, chat, f"said {step}")
        elif action == "settle" and turn is not None:
            record = settled_of(turn.record, chance)
            end = TurnEnd(turn.turn, said(Role.ASSISTANT, f"answer {step}"), 5, "o200k")
            settlements = [Settlement(record, turn_end=end)]
            settlements.append(Settlement(record))  # the same again, of a lost acknowledgement
            await asyncio.gather(*map(store.journal.settle, settlements))
            model.pay(record)
            model.texts += [*turn.texts, f"answer {step}"]
            del running[number]
        elif action == "fail" and turn is not None:
            await store.journal.settle(Settlement(settled_of(turn.record, chance, charged=False)))
            del running[number]
        elif action == "undo" and turn is not None:
            await store.conversations.undo_turn(turn.turn, turn.record.call_id)
            del running[number]
        elif action == "sweep" and turn is not None:
            counted = replace(turn.record, usage=Usage(input_tokens=3, output_tokens=chance.randrange(3)))
            partial = TurnEnd(turn.turn, said(Role.ASSISTANT, f"part {step}"), 2, "o200k")
            await store.journal.beat([Heartbeat(counted, partial)])
            record = sweep(counted, at=NOW)
            known = await store.conversations.abandoned_turn(counted)
            assert model.deleted or (known is not None and known.message == partial.message)
            await store.journal.settle(Settlement(record, turn_end=known))
            if record.state is CallState.SETTLED:
                model.pay(record)
                model.texts += [*turn.texts, f"part {step}"]
            swept.append((number, record, turn))
            del running[number]
        elif action == "late" and swept:
            # The process that was taken for dead knows better.
            at, before, turn = swept.pop(chance.randrange(len(swept)))
            truth = settled_of(turn.record, chance)
            await store.journal.settle(Settlement(truth, turn_end=TurnEnd(turn.turn, said(Role.ASSISTANT, "x"), 1, "o200k")))
            models[at].pay(truth, instead_of=before)
        elif action == "side":
            record = settled_of(record_of(chat.user_id, chat.conversation_id, IDS.new_id()), chance)
            await store.journal.settle(Settlement(record))
            model.pay(record)
        elif action == "delete" and chance.random() < 0.15 and not model.deleted:
            await store.conversations.delete(chat.user_id, chat.conversation_id)
            model.deleted = True
        if model.deleted:
            model.texts = []
        await assert_as(store, chat, model)
    for chat, model in zip(made, models, strict=True):
        await assert_as(store, chat, model)
    async with store.database.connection() as connection:
        users = dict(await (await connection.execute(
            "SELECT user_id, (tokens_total, credit_micros_total)::text FROM user_total"
        )).fetchall())
    for user in ("user-0", "user-1"):
        own = [model for chat, model in zip(made, models, strict=True) if chat.user_id == user]
        expected = f"({sum(each.tokens for each in own)},{sum(each.micros for each in own)})"
        assert users.get(user, "(0,0)") == expected
    assert await store.tasks.mismatches(most=1000) == 0


async def test_sealed_content_is_not_readable_in_the_database(store: Store, request: pytest.FixtureRequest) -> None:
    made = await store.conversations.create(conversation("u"), idempotency_key="")
    turn = await begin(store, made, "canary-said")
    end = TurnEnd(turn.turn, said(Role.ASSISTANT, "canary-answered"), 5, "o200k")
    await store.journal.settle(Settlement(settled_of(turn.record, random.Random(1)), turn_end=end))
    async with store.database.connection() as connection:
        rows = await (await connection.execute("SELECT content FROM message ORDER BY position")).fetchall()
    is_sealed = request.node.name.endswith("[sealed]")
    assert [b"canary" in content for (content,) in rows] == [not is_sealed] * 2


async def test_a_wrong_total_is_found(store: Store) -> None:
    made = await store.conversations.create(conversation("u"), idempotency_key="")
    async with store.database.connection() as connection:
        await connection.execute(
            "UPDATE conversation SET tokens_total = 1, last_message_at = now() - interval '2 minutes'"
        )
    assert await store.tasks.mismatches(most=10) == 1
    assert made.title == ""


async def test_a_conversation_of_ten_thousand_messages_is_read_by_key(store: Store) -> None:
    """Pages and tails cost as many buffers there as in a short one."""
    made = await store.conversations.create(conversation("long"), idempotency_key="")
    key = ("long", made.conversation_id)
    fill = """
        INSERT INTO message SELECT %s, %s, 0, n, gen_random_uuid(), NULL, 3, 1, ''::bytea, 3, 'o200k', 0, 0, NULL, '',
            NULL, 0, '[]', now() FROM generate_series(%s::int, %s::int) n
    """
    costs: list[list[int]] = []
    async with store.database.connection() as connection:
        for first, last in ((0, 199), (200, 9_999)):
            await connection.execute(fill, (*key, first, last))
            costs.append([
                await buffers(connection, key, slice_of([Segment(0, 0, last + 1)], begin, begin + 64))
                for begin in (0, last - 63)
            ])
    messages = await store.conversations.messages(*key, [Segment(0, 9_936, 10_000)], limit=64)
    assert [each.place.position for each in messages] == list(range(9_936, 10_000))
    assert max(costs[1]) <= max(costs[0]) + 8, costs


async def buffers(connection: Any, key: tuple[str, UUID], path: list[Segment]) -> int:
    """Pages that reading a part of a conversation touches."""
    from llm_service.storage.conversations import MESSAGES

    cursor = await connection.execute(
        "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + MESSAGES,
        {"user_id": key[0], "conversation_id": key[1], "branches": [each.branch for each in path],
         "firsts": [each.first for each in path], "ends": [each.end for each in path], "limit": 500},
    )
    row = await cursor.fetchone()
    plan = row[0][0]["Plan"]
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


async def test_an_unknown_conversation_is_not_opened(store: Store) -> None:
    with pytest.raises(ConversationNotFound):
        async with store.conversations.open_turn("u", IDS.new_id(), "r0"):
            pytest.fail("it does not exist")
