"""A payment provider's confirmation: who signed it, when, and whether it is for this order."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass

from tokenstore_service.domain.errors import PaymentRefused
from tokenstore_service.domain.order import Order

TOLERANCE_SECONDS = 300
MOCK = "mock"


@dataclass(frozen=True, slots=True)
class Confirmation:
    """What came: `signature` is HMAC-SHA256 in hexadecimal over `timestamp.payload`, `timestamp` seconds since 1970."""

    provider: str
    payload: str
    signature: str
    timestamp: int


def signature_of(secret: str, *, timestamp: int, payload: str) -> str:
    return hmac.new(secret.encode(), f"{timestamp}.{payload}".encode(), hashlib.sha256).hexdigest()


def check_signature(confirmation: Confirmation, secrets: Sequence[str], *, now_seconds: float) -> None:
    """One of the secrets must have signed it, not long ago. Takes as long for a wrong signature as for a right one.
    Raises PaymentRefused."""
    matches = [
        hmac.compare_digest(
            signature_of(secret, timestamp=confirmation.timestamp, payload=confirmation.payload).encode(),
            confirmation.signature.lower().encode(),
        )
        for secret in secrets
    ]
    if not any(matches):
        raise PaymentRefused("the signature is not one of the provider's")
    if abs(now_seconds - confirmation.timestamp) > TOLERANCE_SECONDS:
        raise PaymentRefused(f"the timestamp is more than {TOLERANCE_SECONDS} s off")


def payment_reference(confirmation: Confirmation, order: Order) -> str:
    """The provider's number of the payment; the payload must be for this order and its price. Raises PaymentRefused."""
    if confirmation.provider == MOCK and not confirmation.payload:
        return f"mock-{order.order_no}"
    try:
        said = json.loads(confirmation.payload)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise PaymentRefused("the payload is no JSON object")
    expected = {"order_id": str(order.order_id), "amount_cent": order.amount_cent, "currency": order.currency}
    for name, value in expected.items():
        if str(said.get(name)) != str(value):
            raise PaymentRefused(f"the payload's {name} is not the order's", field=name)
    reference = said.get("reference", "")
    if not isinstance(reference, str) or not 1 <= len(reference) <= 128 or not reference.isprintable():
        raise PaymentRefused("the payload's reference must have 1 to 128 printable characters", field="reference")
    return reference
