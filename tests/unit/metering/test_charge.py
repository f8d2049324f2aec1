"""The charge formula against exact fractions."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

from hypothesis import given
from hypothesis import strategies as st

from metering.charge import (
    MOST_RATE_PICO,
    Rates,
    affordable_output_tokens,
    bound_micros,
    charge_micros,
    components_of,
    lines_of,
    micros_of,
)
from metering.usage import Usage

tokens = st.integers(0, 10**9)
rates_pico = st.integers(0, MOST_RATE_PICO)
usages = st.builds(Usage, tokens, tokens, tokens, tokens, tokens, tokens, tokens)
all_rates = st.builds(Rates, *[rates_pico] * 7, st.integers(0, 10**18))


@given(usages)
def test_components_are_disjoint_and_sum_to_input_and_output(usage: Usage) -> None:
    parts = dict(components_of(usage))
    assert all(count >= 0 for count in parts.values())
    inputs = parts["input"] + parts["cached_input"] + parts["cache_write"] + parts["input_audio"]
    assert inputs == usage.input_tokens
    assert parts["output"] + parts["reasoning"] + parts["output_audio"] == usage.output_tokens


@given(usages, all_rates)
def test_a_charge_is_the_exact_sum_rounded_up_once(usage: Usage, rates: Rates) -> None:
    exact = Fraction(rates.per_call_pico, 10**12)
    rate_of = {
        "input": rates.input_pico, "cached_input": rates.cached_input_pico, "cache_write": rates.cache_write_pico,
        "output": rates.output_pico, "reasoning": rates.reasoning_pico, "input_audio": rates.input_audio_pico,
        "output_audio": rates.output_audio_pico,
    }
    for component, count in components_of(usage):
        exact += Fraction(count * rate_of[component], 10**12)
    assert charge_micros(usage, rates) == ceil(exact * 10**6)
    assert micros_of(lines_of(usage, rates)) == charge_micros(usage, rates)


@given(usages, all_rates)
def test_a_charge_never_exceeds_the_bound_of_its_tokens(usage: Usage, rates: Rates) -> None:
    bound = bound_micros(input_tokens=usage.input_tokens, output_tokens=usage.output_tokens, rates=rates)
    assert charge_micros(usage, rates) <= bound


@given(st.integers(0, 10**6), st.integers(0, 10**12), all_rates, st.integers(0, 10**6))
def test_affordable_tokens_fit_and_one_more_would_not(
    input_tokens: int, available: int, rates: Rates, most: int
) -> None:
    affordable = affordable_output_tokens(
        input_tokens=input_tokens, available_micros=available, rates=rates, most=most
    )
    if affordable < 0:
        assert bound_micros(input_tokens=input_tokens, output_tokens=0, rates=rates) > available
        return
    assert affordable <= most
    assert bound_micros(input_tokens=input_tokens, output_tokens=affordable, rates=rates) <= available
    if affordable < most:
        assert bound_micros(input_tokens=input_tokens, output_tokens=affordable + 1, rates=rates) > available
