"""Price rules: made, versioned, listed, quoted."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal

from metering.charge import Quote, charge_micros, unit_charge_micros
from metering.usage import Usage
from servicekit.core.clock import Clock
from servicekit.core.errors import IdempotencyConflict, InvalidField
from servicekit.core.ids import IdSource
from servicekit.core.page_token import decode_time_token, encode_page_token
from tokenstore_service.domain.charge_rules import charge_of_entry
from tokenstore_service.domain.correction import corrected_from_text
from tokenstore_service.domain.entry import Entry, EntryFlag, EntrySource, EntryStatus
from tokenstore_service.domain.errors import NoPrice, PriceRuleNotFound
from tokenstore_service.domain.period import EPOCH
from tokenstore_service.domain.price_rule import PriceRule, PriceRuleStatus, with_rates
from tokenstore_service.domain.pricing import price_charge
from tokenstore_service.usecases.ports import LedgerReader, PriceRules, Prices, VersionTaken


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
    """Version 1. Raises IdempotencyConflict, InvalidField, AmountOutOfRange, PriceRuleOverlap."""
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
    """The next version. Raises as create_price_rule, and PriceRuleNotFound."""
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


def quote_units(
    prices: Prices, *, scene: str, provider: str, model: str, unit_type: str, amount: Decimal, at: datetime
) -> tuple[Quote, int, int]:
    """The price, pico-credits for one unit and micro-credits for `amount` units. Raises NoPrice."""
    rule = prices.book.match(scene=scene, provider=provider, model=model, at=at, unit_type=unit_type)
    if rule is None:
        raise NoPrice(
            f"no price rule prices {unit_type!r} for scene {scene!r}, provider {provider!r}, model {model!r}"
        )
    unit_pico = rule.unit_pico(unit_type)
    return rule.quote, unit_pico, unit_charge_micros(amount, unit_pico)


@dataclass(slots=True)
class Simulation:
    """Sums so far. Usage that has no price counts as 0 and is told."""

    charges: int = 0
    matched: int = 0
    charged_micros: int = 0
    simulated_micros: int = 0
    unpriced: int = 0
    done: bool = False


PROGRESS_EVERY = 10_000


async def simulate_pricing(
    reader: LedgerReader, prices: Prices, draft: PriceRule, *, user_id: str, since: datetime | None,
    until: datetime | None,
) -> AsyncIterator[Simulation]:
    """What the draft would have charged for the usage in the ledger. Charges that asked for no charge stay free; what
    was priced later counts with its first entry."""
    _check(draft)
    draft = with_rates(replace(draft, rule_id=draft.rule_id or "draft", version=0, valid_from=EPOCH, valid_to=None))
    book = prices.book.with_draft(draft)
    sums = Simulation()
    seen = 0
    async for entry in reader.audit([user_id] if user_id else None):
        if not isinstance(entry, Entry):
            continue
        seen += 1
        if seen % PROGRESS_EVERY == 0:
            yield replace(sums)
        outside = (since and entry.occurred_at < since) or (until and entry.occurred_at >= until)
        if outside or entry.source is not EntrySource.CHARGE or entry.status is EntryStatus.SKIPPED:
            continue
        sums.charged_micros -= entry.amount_micros
        if EntryFlag.REPRICED in entry.flags:
            continue
        priced = price_charge(charge_of_entry(entry), book)
        if EntryFlag.CORRECTED in entry.flags:
            before = replace(charge_of_entry(entry), usage=corrected_from_text(entry.details).usage)
            sums.simulated_micros += priced.micros - price_charge(before, book).micros
            continue
        sums.charges += 1
        sums.simulated_micros += priced.micros
        sums.matched += priced.quote is not None and priced.quote.rule_id == draft.rule_id
        sums.unpriced += priced.status is EntryStatus.UNPRICED
    yield replace(sums, done=True)

