"""Sending a message: one request, one call, one charge, one stored pair.

The turn is written down first and locks the conversation for others; the call's settlement stores the answer, or takes
the turn back, in its own transaction. Between them nothing is lost whatever crashes: the sweeper settles the call.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any
from uuid import UUID

from llm_service.domain.call import Billing
from llm_service.domain.chat import Delta, Message, Part, Prompt, Role, TextPart
from llm_service.domain.conversation import (
    MOST_BRANCHES,
    Branch,
    Conversation,
    History,
    MemoryUse,
    MessageState,
    Place,
    Segment,
    StoredMessage,
    Turn,
    memory_text,
    open_tool_calls,
    path_of,
    slice_of,
)
from llm_service.domain.deployment import DEFAULT_ALIAS, Deployment
from llm_service.domain.errors import (
    ConversationBusy,
    MessageNotFound,
    RequestFinished,
    RequestInFlight,
    ToolResultsMissing,
    TooManyBranches,
)
from llm_service.usecases.begin_call import NO_NEEDS
from llm_service.usecases.call_events import CallRequest, Finished, Started, Timing, deltas_of
from llm_service.usecases.conversation_history import TAIL, UNBOUNDED, HistoryReader
from llm_service.usecases.conversation_ports import ConversationStore, Memories, OpenTurn
from llm_service.usecases.ports import CallJournal, ModelDirectory
from llm_service.usecases.run_call import CallRunner
from servicekit.core.clock import Clock
from servicekit.core.errors import DomainError, IdempotencyConflict, InvalidField
from servicekit.core.faults import FaultPoint, Faults
from servicekit.core.ids import IdSource
from servicekit.telemetry.logs import EventLogger

log = EventLogger(__name__)

SCENE = "chat"
CONTEXT_MESSAGES = 4
"""Messages before a turn that the memory service is told of, to understand the turn by."""
SLACK_TOKENS = 64
"""Left free in the context window: servers frame prompts in their own ways."""
BUSY_SECONDS = 1.0
MOST_TRIES = 1000


@dataclass(frozen=True, slots=True)
class SendRequest:
    """What is sent: `parts`, or `tool_results`, or an answer to make anew. `parent` None = after the newest message;
    "" = as the first one. `prompt` has the options and no messages."""

    user_id: str
    conversation_id: UUID
    request_id: str
    fingerprint: bytes
    prompt: Prompt
    parts: tuple[Part, ...] = ()
    tool_results: tuple[tuple[str, tuple[Part, ...]], ...] = ()
    regenerate: UUID | None = None
    parent: str | None = None
    model: str = ""
    max_output_tokens: int | None = None
    min_output_tokens: int = 1
    deadline_seconds: float | None = None
    traceparent: str = ""
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TurnStarted:
    """The credit is held; `history` and `memory_ids` are what the model is shown."""

    started: Started
    history: History
    memory_use: MemoryUse = MemoryUse.OFF
    memory_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TurnFinished:
    """Both messages are stored."""

    finished: Finished
    message_id: UUID
    user_message_id: UUID | None


@dataclass(frozen=True, slots=True)
class _Begun:
    """A turn that is written down, and what its prompt is made of."""

    conversation: Conversation
    deployment: Deployment
    call_id: UUID
    turn: Turn
    path: list[Segment]
    tail: list[StoredMessage]


@dataclass(frozen=True, slots=True)
class _Answered:
    """The request was answered before."""

    answer: StoredMessage


class MessageSender:
    """Sends messages. `turn_seconds`: after so long without a sign of life a turn is taken for dead."""

    def __init__(
        self, store: ConversationStore, runner: CallRunner, journal: CallJournal, models: ModelDirectory,
        history: HistoryReader, memories: Memories | None, *, clock: Clock, ids: IdSource, faults: Faults,
        turn_seconds: float,
    ) -> None:
        self._store = store
        self._runner = runner
        self._journal = journal
        self._models = models
        self._history = history
        self._memories = memories
        self._clock = clock
        self._ids = ids
        self._faults = faults
        self._turn_seconds = turn_seconds
        self._random = random.Random()  # noqa: S311 - spreads load, guards nothing
        self._background: set[asyncio.Task[None]] = set()

    async def send(self, request: SendRequest) -> AsyncIterator[TurnStarted | Delta | TurnFinished]:
        """Started, deltas, finished. Raises a DomainError when nothing was answered; the turn is taken back then."""
        begun = await self._begin(request)
        if isinstance(begun, _Answered):
            for event in await self._replay(request.user_id, begun.answer):
                yield event
            return
        is_held = is_undone = False
        try:
            self._faults.reach(FaultPoint.AFTER_TURN_BEGUN)
            call, history, memory_use = await self._call(request, begun)
            # What is read of the generator is closed with it: the call is settled when the client leaves.
            async with aclosing(self._runner.stream(call)) as events:  # type: ignore[type-var]  # it is a generator
                async for told in events:
                    if isinstance(told, Started):
                        is_held = True
                        yield TurnStarted(told, history, memory_use, call.turn.memory_ids if call.turn else ())
                    elif isinstance(told, Finished):
                        sent = begun.turn.sent
                        yield TurnFinished(told, begun.turn.message_id, sent[-1].message_id if sent else None)
                    else:
                        yield told
        except DomainError:
            if not is_held:
                # Before the client hears of it: it may try again at once.
                await self._undo(begun.turn, begun.call_id)
                is_undone = True
            raise
        finally:
            if not is_held and not is_undone:
                self._in_background(self._undo(begun.turn, begun.call_id))

    async def close(self) -> None:
        """Waits for what still is taken back."""
        while self._background:
            await asyncio.wait(set(self._background))

    # Before the call

    async def _begin(self, request: SendRequest) -> _Begun | _Answered:
        async with self._store.open_turn(
            request.user_id, request.conversation_id, request.request_id
        ) as opened:
            known = opened.answer
            if known is not None and known[1] != request.fingerprint:
                raise IdempotencyConflict("the request_id was used before with other content")
            if known is not None and known[0].state is not MessageState.PENDING:
                return _Answered(known[0])
            await self._make_room(opened, request)
            return await self._write_down(opened, request)

    async def _make_room(self, opened: OpenTurn, request: SendRequest) -> None:
        conversation = opened.conversation
        if conversation.running_call_id is None:
            return
        if opened.running_is_stale:
            log.warning("turn_taken_back", call_id=str(conversation.running_call_id))
            await opened.drop_stale()
            return
        facts = {"call_id": str(conversation.running_call_id)}
        if conversation.running_request_id == request.request_id:
            raise RequestInFlight("the same request is still running", retry_after_seconds=BUSY_SECONDS, facts=facts)
        raise ConversationBusy(
            "an answer is under way in this conversation", retry_after_seconds=BUSY_SECONDS, facts=facts
        )

    async def _write_down(self, opened: OpenTurn, request: SendRequest) -> _Begun:
        conversation = opened.conversation
        alias = request.model or conversation.model or DEFAULT_ALIAS
        needs = frozenset({"tools"}) if request.prompt.tools else NO_NEEDS
        deployment = self._models.directory.tiers(alias, draw=self._random.random, needed=needs)[0][0]
        branches = await opened.branches()
        begins, fork_of = await self._place_of(opened, request)
        if fork_of is not None:
            if conversation.branches >= MOST_BRANCHES:
                raise TooManyBranches("the conversation has no room for more branches", branches=MOST_BRANCHES)
            number = await opened.fork(parent=fork_of, at=begins.position)
            branches[number] = Branch(number, fork_of, begins.position)
            begins = Place(number, begins.position)
        path = path_of(branches, begins)
        tail = await opened.messages(slice_of(path, begins.position - TAIL, begins.position))
        newest = tail[-1] if tail else None
        now = self._clock.now()
        sent: list[StoredMessage] = []
        for message in self._messages_of(request, newest):
            parent = sent[-1] if sent else newest
            sent.append(StoredMessage(
                message_id=self._id_after(sent[-1:]), place=Place(begins.branch, begins.position + len(sent)),
                message=message, state=MessageState.COMPLETE, created_at=now, request_id=request.request_id,
                parent_message_id=parent.message_id if parent else None,
                prompt_tokens=await self._history.weigh(message, deployment),
                token_family=self._history.family_of(deployment),
            ))
        before = sent[-1] if sent else newest
        answer = StoredMessage(
            message_id=self._id_after(sent[-1:]), place=Place(begins.branch, begins.position + len(sent)),
            message=Message(Role.ASSISTANT), state=MessageState.PENDING, created_at=now,
            request_id=request.request_id, parent_message_id=before.message_id if before else None,
        )
        call_id = self._ids.new_id()
        await opened.begin(
            sent, answer, call_id=call_id, fingerprint=request.fingerprint,
            until=now + timedelta(seconds=self._turn_seconds),
        )
        asked = tuple(sent) or tuple(_last_of_user(tail))
        context = [each for each in tail if each not in asked][-CONTEXT_MESSAGES:]
        turn = Turn(
            request.user_id, request.conversation_id, answer.message_id, tuple(sent), asked=asked,
            context=tuple(context), remembers=conversation.use_memories,
        )
        return _Begun(conversation, deployment, call_id, turn, path, tail)

    def _id_after(self, before: Sequence[StoredMessage]) -> UUID:
        """Identities of one turn sort as its messages do, though they are made within a millisecond."""
        made = self._ids.new_id()
        tries = 0
        while before and made < before[-1].message_id and (tries := tries + 1) < MOST_TRIES:
            made = self._ids.new_id()
        return made

    async def _place_of(self, opened: OpenTurn, request: SendRequest) -> tuple[Place, int | None]:
        """Where the turn begins, and the branch that it forks off from, None = it goes on where it stands."""
        head = opened.conversation.head
        if request.regenerate is not None:
            old = await opened.message(request.regenerate)
            if old is None:
                raise MessageNotFound("there is no such message in this conversation")
            if old.message.role is not Role.ASSISTANT:
                raise InvalidField.of("regenerate_message_id", "is not an assistant's message")
            return old.place, old.place.branch
        if request.parent is None:
            return head, None
        if request.parent == "":
            return Place(0, 0), None if head.position == 0 else 0
        parent = await opened.message(UUID(request.parent))
        if parent is None:
            raise MessageNotFound("there is no such message in this conversation")
        if parent.message.role is not Role.ASSISTANT:
            raise InvalidField.of("parent_message_id", "is not an assistant's message")
        after = Place(parent.place.branch, parent.place.position + 1)
        return after, None if after == head else parent.place.branch

    @staticmethod
    def _messages_of(request: SendRequest, newest: StoredMessage | None) -> list[Message]:
        if request.regenerate is not None:
            return []
        waiting = open_tool_calls(newest)
        if not request.tool_results:
            if waiting:
                raise ToolResultsMissing(
                    "the newest message asks for tools: send their results", tool_call_ids=",".join(waiting)
                )
            return [Message(Role.USER, request.parts)]
        given = [tool_call_id for tool_call_id, _ in request.tool_results]
        if sorted(given) != sorted(waiting):
            wanted = ", ".join(waiting) if waiting else "none: the newest message asks for no tool"
            raise InvalidField.of("tool_results", f"must answer each tool call once; waiting: {wanted}")
        return [Message(Role.TOOL, parts, tool_call_id=tool_call_id) for tool_call_id, parts in request.tool_results]

    async def _call(self, request: SendRequest, begun: _Begun) -> tuple[CallRequest, History, MemoryUse]:
        """The call with its prompt, and what its prompt is made of."""
        conversation, deployment, turn = begun.conversation, begun.deployment, begun.turn
        use, text = MemoryUse.OFF, ""
        if conversation.use_memories:
            use, turn, text = await self._remember(request, turn)
        system = [Message(Role.SYSTEM, (TextPart(each),)) for each in (conversation.system_prompt, text) if each]
        sent = [each.message for each in turn.sent]
        room = UNBOUNDED
        if deployment.context_window:
            reply = min(
                request.max_output_tokens or deployment.max_output_tokens, deployment.max_output_tokens,
                deployment.context_window // 4,
            )
            weights = [await self._history.weigh(each, deployment) for each in system]
            weights += [each.prompt_tokens for each in turn.sent]
            room = deployment.context_window - reply - sum(weights) - SLACK_TOKENS
        shown = await self._history.read(
            conversation, begun.path, begun.tail, deployment=deployment, room=room,
            needs_round=bool(request.tool_results) or request.regenerate is not None,
        )
        call = CallRequest(
            billing=Billing(
                user_id=request.user_id, request_id=request.request_id, scene=SCENE,
                conversation_id=str(request.conversation_id), labels=request.labels,
                request_fingerprint=request.fingerprint, request_id_was_given=True,
            ),
            model=request.model or conversation.model,
            prompt=replace(request.prompt, messages=(*system, *shown.history.messages, *sent)),
            max_output_tokens=request.max_output_tokens, min_output_tokens=request.min_output_tokens,
            deadline_seconds=request.deadline_seconds, store=False, traceparent=request.traceparent,
            call_id=begun.call_id, turn=turn, summary_until=shown.summary_until,
        )
        return call, shown.history, use

    async def _remember(self, request: SendRequest, turn: Turn) -> tuple[MemoryUse, Turn, str]:
        query = " ".join(
            part.text for each in turn.asked if each.message.role is Role.USER
            for part in each.message.parts if isinstance(part, TextPart)
        )
        if self._memories is None:
            return MemoryUse.UNAVAILABLE, turn, ""
        found = await self._memories.retrieve(request.user_id, query, traceparent=request.traceparent)
        if found is None:
            return MemoryUse.UNAVAILABLE, turn, ""
        if not found:
            return MemoryUse.NONE, turn, ""
        turn = replace(turn, memory_ids=tuple(each.memory_id for each in found))
        return MemoryUse.SHOWN, turn, memory_text([(each.kind, each.content) for each in found])

    # Afterwards

    async def _replay(self, user_id: str, answer: StoredMessage) -> list[TurnStarted | Delta | TurnFinished]:
        """What was answered, from the store; nothing is charged."""
        record = await self._journal.find(answer.call_id, user_id) if answer.call_id else None
        if record is None:
            raise RequestFinished("this request was answered and charged")
        nothing = History((), 0)
        return [
            TurnStarted(Started(record, replayed=True), nothing, memory_ids=answer.memory_ids),
            *deltas_of(answer.message),
            TurnFinished(Finished(record, Timing(0.0, None, 0.0)), answer.message_id, answer.parent_message_id),
        ]

    async def _undo(self, turn: Turn, call_id: UUID) -> None:
        try:
            await self._store.undo_turn(turn, call_id)
        except DomainError:
            log.warning("turn_not_taken_back", call_id=str(call_id))  # the next message takes it back, after a while

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _last_of_user(tail: Sequence[StoredMessage]) -> list[StoredMessage]:
    """What was said since the last answer."""
    found: list[StoredMessage] = []
    for each in reversed(tail):
        if each.message.role is Role.ASSISTANT:
            break
        found.append(each)
    return found[::-1]
