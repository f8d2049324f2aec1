"""Price rules: made, versioned, listed, quoted."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from metering.charge import Quote, charge_micros
from metering.usage import Usage
from servicekit.core.clock import Clock
from servicekit.core.errors import IdempotencyConflict, InvalidField
from servicekit.core.ids import IdSource
from servicekit.core.page_token import decode_time_token, encode_page_token
from tokenstore_service.domain.errors import NoPrice, PriceRuleNotFound
from tokenstore_service.domain.price_rule import PriceRule, PriceRuleStatus, with_rates
from tokenstore_service.usecases.ports import PriceRules, Prices, VersionTaken


def _same_content(stored: PriceRule, wanted: PriceRule, *, ignore_id: bool) -> bool:
    rule_id = stored.rule_id if ignore_id else wanted.rule_id
    alike = replace(
        wanted, rule_id=rule_id, version=stored.version, rates=stored.rates, created_at=stored.created_at
    )
    return alike == stored


def _check(draft: PriceRule) -> None:
    if draft.valid_from and draft.valid_to and draft.valid_to <= draft.valid_from:
        raise InvalidField.of("price_rule.valid_to", "must be after valid_from")


async def create_price_rule(
    rules: PriceRules, prices: Prices, draft: PriceRule, *, idempotency_key: str, clock: Clock, ids: IdSource
) -> PriceRule:
    """Version 1. Raises IdempotencyConflict, InvalidField, AmountOutOfRange."""
    _check(draft)
    earlier = await rules.by_key(idempotency_key)
    if earlier is None:
        rule = with_rates(replace(draft, rule_id=str(ids.new_id()), version=1, created_at=clock.now()))
        earlier = await rules.add(rule, idempotency_key=idempotency_key)
        await prices.refresh()
    if earlier.version != 1 or not _same_content(earlier, draft, ignore_id=True):
        raise IdempotencyConflict("the idempotency key was used for another price rule", rule_id=earlier.rule_id)
    return earlier


async def update_price_rule(
    rules: PriceRules, prices: Prices, draft: PriceRule, *, idempotency_key: str, clock: Clock
) -> PriceRule:
    """The next version. Raises PriceRuleNotFound, IdempotencyConflict, InvalidField, AmountOutOfRange."""
    _check(draft)
    earlier = await rules.by_key(idempotency_key)
    while earlier is None:
        newest = await rules.newest(draft.rule_id)
        if newest is None:
            raise PriceRuleNotFound("there is no such price rule")
        rule = with_rates(replace(draft, version=newest.version + 1, created_at=clock.now()))
        try:
            earlier = await rules.add(rule, idempotency_key=idempotency_key)
        except VersionTaken:
            continue  # somebody else was first; each try sees a higher version
        await prices.refresh()
    if not _same_content(earlier, draft, ignore_id=False):
        raise IdempotencyConflict("the idempotency key was used for another price rule", rule_id=earlier.rule_id)
    return earlier


async def get_price_rule(rules: PriceRules, rule_id: str, version: int) -> PriceRule:
    """Version 0 = the newest. Raises PriceRuleNotFound."""
    rule = await (rules.version(rule_id, version) if version else rules.newest(rule_id))
    if rule is None:
        raise PriceRuleNotFound("there is no such price rule or version")
    return rule


async def list_price_rules(
    rules: PriceRules, *, scene: str, provider: str, model: str, status: PriceRuleStatus | None, page_size: int,
    page_token: str,
) -> tuple[list[PriceRule], str]:
    """Each rule in its newest version, oldest rule first."""
    question = ("rules", scene, provider, model, status)
    after = decode_time_token(page_token, question=question)
    found = await rules.newest_of_all(
        scene=scene, provider=provider, model=model, status=status, after=after, limit=page_size + 1
    )
    page = [rule for _, rule in found[:page_size]]
    if len(found) <= page_size:
        return page, ""
    first_made, last = found[page_size - 1]
    return page, encode_page_token([first_made.isoformat(), last.rule_id], question=question)


def quote_usage(
    prices: Prices, *, scene: str, provider: str, model: str, usage: Usage | None, at: datetime
) -> tuple[Quote, int]:
    """The price and the micro-credits for `usage`. Raises NoPrice."""
    rule = prices.book.match(scene=scene, provider=provider, model=model, at=at)
    if rule is None:
        raise NoPrice(f"no price rule matches scene {scene!r}, provider {provider!r}, model {model!r}")
    return rule.quote, charge_micros(usage, rule.rates) if usage else 0

