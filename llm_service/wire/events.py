"""The events that llm_service sends."""

from __future__ import annotations

from collections.abc import Iterator

from creditmesh.events.v1 import charge_requested_pb2, turn_completed_pb2

from llm_service.domain.call import CallRecord
from llm_service.domain.chat import Message, TextPart
from llm_service.usecases.ports import TurnEnd
from metering.wire import quote_to_proto, usage_to_proto
from servicekit.rpc.times import timestamp_to_proto
from servicekit.sealing import Sealer

TURN_COMPLETED = "chat.turn.completed"
TURNS_TOPIC = "creditmesh.turns.v1"
MOST_TEXT_BYTES = 16_384
MOST_CONTEXT_BYTES = 2_048
"""What a turn tells of each message at most."""
CHARGE_REQUESTED = "credit.charge.requested"
CHARGES_TOPIC = "creditmesh.charges.v1"


def charge_event_id(record: CallRecord, *, corrects: bool) -> str:
    """The call id; a correction has an id of its own."""
    return f"correct:{record.call_id}" if corrects else str(record.call_id)


def charge_requested_to_bytes(record: CallRecord, *, corrects: bool = False) -> bytes:
    """The charge event of a settled call, or the one that corrects it."""
    billing = record.billing
    call_id = str(record.call_id)
    return charge_requested_pb2.ChargeRequested(
        event_id=charge_event_id(record, corrects=corrects), call_id=call_id, user_id=billing.user_id,
        request_id=billing.request_id,
        scene=billing.scene, provider=record.price_provider, model=record.model, usage=usage_to_proto(record.usage),
        quote=quote_to_proto(record.quote) if record.quote else None,
        occurred_at=timestamp_to_proto(record.ended_at or record.created_at), skip_charge=billing.skip_charge,
        conversation_id=billing.conversation_id, labels=billing.labels,
    ).SerializeToString()


def charge_requested_from_bytes(payload: bytes) -> charge_requested_pb2.ChargeRequested:
    return charge_requested_pb2.ChargeRequested.FromString(payload)


def turn_completed_to_bytes(end: TurnEnd, record: CallRecord, sealer: Sealer) -> bytes:
    """What was said in a turn; texts only, each shortened, and sealed where there is a key for that."""
    turn = end.turn
    said = [(each.message, str(each.message_id)) for each in turn.asked] + [(end.message, str(turn.message_id))]
    content = turn_completed_pb2.TurnContent(
        messages=_told(said[-64:], most_bytes=MOST_TEXT_BYTES),
        context=_told([(each.message, str(each.message_id)) for each in turn.context], most_bytes=MOST_CONTEXT_BYTES),
    )
    event = turn_completed_pb2.TurnCompleted(
        user_id=turn.user_id, conversation_id=str(turn.conversation_id), message_id=str(turn.message_id),
        occurred_at=timestamp_to_proto(record.ended_at or record.created_at), memory_ids=turn.memory_ids,
        call_id=str(record.call_id), traceparent=end.traceparent,
    )
    if sealer.can_seal:
        event.sealed = sealer.seal(content.SerializeToString(), bound_to=f"{event.user_id}/{event.message_id}")
    else:
        event.messages.extend(content.messages)
        event.context.extend(content.context)
    return event.SerializeToString()


def turn_key(user_id: str, *, by_kafka: bool) -> str:
    """In the outbox. Kafka parts by user; delivered directly, turns have an order of their own, so that a memory
    service that is away holds up no charge."""
    return user_id if by_kafka else f"turns:{user_id}"


def turn_completed_from_bytes(payload: bytes) -> turn_completed_pb2.TurnCompleted:
    return turn_completed_pb2.TurnCompleted.FromString(payload)


def _told(messages: list[tuple[Message, str]], *, most_bytes: int) -> Iterator[turn_completed_pb2.TurnMessage]:
    for message, message_id in messages:
        text = "".join(part.text for part in message.parts if isinstance(part, TextPart))
        cut = text.encode()[:most_bytes].decode(errors="ignore")
        yield turn_completed_pb2.TurnMessage(
            role=turn_completed_pb2.TurnMessage.Role.ValueType(message.role), text=cut, message_id=message_id
        )
