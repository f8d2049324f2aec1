"""Turns as they travel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime

from creditmesh.events.v1 import turn_completed_pb2
from google.protobuf.message import DecodeError

from memory_worker.domain.errors import TurnSealed
from memory_worker.domain.job import Job, Said, TurnText
from memory_worker.usecases.ports import Turn
from servicekit.rpc.times import timestamp_from_proto
from servicekit.sealing import KeyUnknown, SealBroken, Sealer

TURN_COMPLETED = "chat.turn.completed"
TURNS_TOPIC = "creditmesh.turns.v1"
DEAD_LETTERS_TOPIC = "creditmesh.dlq.v1"


class UndecodableTurn(ValueError):
    """Bytes that are no turn; the text holds no content."""


class TurnReader:
    """Turns out of what travels. What was sealed stays so until its job is worked."""

    def __init__(self, sealer: Sealer) -> None:
        self._sealer = sealer

    def turn_of(self, turn: turn_completed_pb2.TurnCompleted, *, now: datetime) -> Turn:
        """Raises InvalidField, TurnSealed, UndecodableTurn."""
        text = TurnText(
            _said(turn.messages), _said(turn.context), tuple(turn.memory_ids), turn.traceparent, turn.sealed
        )
        if turn.sealed:
            self._content_of(turn.user_id, turn.message_id, turn.sealed)
        return Turn(
            user_id=turn.user_id, conversation_id=turn.conversation_id, message_id=turn.message_id,
            occurred_at=(
                timestamp_from_proto(turn.occurred_at, field="occurred_at") if turn.HasField("occurred_at") else now
            ),
            text=text,
        )

    def opened(self, job: Job) -> Job:
        """With its text readable. Raises TurnSealed, UndecodableTurn."""
        if not job.turn.sealed:
            return job
        content = self._content_of(job.user_id, job.message_id, job.turn.sealed)
        return replace(job, turn=replace(
            job.turn, said=_said(content.messages), context=_said(content.context), sealed=b""
        ))

    def _content_of(self, user_id: str, message_id: str, sealed: bytes) -> turn_completed_pb2.TurnContent:
        try:
            data = self._sealer.open(sealed, bound_to=f"{user_id}/{message_id}")
            return turn_completed_pb2.TurnContent.FromString(data)
        except KeyUnknown:
            raise TurnSealed("the turn is sealed under a key that is not in MEMORY_TURN_KEY") from None
        except (SealBroken, DecodeError):
            raise UndecodableTurn("what is sealed is damaged, or of another turn") from None


def turn_event_from_bytes(payload: bytes | None) -> turn_completed_pb2.TurnCompleted:
    """Raises UndecodableTurn."""
    if not payload:
        raise UndecodableTurn("an empty value")
    try:
        return turn_completed_pb2.TurnCompleted.FromString(payload)
    except DecodeError:
        raise UndecodableTurn("the value is no TurnCompleted") from None


def _said(messages: Iterable[turn_completed_pb2.TurnMessage]) -> tuple[Said, ...]:
    return tuple(Said(int(each.role), each.text.replace("\x00", "")) for each in messages)
