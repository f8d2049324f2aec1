"""Turns as they travel."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from creditmesh.events.v1 import turn_completed_pb2
from google.protobuf.message import DecodeError

from memory_worker.domain.job import Said, TurnText
from memory_worker.usecases.ports import Turn
from servicekit.rpc.times import timestamp_from_proto

TURN_COMPLETED = "chat.turn.completed"
TURNS_TOPIC = "creditmesh.turns.v1"
DEAD_LETTERS_TOPIC = "creditmesh.dlq.v1"


class UndecodableTurn(Exception):
    """Bytes that are no turn; the text holds no content."""


def turn_from_proto(turn: turn_completed_pb2.TurnCompleted, *, now: datetime) -> Turn:
    """Raises InvalidField."""
    return Turn(
        user_id=turn.user_id, conversation_id=turn.conversation_id, message_id=turn.message_id,
        occurred_at=(
            timestamp_from_proto(turn.occurred_at, field="occurred_at") if turn.HasField("occurred_at") else now
        ),
        text=TurnText(_said(turn.messages), _said(turn.context), tuple(turn.memory_ids), turn.traceparent),
    )


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
