"""Usage times rates, in exact integers, rounded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from operator import attrgetter
from typing import NamedTuple

from metering.usage import Usage

PICO_PER_MICRO = 1_000_000
MOST_RATE_PICO = 10**12
"""One credit per token. With it and 10^9 tokens a charge stays below 10^16 micro-credits, well inside int64."""
MOST_PER_CALL_PICO = 10**18


@dataclass(frozen=True, slots=True)
class Rates:
    """Pico-credits (10^-12 credit) for one token of each kind, and for the call itself."""

    input_pico: int = 0
    cached_input_pico: int = 0
    cache_write_pico: int = 0
    output_pico: int = 0
    reasoning_pico: int = 0
    input_audio_pico: int = 0
    output_audio_pico: int = 0
    per_call_pico: int = 0


numbers_of: Callable[[Rates], tuple[int, ...]] = attrgetter(*(each.name for each in fields(Rates)))
"""Rates as they are kept: in the order of their fields. dataclasses.astuple copies each, and shows in profiles."""


@dataclass(frozen=True, slots=True)
class Quote:
    """A price as it was when the hold was made."""

    rule_id: str
    version: int
    rates: Rates


def dearest(several: Sequence[Rates]) -> Rates:
    """The highest price of each kind: what a call may cost whichever of them serves it."""
    return Rates(*(max(numbers) for numbers in zip(*map(numbers_of, several), strict=True)))


class Line(NamedTuple):
    """One component of a charge; amount_pico = tokens x rate_pico."""

    component: str
    tokens: int
    rate_pico: int
    amount_pico: int


def components_of(usage: Usage) -> tuple[tuple[str, int], ...]:
    """Usage as disjoint components that sum to input_tokens and output_tokens.

    A provider that reports more cached than input tokens is clipped in the order cached, cache write, audio; output in
    the order reasoning, audio. So no token is ever counted twice.
    """
    cached = min(usage.cached_input_tokens, usage.input_tokens)
    cache_write = min(usage.cache_write_tokens, usage.input_tokens - cached)
    input_audio = min(usage.input_audio_tokens, usage.input_tokens - cached - cache_write)
    reasoning = min(usage.reasoning_tokens, usage.output_tokens)
    output_audio = min(usage.output_audio_tokens, usage.output_tokens - reasoning)
    return (
        ("input", usage.input_tokens - cached - cache_write - input_audio),
        ("cached_input", cached),
        ("cache_write", cache_write),
        ("output", usage.output_tokens - reasoning - output_audio),
        ("reasoning", reasoning),
        ("input_audio", input_audio),
        ("output_audio", output_audio),
    )


def lines_of(usage: Usage, rates: Rates) -> list[Line]:
    """The components of a charge, those of no tokens left out; the last is the call itself."""
    rate_of = {
        "input": rates.input_pico, "cached_input": rates.cached_input_pico, "cache_write": rates.cache_write_pico,
        "output": rates.output_pico, "reasoning": rates.reasoning_pico, "input_audio": rates.input_audio_pico,
        "output_audio": rates.output_audio_pico,
    }
    lines = [
        Line(component, tokens, rate_of[component], tokens * rate_of[component])
        for component, tokens in components_of(usage) if tokens
    ]
    if rates.per_call_pico:
        lines.append(Line("call", 1, rates.per_call_pico, rates.per_call_pico))
    return lines


def micros_of(lines: list[Line]) -> int:
    """ceil(sum of amount_pico / 10^6): the one rounding of a charge, in micro-credits."""
    return -(-sum(line.amount_pico for line in lines) // PICO_PER_MICRO)


def charge_micros(usage: Usage, rates: Rates) -> int:
    """Micro-credits for `usage`; the same for ever for the same rates. micros_of(lines_of(...)) without the lines."""
    (_, plain), (_, cached), (_, cache_write), (_, output), (_, reasoning), (_, audio_in), (_, audio_out) = (
        components_of(usage)
    )
    pico = (
        plain * rates.input_pico + cached * rates.cached_input_pico + cache_write * rates.cache_write_pico
        + output * rates.output_pico + reasoning * rates.reasoning_pico + audio_in * rates.input_audio_pico
        + audio_out * rates.output_audio_pico + rates.per_call_pico
    )
    return -(-pico // PICO_PER_MICRO)


def unit_charge_micros(amount: Decimal, unit_pico: int) -> int:
    """ceil(amount x unit_pico / 10^6): micro-credits for `amount` units of something that is not tokens, exact."""
    numerator, denominator = amount.as_integer_ratio()
    return -(-numerator * unit_pico // (denominator * PICO_PER_MICRO))


def bound_micros(*, input_tokens: int, output_tokens: int, rates: Rates) -> int:
    """Most that a call of so many tokens can cost, whatever kind the tokens turn out to be."""
    input_rate = max(rates.input_pico, rates.cached_input_pico, rates.cache_write_pico, rates.input_audio_pico)
    output_rate = max(rates.output_pico, rates.reasoning_pico, rates.output_audio_pico)
    pico = input_tokens * input_rate + output_tokens * output_rate + rates.per_call_pico
    return -(-pico // PICO_PER_MICRO)


def affordable_output_tokens(*, input_tokens: int, available_micros: int, rates: Rates, most: int) -> int:
    """Most output tokens, at most `most`, whose bound fits into `available_micros`; -1 when not even none do."""
    if bound_micros(input_tokens=input_tokens, output_tokens=0, rates=rates) > available_micros:
        return -1
    output_rate = max(rates.output_pico, rates.reasoning_pico, rates.output_audio_pico)
    if output_rate == 0:
        return most
    input_rate = max(rates.input_pico, rates.cached_input_pico, rates.cache_write_pico, rates.input_audio_pico)
    left_pico = available_micros * PICO_PER_MICRO - input_tokens * input_rate - rates.per_call_pico
    return min(most, left_pico // output_rate)
