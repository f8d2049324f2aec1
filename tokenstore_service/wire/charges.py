"""Charge events as they travel, by RPC and by Kafka."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from creditmesh.events.v1 import charge_requested_pb2
from creditmesh.tokenstore.v1 import charge_service_pb2
from google.protobuf import json_format
from google.protobuf.message import DecodeError

from metering.wire import quote_from_proto, quote_to_proto, usage_from_proto, usage_to_proto
from servicekit.core.errors import InvalidField
from servicekit.kafka.events import JSON, header_of
from servicekit.rpc.times import timestamp_from_proto, timestamp_to_proto
from servicekit.rpc.validation import RequestValidator
from tokenstore_service.domain.commands import ChargeIssue, ChargeRecorded, RecordCharge

CHARGES_TOPIC = "creditmesh.charges.v1"
DEAD_LETTERS_TOPIC = "creditmesh.dlq.v1"
CHARGE_REQUESTED = "credit.charge.requested"
DEFAULT_SCENE = "chat"


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
        skip_charge=message.skip_charge, conversation_id=message.conversation_id,
    )


def charge_to_proto(charge: RecordCharge) -> charge_requested_pb2.ChargeRequested:
    return charge_requested_pb2.ChargeRequested(
        event_id=charge.event_id, call_id=str(charge.call_id or ""), user_id=charge.user_id,
        request_id=charge.request_id, scene=charge.scene, provider=charge.provider, model=charge.model,
        usage=usage_to_proto(charge.usage), quote=quote_to_proto(charge.quote) if charge.quote else None,
        occurred_at=timestamp_to_proto(charge.occurred_at), skip_charge=charge.skip_charge,
        conversation_id=charge.conversation_id,
    )


def issue_original_to_bytes(issue: ChargeIssue) -> bytes:
    return charge_to_proto(issue.original).SerializeToString(deterministic=True)


def record_result_to_proto(answer: ChargeRecorded) -> charge_service_pb2.RecordResult:
    return charge_service_pb2.RecordResult(
        status=charge_service_pb2.RecordStatus.ValueType(answer.status), seq=answer.seq,
        credit_micros=answer.credit_micros, detail=answer.detail,
    )


class UndecodableEvent(Exception):
    """The record is no charge event; the text says why."""


def charge_from_record(
    value: bytes | None, headers: list[tuple[str, bytes]], *, validator: RequestValidator, now: datetime
) -> RecordCharge:
    """A Kafka record's charge; protobuf, or JSON by its content type. Raises UndecodableEvent."""
    event_type = header_of(headers, "ce_type")
    if event_type is not None and event_type != CHARGE_REQUESTED.encode():
        raise UndecodableEvent(f"ce_type is {event_type!r}")
    message = charge_requested_pb2.ChargeRequested()
    try:
        if header_of(headers, "content-type") == JSON:
            json_format.Parse(value or b"", message, ignore_unknown_fields=True)
        else:
            message.ParseFromString(value or b"")
        validator.check(message)
        return charge_from_proto(message, now=now)
    except (DecodeError, json_format.ParseError, InvalidField, UnicodeDecodeError) as error:
        raise UndecodableEvent(str(error)) from None
