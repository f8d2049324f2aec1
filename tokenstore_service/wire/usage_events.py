"""Usage events of other services, as protobuf or as JSON by whoever writes it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any

from creditmesh.events.v1 import usage_recorded_pb2
from google.protobuf import json_format
from google.protobuf.message import DecodeError

from servicekit.core.errors import InvalidField
from servicekit.rpc.times import timestamp_from_proto, timestamp_to_proto
from tokenstore_service.domain.commands import RecordCharge, Units
from tokenstore_service.domain.units import amount_from_text, amount_to_text

USAGE_TOPIC = "creditmesh.usage.v1"
USAGE_RECORDED = "billing.usage.recorded"
USAGE_TYPE = "creditmesh.events.v1.UsageRecorded"
DEFAULT_SCENE = "usage"
MOST_DETAILS = 4096
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
KNOWN = {
    "event_id", "user_id", "product_id", "usage_amount", "unit_type", "usage_details", "occurred_at", "provider",
    "scene", "request_id", "labels",
}


def _text(name: str, value: object, *, least: int, most: int) -> str:
    text = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if value is not None and not text and value != "":
        raise InvalidField.of(name, "must be text")
    if not least <= len(text) <= most:
        raise InvalidField.of(name, f"must have {least} to {most} characters")
    if CONTROL.search(text):
        raise InvalidField.of(name, "must not hold control characters")
    return text


def _details(known: object, unknown: Mapping[str, object]) -> str:
    if known is not None and not isinstance(known, dict):
        raise InvalidField.of("usage_details", "must be an object")
    details = {**unknown, **(known or {})}
    if not details:
        return ""
    text = json.dumps(details, sort_keys=True, separators=(",", ":"), default=float)
    if len(text) > MOST_DETAILS:
        raise InvalidField.of("usage_details", f"must have at most {MOST_DETAILS} bytes as JSON")
    return text


def _labels(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > 16:
        raise InvalidField.of("labels", "must be an object of at most 16 texts")
    return {
        _text("labels", key, least=1, most=64): _text("labels", each, least=0, most=128) for key, each in value.items()
    }


def _amount(value: object) -> Decimal:
    if isinstance(value, Decimal | int) and not isinstance(value, bool):
        return amount_from_text(amount_to_text(Decimal(value)))
    if isinstance(value, str):
        try:
            return amount_from_text(amount_to_text(Decimal(value)))
        except InvalidOperation:
            pass
    raise InvalidField.of("usage_amount", "must be a decimal number")


def _moment(value: object, now: datetime) -> datetime:
    """ISO 8601, or seconds or milliseconds since 1970."""
    if value in (None, ""):
        return now
    try:
        if isinstance(value, str) and not value.isdigit():
            moment = datetime.fromisoformat(value)
            moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
        else:
            seconds = Decimal(str(value))
            micros = int(seconds * (1_000 if seconds >= 10**11 else 1_000_000))
            moment = datetime.fromtimestamp(micros // 1_000_000, UTC).replace(microsecond=micros % 1_000_000)
    except (ValueError, OverflowError, OSError, InvalidOperation):
        raise InvalidField.of("occurred_at", "must be a time such as 2026-01-31T12:00:00Z") from None
    if not 1970 <= moment.year <= 9998:
        raise InvalidField.of("occurred_at", "is out of range")
    return moment


def usage_charge_from_fields(fields: Mapping[str, Any], *, now: datetime, event_id: str = "") -> RecordCharge:
    """`fields` by their names in snake_case; others are kept as details. Raises InvalidField."""
    unknown = {name: value for name, value in fields.items() if name not in KNOWN}
    event = fields.get("event_id")
    return RecordCharge(
        event_id=_text("event_id", event if event not in (None, "") else event_id, least=1, most=128),
        user_id=_text("user_id", fields.get("user_id"), least=1, most=64), call_id=None,
        request_id=_text("request_id", fields.get("request_id"), least=0, most=128),
        scene=_text("scene", fields.get("scene"), least=0, most=64) or DEFAULT_SCENE,
        provider=_text("provider", fields.get("provider"), least=0, most=64),
        model=_text("product_id", fields.get("product_id"), least=1, most=128), usage=None, quote=None,
        occurred_at=_moment(fields.get("occurred_at"), now), labels=_labels(fields.get("labels")),
        units=Units(
            _text("unit_type", fields.get("unit_type"), least=1, most=32).casefold(),
            _amount(fields.get("usage_amount")),
        ),
        details=_details(fields.get("usage_details"), unknown),
    )


def usage_charge_from_proto(
    message: usage_recorded_pb2.UsageRecorded, *, now: datetime, event_id: str = ""
) -> RecordCharge:
    """Raises InvalidField."""
    fields: dict[str, Any] = {
        name: getattr(message, name) for name in KNOWN - {"usage_details", "occurred_at", "labels"}
    }
    fields["labels"] = dict(message.labels)
    if message.HasField("usage_details"):
        fields["usage_details"] = json_format.MessageToDict(message.usage_details)
    moment = timestamp_from_proto(message.occurred_at, field="occurred_at") if message.HasField("occurred_at") else now
    return usage_charge_from_fields(fields, now=moment, event_id=event_id)


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])([A-Z])", lambda match: f"_{match[1].lower()}", name)


def usage_charge_from_bytes(value: bytes, *, is_json: bool, now: datetime, event_id: str = "") -> RecordCharge:
    """Raises InvalidField, whatever the bytes are."""
    if not is_json:
        message = usage_recorded_pb2.UsageRecorded()
        try:
            message.ParseFromString(value)
        except DecodeError:
            raise InvalidField.of("", "the bytes are no UsageRecorded") from None
        return usage_charge_from_proto(message, now=now, event_id=event_id)
    try:
        document = json.loads(value, parse_float=Decimal, parse_constant=str)
    except (ValueError, RecursionError):
        raise InvalidField.of("", "the bytes are no JSON") from None
    if not isinstance(document, dict):
        raise InvalidField.of("", "the JSON is no object")
    known = {_snake(name): value for name, value in document.items() if _snake(name) in KNOWN}
    unknown = {name: value for name, value in document.items() if _snake(name) not in KNOWN}
    return usage_charge_from_fields({**unknown, **known}, now=now, event_id=event_id)


def usage_charge_to_proto(charge: RecordCharge) -> usage_recorded_pb2.UsageRecorded:
    assert charge.units is not None
    message = usage_recorded_pb2.UsageRecorded(
        event_id=charge.event_id, user_id=charge.user_id, product_id=charge.model,
        usage_amount=amount_to_text(charge.units.amount), unit_type=charge.units.unit_type,
        occurred_at=timestamp_to_proto(charge.occurred_at), provider=charge.provider, scene=charge.scene,
        request_id=charge.request_id, labels=dict(charge.labels),
    )
    if charge.details:
        json_format.ParseDict(json.loads(charge.details), message.usage_details)
    return message
