"""Usage that comes in pieces, put together by how its server tells it."""

from __future__ import annotations

from llm_service.domain.quirks import UsageArrival
from metering.usage import Usage, UsageSource


def merge_usage(arrival: UsageArrival, known: Usage | None, told: Usage) -> Usage:
    """The usage so far. Cumulative and final tell the whole: the newest holds, so that a lower count is a correction
    and not lost in a maximum; deltas are added."""
    if known is None or arrival is not UsageArrival.DELTA:
        return told
    return add_usage(known, told)


def add_usage(first: Usage, second: Usage) -> Usage:
    """Both together; estimated when either is."""
    return Usage(
        input_tokens=first.input_tokens + second.input_tokens,
        cached_input_tokens=first.cached_input_tokens + second.cached_input_tokens,
        cache_write_tokens=first.cache_write_tokens + second.cache_write_tokens,
        output_tokens=first.output_tokens + second.output_tokens,
        reasoning_tokens=first.reasoning_tokens + second.reasoning_tokens,
        input_audio_tokens=first.input_audio_tokens + second.input_audio_tokens,
        output_audio_tokens=first.output_audio_tokens + second.output_audio_tokens,
        source=UsageSource.ESTIMATED if UsageSource.ESTIMATED in (first.source, second.source) else first.source,
    )
