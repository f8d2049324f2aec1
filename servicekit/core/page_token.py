"""Opaque page tokens: the key of the last row of a page, bound to the question that was asked."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import datetime

from servicekit.core.errors import InvalidField


def _digest(question: Sequence[object]) -> str:
    return hashlib.sha256(repr(tuple(question)).encode()).hexdigest()[:12]


def encode_page_token(key: Sequence[str | int], *, question: Sequence[object]) -> str:
    """Token for the page after `key`; usable only with the same `question` (the filters)."""
    return base64.urlsafe_b64encode(json.dumps([_digest(question), *key]).encode()).decode()


def decode_page_token(token: str, *, question: Sequence[object], types: Sequence[type]) -> list[str | int] | None:
    """The key in `token`, or None for the first page. Raises InvalidField for a foreign or damaged token."""
    if not token:
        return None
    try:
        digest, *key = json.loads(base64.urlsafe_b64decode(token.encode()))
    except (ValueError, TypeError):
        raise InvalidField.of("page_token", "is not a token of this list") from None
    in_range = all(type(part) is wanted for part, wanted in zip(key, types, strict=False))
    small = all(not isinstance(part, int) or 0 <= part < 2**63 for part in key)
    clean = all(not isinstance(part, str) or "\x00" not in part for part in key)
    if digest != _digest(question) or len(key) != len(types) or not (in_range and small and clean):
        raise InvalidField.of("page_token", "belongs to another list or other filters")
    return list(key)


def decode_time_token(token: str, *, question: Sequence[object]) -> tuple[datetime, str] | None:
    """As decode_page_token, for keys of a time in ISO 8601 and an id."""
    key = decode_page_token(token, question=question, types=(str, str))
    if key is None:
        return None
    try:
        moment = datetime.fromisoformat(str(key[0]))
    except ValueError:
        raise InvalidField.of("page_token", "is not a token of this list") from None
    if moment.tzinfo is None:
        raise InvalidField.of("page_token", "is not a token of this list")
    return moment, str(key[1])
