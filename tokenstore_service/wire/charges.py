"""Charge events as they travel, by RPC and by Kafka."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from creditmesh.events.v1 import charge_requested_pb2, reward_requested_pb2
from creditmesh.tokenstore.v1 import charge_service_pb2
from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message

from metering.wire import quote_from_proto, quote_to_proto, usage_from_proto, usage_to_proto
from servicekit.core.errors import InvalidField
from servicekit.kafka.events import JSON, header_of
from servicekit.rpc.times import timestamp_from_proto, timestamp_to_proto
from servicekit.rpc.validation import RequestValidator
from tokenstore_service.domain.commands import ChargeIssue, ChargeRecorded, RecordCharge
from tokenstore_service.usecases.ports import EncodedIssue
from tokenstore_service.wire.usage_events import (
    USAGE_RECORDED,
    USAGE_TOPIC,
    USAGE_TYPE,
    usage_charge_from_bytes,
    usage_charge_to_proto,
)

CHARGES_TOPIC = "creditmesh.charges.v1"
REWARDS_TOPIC = "creditmesh.rewards.v1"
DEAD_LETTERS_TOPIC = "creditmesh.dlq.v1"
CHARGE_REQUESTED = "credit.charge.requested"
REWARD_REQUESTED = "billing.reward.requested"
CHARGE_TYPE = "creditmesh.events.v1.ChargeRequested"
DEFAULT_SCENE = "chat"


@dataclass(frozen=True, slots=True)
class RewardAsked:
    """An event that earns, before its rule is known."""

    event_id: str
    user_id: str
    source: str
    source_ref_id: str


def charge_from_proto(message: charge_requested_pb2.ChargeRequested, *, now: datetime, field: str = "") -> RecordCharge:
    """Raises InvalidField for a time out of range."""
    occurred_at = now
    if message.HasField("occurred_at"):
        occurred_at = timestamp_from_proto(message.occurred_at, field=f"{field}occurred_at")
    return RecordCharge(
        event_id=message.event_id, user_id=message.user_id, call_id=UUID(message.call_id) if message.call_id else None,
        request_id=message.request_id, scene=message.scene or DEFAULT_SCENE, provider=message.provider,
        model=message.model, usage=usage_from_proto(message.usage),
        quote=quote_from_proto(message.quote) if message.HasField("quote") else None, occurred_at=occurred_at,
        skip_charge=message.skip_charge, conversation_id=message.conversation_id, labels=dict(message.labels),
    )


def charge_to_proto(charge: RecordCharge) -> charge_requested_pb2.ChargeRequested:
    assert charge.usage is not None
    return charge_requested_pb2.ChargeRequested(
        event_id=charge.event_id, call_id=str(charge.call_id or ""), user_id=charge.user_id,
        request_id=charge.request_id, scene=charge.scene, provider=charge.provider, model=charge.model,
        usage=usage_to_proto(charge.usage), quote=quote_to_proto(charge.quote) if charge.quote else None,
        occurred_at=timestamp_to_proto(charge.occurred_at), skip_charge=charge.skip_charge,
        conversation_id=charge.conversation_id, labels=dict(charge.labels),
    )


def issue_original(issue: ChargeIssue) -> EncodedIssue:
    original = issue.original
    if original.units is not None:
        return EncodedIssue(usage_charge_to_proto(original).SerializeToString(deterministic=True), USAGE_TYPE)
    return EncodedIssue(charge_to_proto(original).SerializeToString(deterministic=True), CHARGE_TYPE)


def record_result_to_proto(answer: ChargeRecorded) -> charge_service_pb2.RecordResult:
    return charge_service_pb2.RecordResult(
        status=charge_service_pb2.RecordStatus.ValueType(answer.status), seq=answer.seq,
        credit_micros=answer.credit_micros, detail=answer.detail,
    )


class UndecodableEvent(Exception):
    """The record is no event of its topic; the text says why."""

    def __init__(self, reason: str, *, user_id: str = "", event_id: str = "") -> None:
        super().__init__(reason)
        self.user_id = user_id
        self.event_id = event_id


def command_from_record(
    topic: str, value: bytes | None, headers: Sequence[tuple[str, bytes]], *, validator: RequestValidator,
    now: datetime,
) -> RecordCharge | RewardAsked:
    """What a Kafka record asks for, by its topic (without the prefix); protobuf, or JSON by its content type. Raises
    UndecodableEvent."""
    expected, read = READERS[topic]
    event_type = header_of(headers, "ce_type")
    if event_type is not None and event_type != expected.encode():
        raise UndecodableEvent(f"ce_type is {event_type!r}")
    content_type = (header_of(headers, "content-type") or b"").partition(b";")[0].strip()
    try:
        return read(
            value or b"", content_type == JSON, (header_of(headers, "ce_id") or b"").decode(), validator, now
        )
    except (DecodeError, json_format.ParseError, InvalidField, UnicodeDecodeError) as error:
        raise UndecodableEvent(str(error)) from None


def charge_from_original(
    content_type: str, origin: str, original: bytes, *, validator: RequestValidator, now: datetime
) -> RecordCharge:
    """What an issue was about; a Kafka record is read again by its topic and headers. Raises UndecodableEvent."""
    topic = {CHARGE_TYPE: CHARGES_TOPIC, USAGE_TYPE: USAGE_TOPIC}.get(content_type, "")
    headers: list[tuple[str, bytes]] = []
    if origin:
        came = json.loads(origin)
        topic = next((name for name in (CHARGES_TOPIC, USAGE_TOPIC) if came["topic"].endswith(name)), "")
        headers = [(name, value.encode()) for name, value in came["headers"]]
    if not topic:
        raise UndecodableEvent("only charges and usage can be retried here; send it again with `replay`")
    command = command_from_record(topic, original, headers, validator=validator, now=now)
    assert isinstance(command, RecordCharge)
    return command


def _parsed(message: Message, value: bytes, is_json: bool, validator: RequestValidator) -> None:
    if is_json:
        json_format.Parse(value, message, ignore_unknown_fields=True)
    else:
        message.ParseFromString(value)
    validator.check(message)


def _read_charge(
    value: bytes, is_json: bool, event_id: str, validator: RequestValidator, now: datetime
) -> RecordCharge:
    message = charge_requested_pb2.ChargeRequested()
    _parsed(message, value, is_json, validator)
    return charge_from_proto(message, now=now)


def _read_usage(
    value: bytes, is_json: bool, event_id: str, validator: RequestValidator, now: datetime
) -> RecordCharge:
    return usage_charge_from_bytes(value, is_json=is_json, now=now, event_id=event_id)


def _read_reward(
    value: bytes, is_json: bool, event_id: str, validator: RequestValidator, now: datetime
) -> RewardAsked:
    message = reward_requested_pb2.RewardRequested()
    if is_json:
        json_format.Parse(value, message, ignore_unknown_fields=True)
    else:
        message.ParseFromString(value)
    message.event_id = message.event_id or event_id
    validator.check(message)
    return RewardAsked(message.event_id, message.user_id, message.source, message.source_ref_id)


Reader = Callable[[bytes, bool, str, RequestValidator, datetime], RecordCharge | RewardAsked]
READERS: dict[str, tuple[str, Reader]] = {
    CHARGES_TOPIC: (CHARGE_REQUESTED, _read_charge),
    USAGE_TOPIC: (USAGE_RECORDED, _read_usage),
    REWARDS_TOPIC: (REWARD_REQUESTED, _read_reward),
}
