"""Price rules: what they mean for one token, and which one matches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import IntEnum

from metering.charge import MOST_PER_CALL_PICO, MOST_RATE_PICO, Quote, Rates
from tokenstore_service.domain.errors import AmountOutOfRange
from tokenstore_service.domain.period import EPOCH

ANY = "*"
FULL_BPS = 10_000


class PriceRuleStatus(IntEnum):
    """Whether a rule is used; numbers as on the wire."""

    ACTIVE = 1
    INACTIVE = 2


@dataclass(frozen=True, slots=True)
class UnitPrice:
    """Micro-units of the currency for one unit of something that is not tokens."""

    unit_type: str
    price_micros: int


@dataclass(frozen=True, slots=True)
class PriceRule:
    """One version of a rule; it never changes. Prices are micro-units of `currency` for a million tokens."""

    rule_id: str
    version: int
    scene: str
    provider: str
    model: str
    currency: str
    input_price: int
    output_price: int
    cached_input_price: int | None
    cache_write_price: int | None
    reasoning_price: int | None
    input_audio_price: int | None
    output_audio_price: int | None
    per_call_price: int
    credits_per_currency_unit: int
    markup_bps: int
    priority: int
    status: PriceRuleStatus
    valid_from: datetime | None
    valid_to: datetime | None
    description: str
    created_at: datetime
    rates: Rates = Rates()
    unit_prices: tuple[UnitPrice, ...] = ()

    @property
    def effective_from(self) -> datetime:
        return self.valid_from or self.created_at

    def unit_pico(self, unit_type: str) -> int:
        """Pico-credits for one unit. Raises KeyError."""
        prices = {price.unit_type: price.price_micros for price in self.unit_prices}
        return rate_pico(
            prices[unit_type] * 1_000_000, credits_per_currency_unit=self.credits_per_currency_unit,
            markup_bps=self.markup_bps,
        )

    def prices_unit(self, unit_type: str) -> bool:
        return any(price.unit_type == unit_type for price in self.unit_prices)

    @property
    def quote(self) -> Quote:
        return Quote(self.rule_id, self.version, self.rates)


def rate_pico(price_micros: int, *, credits_per_currency_unit: int, markup_bps: int) -> int:
    """price x credits x (1 + markup), rounded half up once, in pico-credits for one token.

    Micro-units for 10^6 tokens are pico-units for one, so the price needs no scaling.
    """
    scaled = price_micros * credits_per_currency_unit * (FULL_BPS + markup_bps)
    return (2 * scaled + FULL_BPS) // (2 * FULL_BPS)


def with_rates(rule: PriceRule) -> PriceRule:
    """The rule with what it means for one token. Raises AmountOutOfRange."""

    def rate(price: int | None, otherwise: int) -> int:
        return rate_pico(
            otherwise if price is None else price,
            credits_per_currency_unit=rule.credits_per_currency_unit, markup_bps=rule.markup_bps,
        )

    rates = Rates(
        input_pico=rate(rule.input_price, 0),
        cached_input_pico=rate(rule.cached_input_price, rule.input_price),
        cache_write_pico=rate(rule.cache_write_price, rule.input_price),
        output_pico=rate(rule.output_price, 0),
        reasoning_pico=rate(rule.reasoning_price, rule.output_price),
        input_audio_pico=rate(rule.input_audio_price, rule.input_price),
        output_audio_pico=rate(rule.output_audio_price, rule.output_price),
        per_call_pico=rate(rule.per_call_price * 1_000_000, 0),
    )
    per_token = (
        rates.input_pico, rates.cached_input_pico, rates.cache_write_pico, rates.output_pico, rates.reasoning_pico,
        rates.input_audio_pico, rates.output_audio_pico,
    )
    per_unit = max((rule.unit_pico(price.unit_type) for price in rule.unit_prices), default=0)
    if max(per_token) > MOST_RATE_PICO or max(rates.per_call_pico, per_unit) > MOST_PER_CALL_PICO:
        raise AmountOutOfRange(
            "a token would cost more than one credit, or a call or a unit more than 1 000 000 credits"
        )
    return replace(rule, rates=rates)


def _matches(pattern: str, value: str) -> bool:
    return pattern == ANY or pattern.casefold() == value.casefold()


def _rank(rule: PriceRule) -> tuple[bool, bool, bool, int, datetime, str]:
    return (
        rule.model != ANY, rule.provider != ANY, rule.scene != ANY, rule.priority, rule.effective_from, rule.rule_id
    )


def match_rule(
    rules: Iterable[PriceRule], *, scene: str, provider: str, model: str, at: datetime, unit_type: str = ""
) -> PriceRule | None:
    """The rule for a call at a moment: exact beats "*" (model, provider, scene), then priority, then the newest.

    `rules` are all versions of all rules. Of each rule, the newest version that is in effect counts. With a unit type,
    only rules that price that unit are looked at.
    """
    in_effect: dict[str, PriceRule] = {}
    for rule in rules:
        if rule.effective_from <= at and (rule.valid_to is None or at < rule.valid_to):
            known = in_effect.get(rule.rule_id)
            if known is None or known.version < rule.version:
                in_effect[rule.rule_id] = rule
    candidates = [
        rule for rule in in_effect.values()
        if rule.status is PriceRuleStatus.ACTIVE and _matches(rule.model, model) and _matches(rule.provider, provider)
        and _matches(rule.scene, scene) and (not unit_type or rule.prices_unit(unit_type))
    ]
    return max(candidates, key=_rank, default=None)


def overlapping_rule(rules: Iterable[PriceRule], draft: PriceRule) -> PriceRule | None:
    """Another active rule for the same calls, at the same priority, at some moment of the draft's validity.

    `rules` are the newest versions. Such a pair would be told apart by age alone, which nobody means.
    """
    if draft.status is not PriceRuleStatus.ACTIVE:
        return None
    for rule in rules:
        same = all(
            getattr(rule, name).casefold() == getattr(draft, name).casefold() for name in ("scene", "provider", "model")
        )
        if (
            same and rule.rule_id != draft.rule_id and rule.status is PriceRuleStatus.ACTIVE
            and rule.priority == draft.priority
            and (rule.valid_to is None or draft.effective_from < rule.valid_to)
            and (draft.valid_to is None or rule.effective_from < draft.valid_to)
        ):
            return rule
    return None


class PriceBook:
    """All versions of all rules at one moment of loading; matching for "now" is remembered between boundaries."""

    def __init__(self, rules: Sequence[PriceRule] = ()) -> None:
        self._rules = tuple(rules)
        self._by_version = {(rule.rule_id, rule.version): rule for rule in rules}
        self._matched: dict[tuple[str, str, str, str], PriceRule | None] = {}
        self._matched_from = EPOCH
        self._matched_until = EPOCH

    def version(self, rule_id: str, version: int) -> PriceRule | None:
        return self._by_version.get((rule_id, version))

    def with_draft(self, draft: PriceRule) -> PriceBook:
        """The same book with `draft` in the place of the rule with its id, from the beginning of time."""
        others = [rule for rule in self._rules if rule.rule_id != draft.rule_id]
        return PriceBook([*others, draft])

    def match(
        self, *, scene: str, provider: str, model: str, at: datetime, unit_type: str = ""
    ) -> PriceRule | None:
        if not self._matched_from <= at < self._matched_until:
            self._begin_stretch(at)
        key = (scene, provider, model, unit_type)
        if key not in self._matched:
            if len(self._matched) > 10_000:
                self._matched.clear()
            self._matched[key] = match_rule(
                self._rules, scene=scene, provider=provider, model=model, at=at, unit_type=unit_type
            )
        return self._matched[key]

    def _begin_stretch(self, at: datetime) -> None:
        """Between two boundaries of validity every moment gives the same match."""
        boundaries = [rule.effective_from for rule in self._rules] + [
            rule.valid_to for rule in self._rules if rule.valid_to is not None
        ]
        self._matched = {}
        self._matched_from = max((moment for moment in boundaries if moment <= at), default=EPOCH)
        self._matched_until = min(
            (moment for moment in boundaries if moment > at), default=datetime.max.replace(tzinfo=UTC)
        )
