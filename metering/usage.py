"""Token counts of a call."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class UsageSource(IntEnum):
    """Where token counts come from; numbers as on the wire."""

    PROVIDER_REPORTED = 1
    ESTIMATED = 2
    CORRECTED = 3


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts; input includes cached, cache-write and audio tokens, output includes reasoning and audio tokens."""

    input_tokens: int = 0
    cached_input_tokens: int = 0
    cache_write_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    input_audio_tokens: int = 0
    output_audio_tokens: int = 0
    source: UsageSource = UsageSource.PROVIDER_REPORTED
