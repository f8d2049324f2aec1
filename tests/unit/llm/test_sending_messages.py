"""Sending, titles and summaries as rules, on a store in memory and a runner that does what it is told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, cast
from uuid import UUID

import pytest

from llm_service.domain.call import Billing, CallRecord, CallState
from llm_service.domain.chat import Delta, Message, Prompt, Role, TextPart, ToolCall
from llm_service.domain.conversation import Conversation, ConversationStatus, History, MemoryUse, Place
from llm_service.domain.deployment import BUILT_IN, Directory
from llm_service.domain.errors import (
    ConversationBusy,
    MessageNotFound,
    RequestFinished,
    RequestInFlight,
    ToolResultsMissing,
    UpstreamUnavailable,
)
from llm_service.usecases.call_events import CallRequest, Finished, Generated, Started, Timing
from llm_service.usecases.conversation_chores import MOST_TRIES, Chores
from llm_service.usecases.conversation_history import HistoryReader
from llm_service.usecases.conversation_ports import ConversationTask, Memory, TaskKind
from llm_service.usecases.ports import TokenCount
from llm_service.usecases.send_message import MessageSender, SendRequest, TurnFinished, TurnStarted
from metering.usage import Usage
from servicekit.core.clock import ManualClock
from servicekit.core.errors import DomainError, IdempotencyConflict, InvalidField
from servicekit.core.faults import NoFaults
from servicekit.core.ids import RandomIdSource
from tests.support.conversation_store import MemoryConversations

USER, IDS = "u", RandomIdSource()
PROMPT = Prompt(())


class Words:
    """Counts a token for each word."""

    async def count_prompt(self, prompt: Prompt, *, family: str, upstream_model: str) -> TokenCount:
        words = sum(len(text_of(each).split()) for each in prompt.messages)
        return TokenCount(words, words)


def text_of(message: Message) -> str:
    return "".join(part.text for part in message.parts if isinstance(part, TextPart))


@dataclass
class Runner:
    """Answers with `answers`, one after the other, or raises `error` before anything is held."""

    store: MemoryConversations
    answers: list[Message | str] = field(default_factory=list)
    error: DomainError | None = None
    asked: list[CallRequest] = field(default_factory=list)

    async def stream(self, request: CallRequest) -> AsyncIterator[Started | Delta | Finished]:
        self.asked.append(request)
        if self.error is not None:
            raise self.error
        record = record_of(request)
        yield Started(record)
        answer = self.answers.pop(0)
        message = Message(Role.ASSISTANT, (TextPart(answer),)) if isinstance(answer, str) else answer
        yield Delta(text=text_of(message))
        assert request.turn is not None
        self.store.settle(request.turn, record.call_id, message, tokens=5, micros=7)
        yield Finished(record, Timing(0.0, None, 0.0))

    async def generate(self, request: CallRequest) -> Generated:
        self.asked.append(request)
        if self.error is not None:
            raise self.error
        return Generated(record_of(request), Message(Role.ASSISTANT, (TextPart(cast("str", self.answers.pop(0))),)))


def record_of(request: CallRequest) -> CallRecord:
    return CallRecord(
        call_id=request.call_id or IDS.new_id(), billing=request.billing, model="pro", provider="LOCAL",
        price_provider="LOCAL", upstream_model="m", state=CallState.SETTLED, streamed=True, hold_micros=1,
        max_output_tokens=1, quote=None, usage=Usage(), created_at=ManualClock().now(),
    )


class Journal:
    """Knows every call."""

    async def find(self, call_id: UUID, user_id: str) -> CallRecord:
        billing = Billing(user_id, "r", "chat", "")
        return record_of(CallRequest(billing, "", PROMPT, None, 1, None, call_id=call_id))


@dataclass
class World:
    clock: ManualClock
    store: MemoryConversations
    runner: Runner
    sender: MessageSender
    made: Conversation
    memories: list[Memory] | None
    window: int

    async def send(self, text: str = "hello", request_id: str = "", **fields: Any) -> list[Any]:
        """What was told."""
        request_id = request_id or str(IDS.new_id())
        fields.setdefault("parts", (TextPart(text),))
        fields.setdefault("fingerprint", text.encode())
        request = SendRequest(USER, self.made.conversation_id, request_id, prompt=PROMPT, **fields)
        return [each async for each in self.sender.send(request)]

    async def say(self, text: str, answer: Message | str = "yes", **fields: Any) -> UUID:
        """Identity of the answer."""
        self.runner.answers.append(answer)
        told = await self.send(text, **fields)
        assert isinstance(told[-1], TurnFinished)
        return told[-1].message_id

    def shown(self) -> list[str]:
        """The prompt of the newest call."""
        return [text_of(each) for each in self.runner.asked[-1].prompt.messages]

    async def now(self) -> Conversation:
        found = await self.store.get(USER, self.made.conversation_id)
        assert found is not None
        return found


@pytest.fixture(params=[(0, None)])
async def world(request: pytest.FixtureRequest) -> World:
    window, memories = request.param
    clock = ManualClock()
    store = MemoryConversations(now=clock.now)
    runner = Runner(store)
    made = await store.create(conversation(clock, use_memories=memories is not None), idempotency_key="")

    class Models:
        directory = Directory([replace(BUILT_IN, context_window=window, max_output_tokens=4)])

    class Memories:
        async def retrieve(self, user_id: str, query: str, *, traceparent: str) -> list[Memory] | None:
            return None if memories == "away" else memories

    sender = MessageSender(
        store, cast("Any", runner), cast("Any", Journal()), cast("Any", Models()),
        HistoryReader(store, cast("Any", Words()), most=1000), Memories() if memories is not None else None, clock=clock,
        ids=IDS, faults=NoFaults(), turn_seconds=60.0,
    )
    return World(clock, store, runner, sender, made, memories, window)


def conversation(clock: ManualClock, **fields: Any) -> Conversation:
    values: dict[str, Any] = {
        "title": "", "system_prompt": "", "use_memories": False, "compact_history": False,
    } | fields
    return Conversation(
        user_id=USER, conversation_id=IDS.new_id(), model="", status=ConversationStatus.ACTIVE, head=Place(0, 0),
        branches=1, message_count=0, tokens_total=0, credit_micros_total=0, created_at=clock.now(),
        last_message_at=clock.now(), **values,
    )


async def test_a_turn_is_told_stored_and_shown_to_the_next(world: World) -> None:
    world.runner.answers.append("hi")
    started, delta, finished = await world.send("hello there", request_id="r1")
    assert isinstance(started, TurnStarted)
    assert (delta.text, finished.user_message_id is not None) == ("hi", True)
    await world.say("and now?")
    assert world.shown() == ["hello there", "hi", "and now?"]
    asked = world.runner.asked[0]
    assert (asked.billing.request_id, asked.billing.scene, asked.store) == ("r1", "chat", False)
    assert (await world.now()).message_count == 4


async def test_the_same_request_is_answered_from_the_store_and_other_content_is_refused(world: World) -> None:
    answer = await world.say("hello", "hi", request_id="r1")
    started, delta, finished = await world.send("hello", request_id="r1")
    assert (started.started.replayed, delta.text, finished.message_id) == (True, "hi", answer)
    assert len(world.runner.asked) == 1
    with pytest.raises(IdempotencyConflict):
        await world.send("something else", request_id="r1")


async def test_a_replay_whose_call_nobody_knows_says_that_it_was_answered(world: World) -> None:
    await world.say("hello", "hi", request_id="r1")
    world.sender._journal.find = lambda *_: _nothing()  # type: ignore[method-assign, assignment]
    with pytest.raises(RequestFinished):
        await world.send("hello", request_id="r1")


async def _nothing() -> None:
    return None


async def test_one_answer_at_a_time_and_what_shows_no_sign_of_life_is_taken_back(world: World) -> None:
    world.runner.answers.append("never told")
    request = SendRequest(USER, world.made.conversation_id, "r1", b"", PROMPT, (TextPart("hello"),))
    running = world.sender.send(request)
    assert isinstance(await anext(running), TurnStarted)
    with pytest.raises(ConversationBusy) as busy:
        await world.send("me too", request_id="r2")
    assert busy.value.metadata["call_id"] == str((await world.now()).running_call_id)
    with pytest.raises(RequestInFlight):
        await world.send("hello", request_id="r1", fingerprint=b"")
    world.clock.advance(seconds=61)
    await world.say("me too", request_id="r2")
    assert world.shown() == ["me too"]
    assert (await world.now()).message_count == 2


async def test_a_call_that_never_began_leaves_no_turn_before_the_client_hears_of_it(world: World) -> None:
    world.runner.error = UpstreamUnavailable("down")
    with pytest.raises(UpstreamUnavailable):
        await world.send("hello", request_id="r1")
    after = await world.now()
    assert (after.running_call_id, after.message_count) == (None, 0)
    world.runner.error = None
    await world.say("hello", request_id="r1")
    assert world.shown() == ["hello"]


async def test_a_client_that_leaves_before_the_hold_leaves_no_turn(world: World) -> None:
    class Left(BaseException):
        pass

    world.runner.error = cast("Any", Left())
    with pytest.raises(Left):
        await world.send("hello")
    await world.sender.close()
    assert (await world.now()).running_call_id is None


async def test_a_client_that_leaves_after_the_hold_leaves_the_turn_to_its_call(world: World) -> None:
    world.runner.answers.append("never told")
    request = SendRequest(USER, world.made.conversation_id, "r1", b"", PROMPT, (TextPart("hello"),))
    async with aclosing(cast("Any", world.sender.send(request))) as running:
        await anext(running)
    await world.sender.close()
    assert (await world.now()).running_call_id is not None


async def test_tool_calls_are_answered_each_once(world: World) -> None:
    calls = (ToolCall("a", "f", "{}"), ToolCall("b", "g", "{}"))
    await world.say("look it up", Message(Role.ASSISTANT, (), tool_calls=calls))
    with pytest.raises(ToolResultsMissing) as missing:
        await world.send("never mind")
    assert missing.value.metadata["tool_call_ids"] == "a,b"
    for given in (("a",), ("a", "a"), ("a", "b", "c")):
        with pytest.raises(InvalidField):
            await world.send(parts=(), tool_results=tuple((each, (TextPart("1"),)) for each in given))
    await world.say("", "found", parts=(), tool_results=(("b", (TextPart("2"),)), ("a", (TextPart("1"),))))
    assert world.shown() == ["look it up", "", "2", "1"]
    with pytest.raises(InvalidField):
        await world.send(parts=(), tool_results=(("a", (TextPart("1"),)),))


async def test_regenerate_and_edit_fork_where_they_should(world: World) -> None:
    first = await world.say("one", "1")
    second = await world.say("two", "2")
    again = await world.say("", "2 again", regenerate=second, parts=())
    assert world.shown() == ["one", "1", "two"]
    await world.say("three", "3")
    assert world.shown() == ["one", "1", "two", "2 again", "three"]
    await world.say("zwei", "drei", parent=str(first))
    assert world.shown() == ["one", "1", "zwei"]
    await world.say("from the start", "ok", parent="")
    assert world.shown() == ["from the start"]
    assert (await world.now()).branches == 4
    sent = next(each for each in await world.store.all_messages(USER, world.made.conversation_id, after=None, limit=99)
                if text_of(each.message) == "two")
    for wrong in ({"regenerate": sent.message_id, "parts": ()}, {"parent": str(sent.message_id)}):
        with pytest.raises(InvalidField):
            await world.send(**wrong)
    for unknown in ({"regenerate": IDS.new_id(), "parts": ()}, {"parent": str(IDS.new_id())}):
        with pytest.raises(MessageNotFound):
            await world.send(**unknown)
    assert again != second


@pytest.mark.parametrize("world", [(64 + 4 + 8, None)], indirect=True)
async def test_the_oldest_rounds_are_left_out_when_the_window_is_full(world: World) -> None:
    """Room for 8 words beside the answer and the slack."""
    await world.say("a b c", "d")
    await world.say("e f g", "h")
    world.runner.answers.append("k")
    started, *_ = await world.send("i j")
    assert isinstance(started, TurnStarted)
    assert world.shown() == ["e f g", "h", "i j"]
    assert (started.history.dropped, started.history.summarised) == (2, False)


MEMORIES = [Memory("m1", "fact", "The user <lives> in Oslo")]


@pytest.mark.parametrize(("world", "use", "ids"), [
    ((0, MEMORIES), MemoryUse.SHOWN, ("m1",)), ((0, []), MemoryUse.NONE, ()), ((0, "away"), MemoryUse.UNAVAILABLE, ()),
], indirect=["world"])
async def test_memories_are_quoted_and_their_ids_recorded(world: World, use: MemoryUse, ids: tuple[str, ...]) -> None:
    world.runner.answers.append("ok")
    started, *_ = await world.send("where do I live?")
    assert isinstance(started, TurnStarted)
    assert (started.memory_use, started.memory_ids) == (use, ids)
    assert world.runner.asked[-1].turn is not None
    assert world.runner.asked[-1].turn.memory_ids == ids
    assert any("(lives)" in each for each in world.shown()) is (use is MemoryUse.SHOWN)
    assert (await world.now()).running_call_id is None
    assert isinstance(started.history, History)


# Titles and summaries


@dataclass
class Tasks:
    """One task, and what became of it."""

    waiting: list[ConversationTask]
    happened: list[tuple[str, Any]] = field(default_factory=list)

    async def done(self, task: ConversationTask) -> None:
        self.happened.append(("done", None))

    async def postpone(self, task: ConversationTask, *, seconds: float) -> None:
        self.happened.append(("postponed", seconds))

    async def set_title(self, task: ConversationTask, title: str) -> None:
        self.happened.append(("title", title))

    async def set_summary(self, task: ConversationTask, summary: str) -> None:
        self.happened.append(("summary", summary))


async def done_with(world: World, kind: TaskKind, *, tries: int = 0, at: int = 0) -> list[tuple[str, Any]]:
    task = ConversationTask(USER, world.made.conversation_id, kind, tries, Place(0, at))
    tasks = Tasks([task])
    await Chores(cast("Any", tasks), world.store, cast("Any", world.runner))._work(task)
    return tasks.happened


class Refused(DomainError):
    reason = "INSUFFICIENT_CREDIT"


async def test_a_title_is_asked_for_once_and_made_without_a_model_when_that_is_hopeless(world: World) -> None:
    await world.say("tell me <all> about whales", "Whales are large.")
    world.runner.answers.append('"Whales"')
    assert await done_with(world, TaskKind.TITLE) == [("title", "Whales")]
    asked = world.runner.asked[-1]
    assert (asked.billing.scene, asked.billing.request_id) == ("chat.title", f"title:{world.made.conversation_id}")
    assert "(all)" in world.shown()[0]
    world.runner.error = UpstreamUnavailable("down")
    assert await done_with(world, TaskKind.TITLE, tries=3) == [("postponed", 8.0)]
    assert await done_with(world, TaskKind.TITLE, tries=MOST_TRIES) == [("title", "tell me <all> about whales")]
    world.runner.error = Refused("poor")
    assert await done_with(world, TaskKind.TITLE) == [("title", "tell me <all> about whales")]
    await world.store.update(USER, world.made.conversation_id, {"title": "Mine"})
    assert await done_with(world, TaskKind.TITLE) == [("done", None)]


async def test_a_summary_goes_on_from_the_one_there_is(world: World) -> None:
    for number in range(3):
        await world.say(f"question {number}", f"answer {number}")
    world.runner.answers.append(" the first round ")
    assert await done_with(world, TaskKind.SUMMARY, at=2) == [("summary", "the first round")]
    await world.store.update(
        USER, world.made.conversation_id, {"summary": "the first round", "summary_at": Place(0, 2)}
    )
    world.runner.answers.append("more")
    assert await done_with(world, TaskKind.SUMMARY, at=4) == [("summary", "more")]
    asked = world.shown()[0]
    assert "the first round" in asked
    assert "question 1" in asked
    assert "question 0" not in asked
    assert await done_with(world, TaskKind.SUMMARY, at=2) == [("done", None)]
    world.runner.error = Refused("poor")
    assert await done_with(world, TaskKind.SUMMARY, at=6) == [("done", None)]
    world.runner.error = UpstreamUnavailable("down")
    assert await done_with(world, TaskKind.SUMMARY, at=6, tries=1) == [("postponed", 2.0)]
