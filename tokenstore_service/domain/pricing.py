"""What a charge comes to, before it is booked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from metering.charge import Quote, Rates, charge_micros, unit_charge_micros
from tokenstore_service.domain.commands import Command, RecordCharge
from tokenstore_service.domain.entry import EntryFlag, EntryStatus
from tokenstore_service.domain.price_rule import PriceBook

NO_RATES = Rates()


class Priced(NamedTuple):
    """The price of a charge, and how it is to be booked."""

    status: EntryStatus
    micros: int = 0
    quote: Quote | None = None
    unit_pico: int | None = None
    flags: EntryFlag = EntryFlag(0)


def price_charges(commands: Iterable[Command], prices: PriceBook) -> dict[int, Priced]:
    """The price of each charge among the commands, by the command's id()."""
    return {id(command): price_charge(command, prices) for command in commands if isinstance(command, RecordCharge)}


def price_charge(command: RecordCharge, prices: PriceBook) -> Priced:
    """By the quoted version, at the rates in the books; without a quote, by the rule in effect when it happened."""
    if command.units is not None:
        return _price_units(command, prices)
    assert command.usage is not None
    flags = EntryFlag(0)
    if command.quote is None:
        rule = prices.match(
            scene=command.scene, provider=command.provider, model=command.model, at=command.occurred_at
        )
    else:
        rule = prices.version(command.quote.rule_id, command.quote.version)
        if rule is None or (command.quote.rates != rule.rates and command.quote.rates != NO_RATES):
            flags = EntryFlag.QUOTE_MISMATCH
    quote = rule.quote if rule else None
    if command.skip_charge:
        return Priced(EntryStatus.SKIPPED, quote=quote, flags=flags)
    if quote is None:
        return Priced(EntryStatus.UNPRICED, flags=flags)
    return Priced(EntryStatus.APPLIED, charge_micros(command.usage, quote.rates), quote, flags=flags)


def _price_units(command: RecordCharge, prices: PriceBook) -> Priced:
    units = command.units
    assert units is not None
    rule = prices.match(
        scene=command.scene, provider=command.provider, model=command.model, at=command.occurred_at,
        unit_type=units.unit_type,
    )
    if command.skip_charge:
        return Priced(EntryStatus.SKIPPED)
    if rule is None:
        return Priced(EntryStatus.UNPRICED)
    unit_pico = rule.unit_pico(units.unit_type)
    return Priced(EntryStatus.APPLIED, unit_charge_micros(units.amount, unit_pico), rule.quote, unit_pico)
