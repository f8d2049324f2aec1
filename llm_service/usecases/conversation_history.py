"""What a model is shown of a conversation: as much of its newest part as the context window takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llm_service.domain.chat import Message, Prompt, Role, TextPart
from llm_service.domain.conversation import (
    Conversation,
    History,
    Segment,
    StoredMessage,
    as_shown,
    fitting,
    slice_of,
    summary_text,
)
from llm_service.domain.deployment import Deployment
from llm_service.usecases.conversation_ports import ConversationStore
from llm_service.usecases.ports import TokenCounter
from llm_service.usecases.running_calls import tokens_of

TAIL = 64
"""Messages that are read at once, and at first; older ones are read only while there is room for them."""
SUMMARY_AT = 0.75
"""Share of the window's room from which on a summary is asked for, so that it is there before it is needed."""
UNBOUNDED = 10**12


@dataclass(frozen=True, slots=True)
class Shown:
    """A prompt's history, and until which position a summary is wanted (0 = none)."""

    history: History
    summary_until: int = 0


class HistoryReader:
    """Reads what fits. `most` messages at most, whatever the window."""

    def __init__(self, store: ConversationStore, tokens: TokenCounter, *, most: int) -> None:
        self._store = store
        self._tokens = tokens
        self._most = most

    @staticmethod
    def family_of(deployment: Deployment) -> str:
        """The tokenizers by which weights are counted."""
        return tokens_of(deployment)

    async def weigh(self, message: Message, deployment: Deployment) -> int:
        """What a message weighs in a prompt."""
        count = await self._tokens.count_prompt(
            Prompt((message,)), family=tokens_of(deployment), upstream_model=deployment.upstream_model
        )
        return count.input_tokens

    async def read(
        self, conversation: Conversation, path: Sequence[Segment], tail: Sequence[StoredMessage], *,
        deployment: Deployment, room: int, needs_round: bool,
    ) -> Shown:
        """`tail`: the newest messages of `path`, already read. `room`: tokens for all of it. `needs_round`: what came
        since the user last spoke must be there, because the answer belongs to it."""
        end = path[-1].end if path else 0
        summary = conversation.summary if self._is_on(path, conversation) else ""
        oldest = conversation.summary_at.position if summary else 0
        kept = [each for each in tail if each.place.position >= oldest]
        weights = [await self._weight(each, deployment) for each in kept]
        while kept and kept[0].place.position > oldest and len(kept) < self._most and (
            sum(weights) <= room or (needs_round and not any(each.message.role is Role.USER for each in kept))
        ):
            first = max(oldest, kept[0].place.position - len(kept) - TAIL)
            older = await self._store.messages(
                conversation.user_id, conversation.conversation_id, slice_of(path, first, kept[0].place.position),
                limit=self._most,
            )
            if not older:
                break
            kept = older + kept
            weights = [await self._weight(each, deployment) for each in older] + weights
        starts = [each.message.role is Role.USER for each in kept]
        dropped = fitting(weights, starts, room)
        if needs_round and True in starts:
            dropped = min(dropped, len(starts) - 1 - starts[::-1].index(True))
        first_kept = kept[dropped].place.position if dropped < len(kept) else end
        shown = [as_shown(each, is_newest=each.place.position == end - 1) for each in kept[dropped:]]
        messages = tuple(message for message in shown if message is not None)
        wanted = 0
        if conversation.compact_history and (first_kept > oldest or sum(weights[dropped:]) > SUMMARY_AT * room):
            half = dropped + fitting(weights[dropped:], starts[dropped:], room // 2)
            wanted = kept[half].place.position if half < len(kept) else end
        if summary:
            messages = (Message(Role.SYSTEM, (TextPart(summary_text(summary)),)), *messages)
        return Shown(History(messages, first_kept - oldest, summarised=bool(summary)), wanted)

    async def _weight(self, stored: StoredMessage, deployment: Deployment) -> int:
        if stored.token_family == tokens_of(deployment) and stored.prompt_tokens:
            return stored.prompt_tokens
        return await self.weigh(stored.message, deployment)

    @staticmethod
    def _is_on(path: Sequence[Segment], conversation: Conversation) -> bool:
        """Whether what the summary stands for is part of this path."""
        at = conversation.summary_at
        return bool(conversation.summary) and any(
            each.branch == at.branch and each.first <= at.position - 1 < each.end for each in path
        )
