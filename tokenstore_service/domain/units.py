"""Amounts of usage that is not tokens: exact decimals."""

from __future__ import annotations

import re
from decimal import Decimal

from servicekit.core.errors import InvalidField

DECIMAL = re.compile(r"\d{1,18}(\.\d{1,12})?")


def amount_from_text(text: str, *, field: str = "usage_amount") -> Decimal:
    """0 or more, at most 18 digits before and 12 after the point, no exponent. Raises InvalidField."""
    if not DECIMAL.fullmatch(text):
        raise InvalidField.of(field, "must be a decimal number such as 12 or 0.25: at most 18 and 12 digits, no sign")
    return Decimal(text)


def amount_to_text(amount: Decimal) -> str:
    """The shortest text: no exponent, no trailing zeros."""
    text = f"{amount:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
