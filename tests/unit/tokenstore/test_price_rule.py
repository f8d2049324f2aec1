"""What price rules mean, and which one matches."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenstore_service.domain.errors import AmountOutOfRange
from tokenstore_service.domain.price_rule import (
    PriceBook,
    PriceRule,
    PriceRuleStatus,
    match_rule,
    rate_pico,
    with_rates,
)

NOW = datetime(2026, 6, 1, tzinfo=UTC)


def rule(rule_id: str = "r", **fields: object) -> PriceRule:
    values: dict[str, object] = {
        "version": 1, "scene": "*", "provider": "*", "model": "*", "currency": "CNY", "input_price": 3_200_000,
        "output_price": 16_000_000, "cached_input_price": 800_000, "cache_write_price": None, "reasoning_price": None,
        "input_audio_price": None, "output_audio_price": None, "per_call_price": 0, "credits_per_currency_unit": 100,
        "markup_bps": 0, "priority": 0, "status": PriceRuleStatus.ACTIVE, "valid_from": None, "valid_to": None,
        "description": "", "created_at": NOW - timedelta(days=1), **fields,
    }
    return with_rates(PriceRule(rule_id=rule_id, **values))  # type: ignore[arg-type]


def matched(rules: list[PriceRule], at: datetime = NOW) -> str | None:
    found = match_rule(rules, scene="chat", provider="LOCAL", model="pro", at=at)
    return found.rule_id if found else None


@given(st.integers(0, 10**12), st.integers(1, 10**6), st.integers(-10_000, 10**6))
def test_a_rate_is_the_exact_value_rounded_half_up(price: int, credits_per_unit: int, markup: int) -> None:
    exact = Fraction(price * credits_per_unit * (10_000 + markup), 10_000)
    expected = math.floor(exact + Fraction(1, 2))
    assert rate_pico(price, credits_per_currency_unit=credits_per_unit, markup_bps=markup) == expected


def test_absent_prices_follow_input_and_output_and_zero_stays_zero() -> None:
    rates = rule(cached_input_price=0).rates
    assert rates.cached_input_pico == 0
    assert rates.cache_write_pico == rates.input_pico == 320_000_000
    assert rates.reasoning_pico == rates.output_pico == 1_600_000_000


def test_a_token_dearer_than_a_credit_is_refused() -> None:
    with pytest.raises(AmountOutOfRange):
        rule(output_price=10**12)


def test_exact_beats_any_by_model_then_provider_then_scene() -> None:
    rules = [
        rule("any", priority=100), rule("scene", scene="chat", priority=50), rule("provider", provider="LOCAL"),
        rule("model", model="pro"), rule("both", model="pro", provider="LOCAL"),
    ]
    for expected in ("both", "model", "provider", "scene", "any"):
        assert matched(rules) == expected
        rules = [each for each in rules if each.rule_id != expected]
    assert matched(rules) is None


def test_then_priority_then_the_newest_decides() -> None:
    older, newer = rule("older"), rule("newer", created_at=NOW - timedelta(hours=1))
    assert matched([older, newer]) == "newer"
    assert matched([replace(older, priority=1), newer]) == "older"


def test_names_match_whatever_their_case() -> None:
    assert matched([rule("r", model="PRO", provider="local")]) == "r"


def test_only_rules_in_effect_match_and_the_newest_version_counts() -> None:
    assert matched([rule(valid_from=NOW + timedelta(seconds=1))]) is None
    assert matched([rule(valid_to=NOW)]) is None
    assert matched([rule(created_at=NOW + timedelta(seconds=1))]) is None
    switched_off = rule(version=2, status=PriceRuleStatus.INACTIVE, created_at=NOW - timedelta(minutes=1))
    assert matched([rule(), switched_off]) is None
    assert matched([rule(), switched_off], at=NOW - timedelta(minutes=2)) == "r"


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 5)), max_size=6), st.integers(0, 12))
def test_the_price_book_remembers_what_matching_would_say(
    spans: list[tuple[int, int, int]], hour: int
) -> None:
    rules = [
        rule(f"r{number}", priority=priority, valid_from=NOW + timedelta(hours=begin),
             valid_to=NOW + timedelta(hours=begin + length))
        for number, (priority, begin, length) in enumerate(spans)
    ]
    book = PriceBook(rules)
    for at in (NOW + timedelta(hours=hour), NOW + timedelta(hours=hour, minutes=30), NOW):
        expected = match_rule(rules, scene="chat", provider="LOCAL", model="pro", at=at)
        assert book.match(scene="chat", provider="LOCAL", model="pro", at=at) == expected
