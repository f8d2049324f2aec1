"""Identities as an argument: the only place that draws random ones."""

from __future__ import annotations

import os
import time
from typing import Protocol
from uuid import UUID


class IdSource(Protocol):
    """Makes identities that sort by the time they were made."""

    def new_id(self) -> UUID: ...


def uuid7_from(*, milliseconds: int, random_bits: int) -> UUID:
    """UUIDv7 by RFC 9562 section 5.7: 48 bits of Unix milliseconds, then 74 random bits."""
    high = (random_bits >> 62) & 0xFFF
    low = random_bits & ((1 << 62) - 1)
    value = (milliseconds & ((1 << 48) - 1)) << 80 | 0x7 << 76 | high << 64 | 0b10 << 62 | low
    return UUID(int=value)


class RandomIdSource:
    """UUIDv7 of the machine's clock and the kernel's randomness."""

    def new_id(self) -> UUID:
        return uuid7_from(
            milliseconds=time.time_ns() // 1_000_000, random_bits=int.from_bytes(os.urandom(10), "big") >> 6
        )
